"""The application on a real Ray cluster: two front ends, two engines or three, PostgreSQL, and an S3 server."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from cluster import Cluster, Stream, halted, until

from loadtests.postgres import MISSING, find_binaries, running_server
from loadtests.upload import upload
from tests.adapters_store.s3_server import make_bucket
from tests.adapters_store.s3_server import running_server as s3_running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROWS = 4
MANY = 40
LONG = 240


@pytest.fixture(scope="module")
def cluster(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(MISSING)
    with running_server(binaries) as database, s3_running() as objects, pytest.MonkeyPatch.context() as patch:
        make_bucket(objects, "adapters", patch)
        with psycopg.connect(f"{database}/postgres", autocommit=True) as connection:
            connection.execute("CREATE DATABASE loramux")
        cluster = Cluster(
            *("--model", str(served_model), "--data-dir", str(tmp_path_factory.mktemp("data"))),
            *("--database-url", f"{database}/loramux", "--blob-url", f"s3://adapters/a?endpoint={objects}&region=eu"),
            *("--max-num-seqs", str(ROWS), "--ray-front-ends", "2", "--ray-min-engines", "2", "--ray-max-engines", "3"),
            *("--ray-requests-per-engine", "8", "--ray-upscale-delay", "1"),
        )
        yield cluster
        assert cluster.stop() == 0


@pytest.fixture(scope="module")
def adapter(cluster: Cluster, adapters: dict[str, Path]) -> str:
    """One that both front ends know."""
    with cluster.client() as client:
        upload(client, "wide24", adapters["wide24"])
    time.sleep(1.0)
    return "wide24"


def complete(client: httpx.Client, model: str, count: int = 8, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": count, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body | fields)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def check_nothing_is_left(cluster: Cluster) -> None:
    for name in ("loramux_requests_running", "loramux_requests_waiting"):
        until(lambda name=name: cluster.metric(name) == 0)
    with cluster.client() as client:
        until(lambda: not any(each["leases"] for each in client.get("/admin/v1/adapters").json()["data"]))


def test_what_one_front_end_registers_all_can_use_a_second_later(cluster: Cluster, adapters: dict[str, Path]) -> None:
    for _ in range(MANY):  # both front ends look the name up: Serve draws one for each request
        with cluster.client() as client:
            assert complete(client, "all4").status_code == 404
    with cluster.client() as client:
        upload(client, "all4", adapters["all4"])
    time.sleep(1.0)  # what is promised; what a front end knew of the name is older
    texts = set()
    for _ in range(MANY):
        with cluster.client() as client:
            texts.add(text_of(complete(client, "all4")))
    with cluster.client() as client:
        assert len(texts) == 1
        assert texts != {text_of(complete(client, "tiny"))}
    counted = cluster.metric("loramux_request_success_total", 'adapter="all4"')
    assert counted < MANY, "one front end answered all of them"


def test_requests_go_where_their_adapter_is(
    cluster: Cluster, adapters: dict[str, Path], make_adapter: Callable[..., Path]
) -> None:
    def copies(client: httpx.Client) -> int:
        return sum(engine["adapters"]["device"] for engine in client.get("/admin/v1/state").json()["engines"])

    with cluster.client() as client:
        folders = {"rslora8": adapters["rslora8"], "qv16": adapters["qv16"], "late": make_adapter("late", seed=40)}
        for name, folder in folders.items():
            upload(client, name, folder)
        time.sleep(1.0)
        # What engines report takes seconds to reach all routers, and more on a busy machine.
        for wait, name in zip((2, 20, 90), folders, strict=True):
            before = copies(client)
            assert complete(client, name).status_code == 200
            until(lambda before=before: copies(client) > before)
            time.sleep(wait)
            for _ in range(12):
                assert complete(client, name).status_code == 200
            until(lambda: all(engine["running"] == 0 for engine in client.get("/admin/v1/state").json()["engines"]))
            time.sleep(2)
            if copies(client) == before + 1:
                return
    pytest.fail("both engines have both adapters")


def test_a_stream_says_what_a_whole_answer_does(cluster: Cluster, adapter: str) -> None:
    stream = Stream(cluster.url, model=adapter, prompt=[5, 6, 7], max_tokens=60)
    with cluster.client() as client:
        answer = complete(client, adapter, 60)
    stream.join()
    assert (stream.error, stream.text) == (None, text_of(answer))
    assert len(answer.headers.get_list("x-request-id")) == 1
    check_nothing_is_left(cluster)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_all_that_it_had(cluster: Cluster, adapter: str, stream: bool) -> None:
    body = {"model": adapter, "prompt": [5] * 20, "max_tokens": 480, "ignore_eos": True, "stream": stream}
    engines = [cluster.engine_of(replica) for replica in cluster.engine_replicas()]
    # Halted, so that nothing is over before its client leaves.
    with halted(*engines), cluster.client() as client, pytest.raises(httpx.TimeoutException):
        client.post("/v1/completions", json=body, timeout=2)
    check_nothing_is_left(cluster)


def test_a_replica_killed_under_load_loses_no_request(cluster: Cluster, adapter: str) -> None:
    prompts = [[5, 6, 7, index] for index in range(12)]
    until(lambda: len(cluster.engine_replicas()) >= 2)
    before = {replica: cluster.busy(replica) for replica in cluster.engine_replicas()}
    with cluster.client() as client:
        expected = [text_of(complete(client, adapter, LONG, prompt=prompt)) for prompt in prompts]
        # Where the adapter is, the same prompts go again; what begins while the others stand still, does so there.
        victim = max(before, key=lambda replica: cluster.busy(replica) - before[replica])
        with halted(*(cluster.engine_of(replica) for replica in before if replica != victim)):
            streams = [Stream(cluster.url, model=adapter, prompt=prompt, max_tokens=LONG) for prompt in prompts]
            until(lambda: any(stream.has_begun.is_set() for stream in streams))
            with halted(cluster.engine_of(victim)):  # which says nothing more, and then ends as its replica has
                os.kill(victim, signal.SIGKILL)
        for stream in streams:
            stream.join()
        failed = [stream for stream in streams if stream.error is not None]
        # Those that had a row of the victim: what waited there has been answered by another.
        assert {stream.error["code"] for stream in failed if stream.error is not None} <= {"engine_error"}
        assert len(failed) <= ROWS
        done = [(stream.text, text) for stream, text in zip(streams, expected, strict=True) if stream.error is None]
        assert [text for text, _ in done] == [text for _, text in done]
        until(lambda: len(cluster.engine_replicas()) >= 2)
        assert text_of(complete(client, adapter, LONG, prompt=prompts[0])) == expected[0]
    check_nothing_is_left(cluster)


def test_more_requests_than_engines_want_bring_another_engine(cluster: Cluster, adapter: str) -> None:
    streams: list[Stream] = []

    def is_there() -> bool:
        streams[:] = [stream for stream in streams if not stream.has_ended.is_set()]
        while len(streams) < 24:
            streams.append(Stream(cluster.url, model=adapter, prompt=[5, 6, len(streams) + 8], max_tokens=LONG))
        return len(cluster.engine_replicas()) == 3

    until(is_there)
    for stream in streams:
        stream.join()
        assert stream.error is None, stream.error
    check_nothing_is_left(cluster)


def test_stopping_lets_streams_end(cluster: Cluster, adapter: str) -> None:
    with cluster.client() as client:
        expected = text_of(complete(client, adapter, LONG))
    stream = Stream(cluster.url, model=adapter, prompt=[5, 6, 7], max_tokens=LONG)
    until(stream.has_begun.is_set)
    assert cluster.stop() == 0
    stream.join()
    assert (stream.error, stream.text) == (None, expected)
