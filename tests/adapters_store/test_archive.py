"""Archives: what they may hold, what they may not, and that nothing broken does harm."""

import gzip
import io
import random
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_store.archive import ArchiveLimits, unpack
from adapters_store.contents import ROUTER
from adapters_store.types import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = {CONFIG: b"{}", WEIGHTS: b"weights" * 1000}
LIMITS = ArchiveLimits(max_bytes=1 << 20, max_entries=50)
Pack = Callable[[Mapping[str, bytes]], bytes]


def make_zip(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def make_tar(files: Mapping[str, bytes], **fields: object) -> bytes:
    """`fields` are set on the member whose content is empty."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items() if not content else ():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(params=[make_zip, make_tar], ids=["zip", "tar"])
def pack(request: pytest.FixtureRequest) -> Pack:
    made: Pack = request.param
    return made


def refused(content: bytes, folder: Path, limits: ArchiveLimits = LIMITS) -> AdapterError:
    """The refusal; what was there before must be all that is there after."""
    archive, into = folder / "archive", folder / "into"
    archive.write_bytes(content)
    before = sorted(folder.rglob("*"))
    with pytest.raises(AdapterError) as caught:
        unpack(archive, into, limits)
    assert sorted(set(folder.rglob("*")) - {into}) == sorted(set(before) - {into})
    assert str(folder) not in caught.value.message
    return caught.value


@pytest.mark.parametrize("prefix", ["", "./", "adapter/"])
def test_an_adapter_is_unpacked(pack: Pack, prefix: str, tmp_path: Path) -> None:
    files = {prefix + name: content for name, content in (ADAPTER | {"README.md": b"# card"}).items()}
    extras = {f"{prefix}tokenizer.json": b"{}", f"{prefix}checkpoint/deep/{CONFIG}": b"[]", "__MACOSX/._x": b"x"}
    (tmp_path / "archive").write_bytes(pack(files | extras))
    folder = unpack(tmp_path / "archive", tmp_path / "into", LIMITS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == ADAPTER | {"README.md": b"# card"}


def test_a_router_is_unpacked(pack: Pack, tmp_path: Path) -> None:
    files = {"router.json": b"{}", "router.safetensors": b"x"}
    (tmp_path / "archive").write_bytes(pack(files | ADAPTER | {"README.md": b"# card"}))
    folder = unpack(tmp_path / "archive", tmp_path / "into", LIMITS, ROUTER)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    for broken, code in ((pack(ADAPTER), "router_incomplete"), (b"GGUF", "router_corrupt")):
        (tmp_path / "archive").write_bytes(broken)
        with pytest.raises(AdapterError) as caught:
            unpack(tmp_path / "archive", tmp_path / "other", LIMITS, ROUTER)
        assert (caught.value.code, caught.value.status) == (code, 422)


def test_archives_of_common_tools(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in ADAPTER.items():
        (folder / name).write_bytes(content)
    with tarfile.open(tmp_path / "a", "w:gz") as archive:
        archive.add(folder, ".")
    with tarfile.open(tmp_path / "b", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.add(folder, "ädapter")
    with zipfile.ZipFile(tmp_path / "c", "w") as zipped:
        zipped.mkdir("adapter")
        for name in ADAPTER:
            zipped.write(folder / name, f"adapter/{name}")
    for name in "abc":
        unpack(tmp_path / name, tmp_path / f"out-{name}", LIMITS)
        assert {path.name: path.read_bytes() for path in (tmp_path / f"out-{name}").iterdir()} == ADAPTER


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "a/../../evil",
        "/etc/evil",
        "//host/evil",
        "..",
        "..\\evil",
        "C:\\evil",
        "C:/evil",
        "new\nline",
        f"adapter/../{CONFIG}",
    ],
)
def test_paths_that_leave(pack: Pack, name: str, tmp_path: Path) -> None:
    error = refused(pack(ADAPTER | {name: b"evil"}), tmp_path)
    assert (error.code, error.status) == ("adapter_unsafe", 422)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
)
@pytest.mark.parametrize("name", ["link", WEIGHTS])
def test_tar_entries_that_are_no_files(kind: bytes, name: str, tmp_path: Path) -> None:
    content = make_tar({CONFIG: b"{}", name: b""}, type=kind, linkname=CONFIG)
    assert refused(content, tmp_path).code == "adapter_unsafe"


def test_a_sparse_tar_entry(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(WEIGHTS)
        member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    assert refused(out.getvalue(), tmp_path).code == "adapter_unsafe"


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_zip_entries_that_are_no_files(kind: int, tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo(WEIGHTS)
        info.external_attr = (kind | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert refused(out.getvalue(), tmp_path).code == "adapter_unsafe"


def test_a_bomb(pack: Pack, tmp_path: Path) -> None:
    error = refused(pack({CONFIG: b"{}", WEIGHTS: bytes(2 << 20)}), tmp_path)
    assert (error.code, error.status) == ("adapter_too_large", 413)
    error = refused(pack(ADAPTER | {"padding.bin": bytes(2 << 20)}), tmp_path)
    assert error.code == "adapter_too_large"


def test_a_zip_that_unpacks_to_more_than_it_declares(tmp_path: Path) -> None:
    honest = make_zip({CONFIG: b"{}", WEIGHTS: bytes(1 << 19)})
    lying = honest.replace(struct.pack("<I", 1 << 19), struct.pack("<I", 10))
    assert lying != honest
    assert refused(lying, tmp_path).code == "adapter_corrupt"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("name", [WEIGHTS, "notes.txt"])
def test_methods_that_unpack_without_bounds(method: int, name: str, tmp_path: Path) -> None:
    """A bzip2 block of 45 bytes becomes 900 KB at once, whatever size its entry declares."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(CONFIG, b"{}")
        archive.writestr(name, b"x", method)
    error = refused(out.getvalue(), tmp_path)
    assert error.code == "adapter_unsafe"
    assert "neither stored nor deflated" in error.message


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert refused(make_zip(ADAPTER), tmp_path).code == "adapter_corrupt"


def test_too_many_entries(pack: Pack, tmp_path: Path) -> None:
    files = ADAPTER | {f"file-{index}": b"x" for index in range(60)}
    assert refused(pack(files), tmp_path).code == "adapter_unsafe"


def test_a_table_of_contents_too_long_for_memory(tmp_path: Path) -> None:
    error = refused(make_zip({f"{index:0200}": b"" for index in range(6000)}), tmp_path)
    assert error.code == "adapter_unsafe"
    assert "table of contents" in error.message


def test_tar_headers_too_long_for_memory(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("x")
        member.pax_headers = {"comment": "c" * (1 << 19)}
        archive.addfile(member)
    error = refused(out.getvalue(), tmp_path)
    assert error.code == "adapter_unsafe"
    assert "headers are too long" in error.message


@pytest.mark.parametrize("size", [-512, -1, -(1 << 40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_negative_sizes(kind: bytes, size: int, tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    assert refused(gzip.compress(bytes(block) * 3 + bytes(1024)), tmp_path).code in (
        "adapter_corrupt",
        "adapter_incomplete",
        "adapter_unsafe",
    )


@pytest.mark.parametrize(
    ("files", "code", "status"),
    [
        ({}, "adapter_incomplete", 422),
        ({CONFIG: b"{}"}, "adapter_incomplete", 422),
        ({WEIGHTS: b"x"}, "adapter_incomplete", 422),
        ({CONFIG: b"{}", "adapter_model.bin": b"x"}, "not_safetensors", 415),
        ({f"a/b/{name}": content for name, content in ADAPTER.items()}, "adapter_incomplete", 422),
        ({f"a/{CONFIG}": b"{}", f"b/{WEIGHTS}": b"x"}, "adapter_unsupported", 422),
        (ADAPTER | {f"a/{CONFIG}": b"{}"}, "adapter_unsupported", 422),
    ],
)
def test_what_is_not_one_adapter(pack: Pack, files: dict[str, bytes], code: str, status: int, tmp_path: Path) -> None:
    error = refused(pack(files), tmp_path)
    assert (error.code, error.status) == (code, status)


def test_an_entry_that_comes_twice(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name in (CONFIG, WEIGHTS, "./" + WEIGHTS):
            archive.addfile(tarfile.TarInfo(name))
    assert refused(out.getvalue(), tmp_path).code == "adapter_unsafe"


def test_an_encrypted_zip(tmp_path: Path) -> None:
    content = bytearray(make_zip(ADAPTER))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    assert refused(bytes(content), tmp_path).code == "adapter_corrupt"


@pytest.mark.parametrize("content", [b"", b"PK", b"\x1f\x8b", b"\x1f\x8b\x08\x00", b"GGUF....", b"PK\x05\x06"])
def test_what_is_no_archive(content: bytes, tmp_path: Path) -> None:
    assert refused(content, tmp_path).code == "adapter_corrupt"


def test_a_truncated_archive(pack: Pack, tmp_path: Path) -> None:
    files = {CONFIG: b"{}", WEIGHTS: random.Random(0).randbytes(20_000)}
    content = pack(files)
    for length in range(0, len(content) - 8, 997):
        assert refused(content[:length], tmp_path).code in ("adapter_corrupt", "adapter_incomplete")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["zip", "tar"]), edits=st.lists(st.tuples(st.integers(0), st.binary(max_size=6)), max_size=4)
)
def test_damage_is_refused_or_harmless(kind: str, edits: list[tuple[int, bytes]], tmp_path: Path) -> None:
    """Bytes overwritten anywhere, in a tar below the compression: an AdapterError, or just the files of an adapter."""
    content = bytearray(make_zip(ADAPTER) if kind == "zip" else gzip.decompress(make_tar(ADAPTER)))
    for at, data in edits:
        at %= len(content)
        content[at : at + len(data)] = data[: len(content) - at]
    packed = bytes(content) if kind == "zip" else gzip.compress(bytes(content), 1)
    archive, into = tmp_path / "archive", tmp_path / "into"
    archive.write_bytes(packed)
    try:
        unpack(archive, into, LIMITS)
    except AdapterError:
        assert list(into.iterdir()) == []
    else:
        assert {path.name for path in into.iterdir()} <= {CONFIG, WEIGHTS, "README.md"}
        for path in list(into.iterdir()):
            path.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "into"}


_PARTS = st.sampled_from(["..", ".", "", "a", CONFIG, WEIGHTS, "README.md", "\\", "C:", "~", "\t", "é"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["zip", "tar"]), names=st.lists(st.lists(_PARTS, max_size=4).map("/".join), max_size=4))
def test_no_name_writes_outside(kind: str, names: list[str], tmp_path: Path) -> None:
    into = tmp_path / "into"
    files = dict.fromkeys([*names, CONFIG, WEIGHTS], b"x")
    content = make_zip(files) if kind == "zip" else make_tar(files)
    (tmp_path / "archive").write_bytes(content)
    try:
        unpack(tmp_path / "archive", into, LIMITS)
    except AdapterError:
        assert list(into.iterdir()) == []
    else:
        assert not any(".." in name.split("/") or name.startswith("/") or "\\" in name for name in names)
        assert {CONFIG, WEIGHTS} <= {path.name for path in into.iterdir()} <= {CONFIG, WEIGHTS, "README.md"}
        for path in list(into.iterdir()):
            path.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "into"}


def test_zlib_errors_inside_an_entry(tmp_path: Path) -> None:
    content = make_zip(ADAPTER)
    packed = zlib.compressobj(wbits=-15)
    stream = packed.compress(ADAPTER[WEIGHTS]) + packed.flush()
    broken = content.replace(stream[:10], b"\xff" * 10)
    assert refused(broken, tmp_path).code == "adapter_corrupt"
