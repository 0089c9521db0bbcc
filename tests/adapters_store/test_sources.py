"""Sources: what a policy lets through, over real files, S3 and hub servers on loopback."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_store.contents import ROUTER
from adapters_store.source_policy import SourcePolicy
from adapters_store.sources import fetch
from adapters_store.types import AdapterError
from tests.adapters_store.fetched import ADAPTER, CONFIG, WEIGHTS, contents, refused, zipped
from tests.adapters_store.s3_server import make_bucket, put, running_server
from tests.adapters_store.web_site import Site, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed folder with `sql` in it, beside `secret`, which is not allowed."""
    for folder in ("root/sql", "secret/sql"):
        (tmp_path / folder).mkdir(parents=True)
        for name, content in ADAPTER.items():
            (tmp_path / folder / name).write_bytes(content)
    return tmp_path / "root"


@pytest.fixture
def local(root: Path) -> SourcePolicy:
    return SourcePolicy(file_roots=(root,))


@pytest.mark.parametrize("form", ["file://{}/sql", "file://localhost{}/sql/", "file://{}/s%71l"])
def test_a_folder_below_a_root(form: str, root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    (root / "sql" / "README.md").write_text("# card")
    (root / "sql" / "training_args.bin").write_bytes(b"pickle")
    folder = fetch(form.format(root), tmp_path / "into", local)
    assert contents(folder) == ADAPTER | {"README.md": b"# card"}
    assert (folder / WEIGHTS).stat().st_ino != (root / "sql" / WEIGHTS).stat().st_ino


def test_a_local_folder_brings_its_samples(root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    (root / "sql" / "samples.json").write_text('["x"]')
    assert contents(fetch(f"file://{root}/sql", tmp_path / "into", local)) == ADAPTER | {"samples.json": b'["x"]'}
    (root / "sql" / "samples.json").write_bytes(b" " * ((1 << 20) + 1))
    assert refused(f"file://{root}/sql", tmp_path / "other", local).code == "adapter_too_large"


def test_an_archive_below_a_root(root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    (root / "sql.zip").write_bytes(zipped())
    assert contents(fetch(f"file://{root}/sql.zip", tmp_path / "into", local)) == ADAPTER


def test_links_that_stay_below_the_roots(root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    (root / "alias").symlink_to("sql")
    (root / "cache").mkdir()
    for name in ADAPTER:
        (root / "cache" / name).symlink_to(root / "sql" / name)
    (tmp_path / "door").symlink_to(root)
    assert contents(fetch(f"file://{root}/alias", tmp_path / "a", local)) == ADAPTER
    assert contents(fetch(f"file://{root}/cache", tmp_path / "b", local)) == ADAPTER
    through = SourcePolicy(file_roots=(tmp_path / "door",))
    assert contents(fetch(f"file://{tmp_path}/door/sql", tmp_path / "c", through)) == ADAPTER


def test_links_that_leave_the_roots(root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    (root / "folder").symlink_to(tmp_path / "secret" / "sql")
    (root / "nothing").symlink_to(tmp_path / "secret" / "nothing")
    (root / "files").mkdir()
    for name in ADAPTER:
        (root / "files" / name).symlink_to(tmp_path / "secret" / "sql" / name)
    errors = [refused(f"file://{root}/{name}", tmp_path / "into", local) for name in ("folder", "nothing", "files")]
    assert [error.code for error in errors] == ["adapter_unsafe"] * 3
    assert len({error.message for error in errors}) == 1, "what lies outside must not be told apart"


def test_a_link_put_there_after_the_path_was_resolved(
    root: Path, local: SourcePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "realpath", str)  # what it said just before
    (root / "sql").rename(root / "was")
    (root / "sql").symlink_to(tmp_path / "secret" / "sql")
    assert refused(f"file://{root}/sql", tmp_path / "into", local).code == "adapter_unsafe"
    (root / "sql").unlink()
    (root / "sql").mkdir()
    for name in ADAPTER:
        (root / "sql" / name).symlink_to(tmp_path / "secret" / "sql" / name)
    assert refused(f"file://{root}/sql", tmp_path / "into", local).code == "adapter_unsafe"


@pytest.mark.parametrize("path", ["/secret/sql", "/secret/none", "/rootless", "/root2/sql"])
def test_folders_outside_of_the_roots(path: str, root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    error = refused(f"file://{tmp_path}{path}", tmp_path / "into", local)
    assert (error.code, error.status) == ("source_not_allowed", 403)
    assert str(root.parent) not in error.message
    assert refused(f"file://{root}/sql", tmp_path / "into", SourcePolicy()).code == "source_not_allowed"


@pytest.mark.parametrize(
    "path", ["../secret/sql", "sql/../../secret/sql", "%2e%2e/secret/sql", "sql/..%2f../secret/sql"]
)
def test_parents_in_the_path(path: str, root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    assert refused(f"file://{root}/{path}", tmp_path / "into", local).code == "adapter_unsafe"


def test_special_files(root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    (root / "sql" / WEIGHTS).unlink()
    os.mkfifo(root / "sql" / WEIGHTS)
    assert refused(f"file://{root}/sql", tmp_path / "into", local).code == "adapter_unsafe"
    (root / "sql" / WEIGHTS).unlink()
    (root / "sql" / WEIGHTS).mkdir()
    assert refused(f"file://{root}/sql", tmp_path / "into", local).code == "adapter_unsafe"


def test_incomplete_and_oversized_folders(root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    error = refused(f"file://{root}/sql", tmp_path / "into", replace(local, max_bytes=1000))
    assert (error.code, error.status) == ("adapter_too_large", 413)
    (root / "sql" / CONFIG).write_bytes(b" " * (2 << 20))
    assert refused(f"file://{root}/sql", tmp_path / "into", local).code == "adapter_too_large"
    (root / "sql" / CONFIG).write_bytes(b"{}")
    (root / "sql" / WEIGHTS).rename(root / "sql" / "adapter_model.bin")
    error = refused(f"file://{root}/sql", tmp_path / "into", local)
    assert (error.code, error.status) == ("not_safetensors", 415)
    (root / "sql" / "adapter_model.bin").unlink()
    assert refused(f"file://{root}/sql", tmp_path / "into", local).code == "adapter_incomplete"


@pytest.mark.parametrize("name", ["none", "none/deeper", "none.zip", "sql/adapter_config.json/x"])
def test_what_does_not_exist(name: str, root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    error = refused(f"file://{root}/{name}", tmp_path / "into", local)
    assert (error.code, error.status) == ("bad_source", 400)
    assert error.message == "source does not exist: expected a folder or an archive there"


@pytest.mark.parametrize("name", ["x" * 256, "ü" * 128, "%C3%BC" * 128, "x/" * 2000, "x" * 256 + ".zip"])
def test_names_that_no_disk_takes(name: str, root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    error = refused(f"file://{root}/{name}", tmp_path / "into", local)
    assert (error.code, error.status) == ("bad_source", 400)
    assert "too long" in error.message


def test_a_router_instead_of_an_adapter(root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    files = {"router.json": b"{}", "router.safetensors": b"weights"}
    (root / "router").mkdir()
    for name, content in (files | {"README.md": b"# card", "samples.json": b"[]"}).items():
        (root / "router" / name).write_bytes(content)
    (root / "router.zip").write_bytes(zipped(files | {"README.md": b"# card"}))
    for source in ("router", "router.zip"):
        assert contents(fetch(f"file://{root}/{source}", tmp_path / f"into-{source}", local, ROUTER)) == files
    (root / "sql.zip").write_bytes(zipped(files | {"other/router.json": b"{}"}))
    for source, code, word in (
        ("sql", "router_incomplete", r"router\.json is missing"),
        ("sql.zip", "router_unsupported", "holds 2 routers"),
        ("../x", "router_unsafe", "contains"),
    ):
        with pytest.raises(AdapterError, match=word) as caught:
            fetch(f"file://{root}/{source}", tmp_path / "into", local, ROUTER)
        assert caught.value.code == code
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing") as caught:
        fetch(f"file://{root}/router", tmp_path / "into", local)
    assert caught.value.code == "adapter_incomplete"
    (root / "router" / "router.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(AdapterError, match=r"router\.json is too large: expected at most 1048576") as caught:
        fetch(f"file://{root}/router", tmp_path / "into", local, ROUTER)
    assert (caught.value.code, caught.value.status) == ("router_too_large", 413)
    assert local.limit_of("router.safetensors") == local.max_bytes


def test_a_long_readme_is_cut(root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    (root / "sql" / "README.md").write_bytes(b"r" * (3 << 20))
    folder = fetch(f"file://{root}/sql", tmp_path / "into", local)
    assert (folder / "README.md").read_bytes() == b"r" * (1 << 20)


def test_a_source_that_takes_too_long(root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    times = iter(range(0, 10_000, 100))
    error = refused(f"file://{root}/sql", tmp_path / "into", replace(local, deadline=50, clock=lambda: next(times)))
    assert (error.code, error.status) == ("source_unavailable", 503)


_STEPS = st.sampled_from(["..", ".", "sql", "link", "%2e%2e", "%2f", "up", "secret", WEIGHTS, "%00", ""])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(_STEPS, max_size=5))
def test_no_path_reads_outside(steps: list[str], root: Path, local: SourcePolicy, tmp_path: Path) -> None:
    for name, target in (("link", tmp_path / "secret"), ("up", Path(".."))):
        if not (root / name).is_symlink():
            (root / name).symlink_to(target)
            (tmp_path / "secret" / "sql" / CONFIG).write_bytes(b"secret")
            (tmp_path / "secret" / CONFIG).write_bytes(b"secret")
    into = tmp_path / "into"
    try:
        fetch(f"file://{root}/{'/'.join(steps)}", into, local)
    except AdapterError:
        return
    assert contents(into) == ADAPTER
    for path in into.iterdir():
        path.unlink()


@pytest.mark.parametrize("source", ["", "sql", "/etc/passwd", "ftp://h/x", "http://h/x", "file:sql", "FILE:///x", "file://host/x", "file://", "hf://", "hf://one", "hf://a/b@", "hf://a/b@../c", "hf://a/b/c", "hf://../b", "s3://", "s3:///x", "s3://b/../c", "s3://b/x?endpoint=http://h", "https://", "https:///x", "https://h\n/x", "https://u:p@h/x", "https://h:99999/x", "https://[::1/x"])  # fmt: skip  # noqa: E501
def test_sources_that_are_not_understood(source: str, tmp_path: Path) -> None:
    policy = SourcePolicy((tmp_path,), frozenset({"h"}), s3_buckets=frozenset({"b"}), hub_endpoint="https://hub")
    error = refused(source, tmp_path / "into", policy)
    assert (error.code, error.status) == ("bad_source", 400)


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        ("file:///etc", "--adapter-root"),
        ("hf://a/b", "sources.hub_endpoint"),
        ("s3://bucket/x", "sources.s3_buckets"),
        ("https://example.com/x", "sources.https_hosts"),
    ],
)
def test_nothing_is_allowed_by_default(source: str, setting: str, tmp_path: Path) -> None:
    error = refused(source, tmp_path / "into", SourcePolicy())
    assert error.code == "source_not_allowed"
    assert setting in error.message


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with running_server() as url:
        yield url


def test_a_prefix_of_a_bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bucket in ("models", "private"):
        make_bucket(s3_server, bucket, monkeypatch)
        for name, body in ADAPTER.items():
            put(f"{s3_server}/{bucket}/team/sql/{name}", body)
    put(f"{s3_server}/models/sql.tgz", b"no archive")
    policy = SourcePolicy(s3_buckets=frozenset({"models"}), s3_endpoint=s3_server)
    assert contents(fetch("s3://models/team/sql/", tmp_path / "into", policy)) == ADAPTER
    assert refused("s3://private/team/sql", tmp_path / "a", policy).code == "source_not_allowed"
    assert refused("s3://models/team", tmp_path / "a", policy).code == "adapter_incomplete"
    assert refused("s3://models/sql.tgz", tmp_path / "a", policy).code == "adapter_corrupt"
    assert refused("s3://models/team/sql", tmp_path / "a", replace(policy, max_bytes=9)).code == "adapter_too_large"
    gone = replace(policy, s3_endpoint="http://127.0.0.1:1")
    assert refused("s3://models/team/sql", tmp_path / "a", gone).code == "source_unavailable"


@pytest.fixture
def hub() -> Iterator[Site]:
    """A hub with the repository `org/sql` at revision `v1`, of the API that huggingface_hub speaks."""
    with serving(None) as site:
        files = ADAPTER | {"README.md": b"# card", "optimizer.pt": b"pickle"}
        siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
        info = json.dumps({"id": "org/sql", "sha": COMMIT, "siblings": siblings}).encode()
        for path in ("/revision/v1?blobs=true", "?blobs=true", f"/revision/{COMMIT}"):
            site.answers[f"/api/models/org/sql{path}"] = (200, {"Content-Type": "application/json"}, info)
        for name, body in files.items():
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Content-Type": "application/octet-stream"}
            site.answers[f"/org/sql/resolve/{COMMIT}/{name}"] = (200, headers, body)
        site.answers["/api/models/org/none?blobs=true"] = (404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        site.answers["/api/models/org/sql/revision/v2?blobs=true"] = (404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        yield site


def test_a_repository_of_the_hub(hub: Site, tmp_path: Path) -> None:
    policy = SourcePolicy(hub_endpoint=f"http://127.0.0.1:{hub.port}")
    for source in ("hf://org/sql@v1", "hf://org/sql"):
        folder = fetch(source, tmp_path / source[-2:], policy)
        assert contents(folder) == ADAPTER | {"README.md": b"# card"}
    assert not any("optimizer" in path for _, path in hub.asked)
    for source in ("hf://org/none", "hf://org/sql@v2"):
        assert refused(source, tmp_path / "into", policy).code == "adapter_incomplete"
    error = refused("hf://org/sql", tmp_path / "into", replace(policy, max_bytes=1000))
    assert (error.code, error.status) == ("adapter_too_large", 413)
    hub.answers["/api/models/org/sql?blobs=true"] = (500, {}, b"")
    error = refused("hf://org/sql", tmp_path / "into", policy)
    assert (error.code, error.status) == ("source_unavailable", 503)
    assert str(hub.port) not in error.message


def test_an_unreachable_hub(tmp_path: Path) -> None:
    policy = SourcePolicy(hub_endpoint="http://127.0.0.1:1", timeout=1.0)
    assert refused("hf://org/sql", tmp_path / "into", policy).code == "source_unavailable"
