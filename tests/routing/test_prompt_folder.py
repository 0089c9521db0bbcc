"""Prompt-level routers' folders: what is written is read back, and what is damaged is refused with the field's name."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folder_edits import edit, resave
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters_store.types import TARGETS, LinearShape
from routing.card_adapters import CardAdapter
from routing.card_file import CARD_FILE, CHANGE_FILE, RouterFolderError, file_sha256, read_kind
from routing.gate_folder import read_gates
from routing.prompt_folder import PromptCard, load_prompt_router, read_prompt_router, write_prompt_router
from routing.prompt_router import LayerRouter, RouterForm

BASE, DIGEST = "0123456789abcdef" * 4, "ab" * 32
PAIR = (CardAdapter("plus", DIGEST), CardAdapter("spell", "cd" * 32))
SHAPE = LinearShape(2, dict.fromkeys(TARGETS, 6), dict.fromkeys(TARGETS, 6))
MOA = PromptCard(
    "moa",
    BASE,
    "tiny",
    PAIR,
    RouterForm("adapters", 2, 3, 1, "mean", "none", "rms", "vote", 1),
    True,
    "",
    "mine",
    {"a": 1},
)
MILORA = PromptCard(
    "milora",
    BASE,
    "tiny",
    PAIR[:1],
    RouterForm("modules", 2, 7, 3, "attention", "rational", "none", "layer"),
    False,
    "",
)


def routers(card: PromptCard) -> tuple[LayerRouter, ...]:
    torch.manual_seed(3)
    full = card.kind == "milora"
    return tuple(
        LayerRouter(
            torch.randn(card.form.num_experts, 6),
            torch.randn(6) if full else None,
            torch.randn(7) if full else None,
            torch.randn(5) if full else None,
        )
        for _ in range(2)
    )


@pytest.fixture
def moa(tmp_path: Path) -> Path:
    write_prompt_router(tmp_path / "moa", MOA, routers(MOA))
    return tmp_path / "moa"


@pytest.fixture
def milora(tmp_path: Path) -> Path:
    write_prompt_router(tmp_path / "milora", MILORA, routers(MILORA))
    return tmp_path / "milora"


@pytest.mark.parametrize("card", [MOA, MILORA])
def test_card_and_routers_are_read_back(tmp_path: Path, card: PromptCard) -> None:
    written = write_prompt_router(tmp_path, card, routers(card))
    assert written == replace(card, sha256=file_sha256(tmp_path / CHANGE_FILE))
    found, router = load_prompt_router(tmp_path, SHAPE, BASE)
    assert found == read_prompt_router(tmp_path, SHAPE, BASE) == read_prompt_router(tmp_path) == written
    assert router.form == card.form
    for own, wanted in zip(router.layers, routers(card), strict=True):
        for name in ("w", "w_sa", "a", "b"):
            value, expected = getattr(own, name), getattr(wanted, name)
            assert value is expected is None or torch.equal(value, expected)
    assert {path.name for path in tmp_path.iterdir()} == {CARD_FILE, CHANGE_FILE}


def test_tensors_have_the_papers_names_and_shapes(moa: Path, milora: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(moa / CHANGE_FILE).items()}
    assert shapes == {"layers.0.w": (3, 6), "layers.1.w": (3, 6)}
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(milora / CHANGE_FILE).items()}
    own = {"w_r": (6, 7), "w_sa": (6,), "a": (7,), "b": (5,)}
    assert shapes == {f"layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in own.items()}
    assert json.loads((milora / CARD_FILE).read_text())["targets"] == list(TARGETS)
    assert (read_kind(moa), read_kind(milora)) == ("moa", "milora")


def test_matrices_may_be_stored_in_half_the_bytes_but_not_coefficients(tmp_path: Path) -> None:
    write_prompt_router(tmp_path, MILORA, routers(MILORA), dtype=torch.bfloat16)
    dtypes = {name.split(".")[2]: tensor.dtype for name, tensor in load_file(tmp_path / CHANGE_FILE).items()}
    half, full = torch.bfloat16, torch.float32
    assert dtypes == {"w_r": half, "w_sa": half, "a": full, "b": full}
    _, router = load_prompt_router(tmp_path)
    assert torch.equal(router.layers[1].w, routers(MILORA)[1].w.bfloat16().float())


def test_only_what_is_needed_is_needed(moa: Path) -> None:
    edit(moa, lambda fields: [fields.pop(name) for name in ("name", "training")])
    card = read_prompt_router(moa)
    assert (card.name, card.training) == (None, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "meteora"),
        ("kind", ["moa"]),
        ("version", 2),
        ("version", True),
        ("base", BASE),
        ("base.fingerprint", {"fingerprint": BASE[:16], "name": "tiny"}),
        ("base.name", {"fingerprint": BASE, "name": ""}),
        ("adapters", []),
        ("adapters", [{"name": str(i), "digest": DIGEST} for i in range(63)]),
        ("adapters", [{"name": "plus", "digest": DIGEST}] * 2),
        ("adapters[0].digest", [{"name": "plus", "digest": DIGEST[1:]}]),
        ("experts", "modules"),
        ("experts", None),
        ("targets", list(TARGETS)),
        ("has_null", 1),
        ("layers", 0),
        ("layers", 1025),
        ("layers", "2"),
        ("top_k", 0),
        ("top_k", 4),
        ("top_k", True),
        ("pooling", "median"),
        ("pooling", ["mean"]),
        ("activation", "relu"),
        ("norm", 1),
        ("decision", "first"),
        ("depth", 0),
        ("depth", 3),
        ("depth", 1.0),
        ("sha256", "A" * 64),
        ("name", ""),
        ("training", []),
    ],
)
def test_a_wrong_field_is_named(moa: Path, name: str, value: object) -> None:
    edit(moa, lambda fields: fields.update({name.partition(".")[0].partition("[")[0]: value}))
    escaped = name.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(RouterFolderError, match=rf"^router\.json: field {escaped}: expected "):
        read_prompt_router(moa)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adapters", [{"name": str(i), "digest": DIGEST} for i in range(2)]),
        ("targets", []),
        ("targets", list(reversed(TARGETS))),
        ("has_null", True),
        ("top_k", 8),
        ("decision", "vote"),
        ("depth", 1),
    ],
)
def test_a_field_that_does_not_suit_modules_is_named(milora: Path, name: str, value: object) -> None:
    edit(milora, lambda fields: fields.update({name: value}))
    with pytest.raises(RouterFolderError, match=rf"^router\.json: field {name}: expected "):
        read_prompt_router(milora)


@pytest.mark.parametrize(
    "name", ["version", "base", "adapters", "experts", "targets", "has_null", "layers", "top_k", "pooling", "decision"]
)
def test_a_missing_field_is_named(moa: Path, name: str) -> None:
    edit(moa, lambda fields: fields.pop(name))
    with pytest.raises(RouterFolderError, match=f"field {name}: expected a value, got nothing"):
        read_prompt_router(moa)


def test_an_unknown_field_is_refused(moa: Path) -> None:
    edit(moa, lambda fields: fields.update(trust=True))
    with pytest.raises(RouterFolderError, match="field trust: no such field"):
        read_prompt_router(moa)


def test_other_kinds_say_so(moa: Path) -> None:
    with pytest.raises(RouterFolderError, match=r"^router\.json: field kind: expected 'meteora'"):
        read_gates(moa)


def test_another_base_model_is_said_to_be_one(moa: Path) -> None:
    with pytest.raises(
        RouterFolderError, match=r"field base\.fingerprint: the routers belong to another base model, tiny"
    ):
        read_prompt_router(moa, SHAPE, "f" * 64)


def test_a_missing_or_exchanged_file_is_named(moa: Path) -> None:
    (moa / CHANGE_FILE).rename(moa / "away")
    with pytest.raises(RouterFolderError, match=r"^router\.safetensors: expected a readable file"):
        load_prompt_router(moa)
    save_file({"a": torch.ones(1)}, moa / CHANGE_FILE)
    with pytest.raises(RouterFolderError, match="field sha256"):
        load_prompt_router(moa)


@pytest.mark.parametrize("shape", [SHAPE, None])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.w_r": None}, r"tensor layers\.1\.w_r: expected one for each of 2 layers"),
        ({"layers.0.w_r": None}, r"tensor layers\.0\.w_r: expected one for each of 2 layers"),
        ({"layers.1.b": None}, r"tensor layers\.1\.b: expected one for each of 2 layers"),
        ({"layers.2.w_r": torch.ones(6, 7)}, r"tensor layers\.2\.w_r: the card's router has no such tensor"),
        ({"layers.1.w_r": torch.ones(7, 6)}, r"tensor layers\.1\.w_r: shape \[7, 6\], expected \[6, 7\]"),
        ({"layers.0.w_r": torch.ones(())}, r"tensor layers\.0\.w_r: shape \[\]"),
        ({"layers.0.w_r": torch.ones(0, 7)}, r"tensor layers\.0\.w_r: shape \[0, 7\]"),
        ({"layers.0.w_sa": torch.ones(6, 1)}, r"tensor layers\.0\.w_sa: shape \[6, 1\], expected \[6\]"),
        ({"layers.0.a": torch.ones(6)}, r"tensor layers\.0\.a: shape \[6\], expected \[7\]"),
        ({"layers.0.a": torch.ones(7).double()}, r"tensor layers\.0\.a: F64, expected F32, BF16, F16"),
        ({"layers.1.w_sa": torch.full((6,), torch.nan)}, r"tensor layers\.1\.w_sa: expected finite numbers only"),
        ({"layers.1.w_r": torch.full((6, 7), torch.inf).half()}, r"layers\.1\.w_r: expected finite numbers only"),
    ],
)
def test_tensors_of_another_form_are_refused(
    milora: Path, shape: LinearShape | None, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {**load_file(milora / CHANGE_FILE), **change}
    resave(milora, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    for read in (read_prompt_router, load_prompt_router):
        with pytest.raises(RouterFolderError, match=message):
            read(milora, shape)


def test_a_model_of_other_sizes_is_refused(moa: Path) -> None:
    with pytest.raises(RouterFolderError, match="field layers: expected 3, those of the base model"):
        read_prompt_router(moa, replace(SHAPE, num_layers=3))
    with pytest.raises(RouterFolderError, match=r"shape \[3, 6\], expected \[3, 8\]"):
        read_prompt_router(moa, replace(SHAPE, inputs=dict.fromkeys(TARGETS, 8)))


@pytest.mark.parametrize(("card", "factor"), [(MOA, torch.nan), (replace(MOA, form=replace(MOA.form, top_k=4)), 1.0)])
def test_a_bad_router_does_not_replace_a_good_one(moa: Path, card: PromptCard, factor: float) -> None:
    before = {path.name: path.read_bytes() for path in moa.iterdir()}
    with pytest.raises(RouterFolderError):
        write_prompt_router(moa, card, tuple(LayerRouter(factor * own.w) for own in routers(MOA)))
    assert {path.name: path.read_bytes() for path in moa.iterdir()} == before
    better = write_prompt_router(moa, replace(MOA, name="better"), routers(MOA))
    assert read_prompt_router(moa) == better
    assert {path.name for path in moa.iterdir()} == before.keys()
    assert {path.stat().st_mode & 0o444 for path in moa.iterdir()} == {0o444}


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_are_mistaken_for_routers(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("router")
    write_prompt_router(folder, MOA, routers(MOA))
    (folder / CHANGE_FILE).write_bytes(content)
    edit(folder, lambda fields: fields.update(sha256=file_sha256(folder / CHANGE_FILE)))
    with pytest.raises(RouterFolderError, match=r"^router\.safetensors: "):
        read_prompt_router(folder)


def test_reading_needs_nothing_of_the_server() -> None:
    script = (
        "import sys, routing.prompt_folder\n"
        "print([n for n in ('fastapi', 'pydantic', 'msgspec', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
