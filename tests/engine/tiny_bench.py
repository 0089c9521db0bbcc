"""The engine's benchmark on a tiny model."""

from collections.abc import Iterator

import pytest

from server.engine.bench_session import Options, Session

TINY = Options(
    model="tiny",
    device="cpu",
    repeats=1,
    traffic=("0", "1", "mix3"),
    rows=(1, 3),
    requests=8,
    concurrency=3,
    longest=14,
    context=12,
    steps=3,
    warm=1,
    profiled=0,
    seconds=0.05,
    many=10,
    device_adapters=4,
)


def silent(_: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(TINY, silent) as session:
        yield session
