"""Trained routers' folders: what is written is read back, and what is damaged is refused with the field's name."""

from pathlib import Path

import pytest
import torch
from folder_edits import edit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from routing.card_file import CARD_FILE, CHANGE_FILE, MAX_CARD_BYTES, RouterFolderError, file_sha256
from routing.router_folder import RouterCard, read_router, rewrite_card, write_router

BASE = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    card = RouterCard(BASE, "tiny", "head", "about: ", 4, "", "mine", 0.25, {"recipe": {"steps": 3}})
    write_router(tmp_path / "router", card, {"head": torch.eye(4)})
    return tmp_path / "router"


def test_a_card_is_read_back(folder: Path) -> None:
    card = read_router(folder)
    assert card == RouterCard(
        BASE, "tiny", "head", "about: ", 4, file_sha256(folder / CHANGE_FILE), "mine", 0.25, {"recipe": {"steps": 3}}
    )
    assert rewrite_card(folder, card) == card


def test_only_what_is_needed_is_needed(folder: Path) -> None:
    edit(folder, lambda fields: [fields.pop(name) for name in ("name", "min_score", "training")])
    card = read_router(folder)
    assert (card.name, card.min_score, card.training) == (None, None, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "meteora"),
        ("version", 2),
        ("version", True),
        ("mode", "gate"),
        ("width", 0),
        ("width", True),
        ("width", 10**9),
        ("prefix", None),
        ("prefix", "x" * 1001),
        ("sha256", "A" * 64),
        ("base", BASE),
        ("base", {"id": BASE}),
        ("base.id", {"id": "xyz", "name": "tiny"}),
        ("base.name", {"id": BASE, "name": ""}),
        ("name", ""),
        ("min_score", 1.5),
        ("min_score", "high"),
        ("training", []),
    ],
)
def test_a_wrong_field_is_named(folder: Path, name: str, value: object) -> None:
    edit(folder, lambda fields: fields.update({name.partition(".")[0]: value}))
    with pytest.raises(RouterFolderError, match=rf"^router\.json: field {name}: expected "):
        read_router(folder)


@pytest.mark.parametrize("name", ["kind", "version", "base", "mode", "prefix", "width", "sha256"])
def test_a_missing_field_is_named(folder: Path, name: str) -> None:
    edit(folder, lambda fields: fields.pop(name))
    with pytest.raises(RouterFolderError, match=f"field {name}: expected a value, got nothing"):
        read_router(folder)


def test_an_unknown_field_is_named(folder: Path) -> None:
    edit(folder, lambda fields: fields.update(trust=True))
    with pytest.raises(RouterFolderError, match="field trust: no such field"):
        read_router(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"nonsense", b"\xff\xfe", b'{"min_score": NaN}', b"[" * 100_000])
def test_a_card_that_is_no_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / CARD_FILE).write_bytes(content)
    with pytest.raises(RouterFolderError, match=r"^router\.json: expected a JSON object"):
        read_router(folder)


def test_a_huge_card_is_not_read(folder: Path) -> None:
    (folder / CARD_FILE).write_bytes(b" " * (MAX_CARD_BYTES + 1))
    with pytest.raises(RouterFolderError, match="expected at most 1048576 bytes"):
        read_router(folder)


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RouterFolderError, match=r"^router\.json: expected a readable file"):
        read_router(tmp_path)
    (folder / CHANGE_FILE).unlink()
    with pytest.raises(RouterFolderError, match=r"^router\.safetensors: expected a readable file"):
        read_router(folder)


def test_other_tensors_than_the_card_names_are_refused(folder: Path) -> None:
    save_file({"head": torch.zeros(4, 4)}, folder / CHANGE_FILE)
    with pytest.raises(RouterFolderError, match="field sha256"):
        read_router(folder)


@pytest.mark.parametrize(
    ("mode", "tensors", "message"),
    [
        ("head", {"head": torch.eye(3)}, "expected one tensor `head` of 4 x 4"),
        ("head", {"head": torch.eye(4), "more": torch.eye(4)}, "expected one tensor `head`"),
        ("head", {"head": torch.eye(4).half()}, "expected F32 tensors only, got F16"),
        ("full", {}, "0 tensors, expected 1 to 10000"),
        ("lora", {"a.lora_A": torch.ones(2, 4)}, "expected pairs"),
        ("lora", {"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(4, 3)}, "rank 2 in A but 3 in B"),
        ("lora", {"a.weight": torch.ones(4, 4)}, "expected pairs"),
    ],
)
def test_tensors_of_another_form_are_refused(
    tmp_path: Path, mode: str, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(RouterFolderError, match=message):
        write_router(tmp_path, RouterCard(BASE, "tiny", mode, "", 4, ""), tensors)


@given(st.binary(max_size=200))
def test_no_bytes_are_mistaken_for_tensors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("router")
    write_router(folder, RouterCard(BASE, "tiny", "full", "", 4, ""), {"weight": torch.ones(1)})
    (folder / CHANGE_FILE).write_bytes(content)
    edit(folder, lambda fields: fields.update(sha256=file_sha256(folder / CHANGE_FILE)))
    with pytest.raises(RouterFolderError, match=r"^router\.safetensors: "):
        read_router(folder)
