# docker build --target cpu .    (PyTorch without CUDA)
# docker build --target cuda .   (run with --gpus all)
FROM python:3.12-slim AS base
ARG PREFIX=/opt/loramux
ENV PATH=$PREFIX/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/loramux loramux
WORKDIR $PREFIX

FROM base AS build
RUN python3 -m venv $PREFIX/venv
WORKDIR $PREFIX/src
COPY pyproject.toml requirements.lock README.md ./
COPY adapters_store adapters_store
COPY deploy deploy
COPY kernels kernels
COPY routing routing
COPY server server

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --constraint requirements.lock ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} ".[postgres,routing,tracing]"

FROM build AS build-cuda
RUN pip install --no-cache-dir --constraint requirements.lock ".[postgres,routing,tracing]"

# The installed packages alone: neither sources nor what building needed.
FROM base AS cpu
COPY --from=build-cpu $PREFIX/venv $PREFIX/venv
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s \
    CMD ["python3", "-c", "import httpx, sys; sys.exit(httpx.get('http://127.0.0.1:8000/health', trust_env=False).status_code != 200)"]
USER 10001
ENTRYPOINT ["loramux"]
CMD ["--help"]

FROM base AS cuda
# Triton builds its launchers with the system's C compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda $PREFIX/venv $PREFIX/venv
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s \
    CMD ["python3", "-c", "import httpx, sys; sys.exit(httpx.get('http://127.0.0.1:8000/health', trust_env=False).status_code != 200)"]
USER 10001
ENTRYPOINT ["loramux"]
CMD ["--help"]
