# docker build --target cpu .    (PyTorch without CUDA)
# docker build --target cuda .   (run with --gpus all)
FROM python:3.12-slim AS base
ARG PREFIX=/opt/loramux
ENV PATH=$PREFIX/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1
RUN useradd --system --create-home --home-dir /var/lib/loramux loramux
WORKDIR $PREFIX/src
RUN python3 -m venv $PREFIX/venv
COPY pyproject.toml requirements.lock README.md ./
COPY adapters_store adapters_store
COPY deploy deploy
COPY kernels kernels
COPY routing routing
COPY server server
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s \
    CMD python3 -c "import httpx, sys; sys.exit(httpx.get('http://127.0.0.1:8000/health', trust_env=False).status_code != 200)"
ENTRYPOINT ["loramux"]
CMD ["--help"]

FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --constraint requirements.lock ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} ".[routing]"
USER loramux

FROM base AS cuda
# Triton builds its launchers with the system's C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --constraint requirements.lock ".[routing]"
USER loramux
