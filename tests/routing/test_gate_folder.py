"""Token-level routers' folders: what is written is read back, and what is damaged is refused with the field's name."""

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

from adapters_store.types import LinearShape
from routing.card_adapters import CardAdapter
from routing.card_file import CARD_FILE, CHANGE_FILE, RouterFolderError, file_sha256, read_kind
from routing.gate_folder import GateCard, load_gates, read_gates, write_gates
from routing.router_folder import RouterCard, read_router, write_router

BASE, DIGEST = "0123456789abcdef" * 4, "ab" * 32
PAIR = (CardAdapter("plus", DIGEST), CardAdapter("spell", "cd" * 32))
TARGETS = ("q_proj", "down_proj")
SHAPE = LinearShape(2, {"q_proj": 6, "down_proj": 10}, {"q_proj": 6, "down_proj": 6})
CARD = GateCard(BASE, "tiny", PAIR, TARGETS, 2, 1.5, True, "", "mine", {"recipe": {"steps": 3}})


def gates(rows: int = 3, layers: int = 2) -> dict[tuple[int, str], Tensor]:
    torch.manual_seed(3)
    return {(layer, target): torch.randn(rows, SHAPE.inputs[target]) for layer in range(layers) for target in TARGETS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_gates(tmp_path / "router", CARD, gates())
    return tmp_path / "router"


def test_card_and_gates_are_read_back(folder: Path) -> None:
    expected = replace(CARD, sha256=file_sha256(folder / CHANGE_FILE))
    assert read_gates(folder) == read_gates(folder, SHAPE, BASE) == expected
    assert expected.rows == 3
    found = load_gates(folder)
    assert list(found) == [(0, "q_proj"), (0, "down_proj"), (1, "q_proj"), (1, "down_proj")]
    assert all(torch.equal(found[module], gate) for module, gate in gates().items())
    assert set(load_file(folder / CHANGE_FILE)) == {
        *(f"model.layers.{layer}.self_attn.q_proj.gate" for layer in (0, 1)),
        *(f"model.layers.{layer}.mlp.down_proj.gate" for layer in (0, 1)),
    }
    assert {path.name for path in folder.iterdir()} == {CARD_FILE, CHANGE_FILE}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_may_be_stored_in_half_the_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    write_gates(tmp_path, CARD, gates(), dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / CHANGE_FILE).values()} == {dtype}
    found = load_gates(tmp_path)
    assert all(torch.equal(found[module], gate.to(dtype).float()) for module, gate in gates().items())


def test_without_a_null_row_the_gates_have_one_row_less(tmp_path: Path) -> None:
    card = write_gates(tmp_path, replace(CARD, has_null=False), gates(rows=2))
    assert card.rows == 2
    assert read_gates(tmp_path, SHAPE) == card


def test_only_what_is_needed_is_needed(folder: Path) -> None:
    edit(folder, lambda fields: [fields.pop(name) for name in ("name", "training")])
    card = read_gates(folder)
    assert (card.name, card.training) == (None, {})


def test_the_kind_tells_folders_apart(folder: Path, tmp_path: Path) -> None:
    write_router(tmp_path / "other", RouterCard("0" * 16, "tiny", "head", "", 4, ""), {"head": torch.eye(4)})
    assert (read_kind(folder), read_kind(tmp_path / "other")) == ("meteora", "retriever")
    with pytest.raises(RouterFolderError, match=r"^router\.json: field kind: expected 'meteora'"):
        read_gates(tmp_path / "other")
    with pytest.raises(RouterFolderError, match=r"^router\.json: field kind: expected 'retriever'$"):
        read_router(folder)
    with pytest.raises(RouterFolderError, match=r"^router\.json: expected a readable file"):
        read_kind(tmp_path)
    edit(folder, lambda fields: fields.update(kind=7))
    with pytest.raises(RouterFolderError, match="field kind: expected a text"):
        read_kind(folder)
    edit(folder, lambda fields: fields.pop("kind"))
    with pytest.raises(RouterFolderError, match="field kind: expected a value, got nothing"):
        read_kind(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "retriever"),
        ("version", 2),
        ("version", True),
        ("base", BASE),
        ("base", {"fingerprint": BASE}),
        ("base.fingerprint", {"fingerprint": BASE[:16], "name": "tiny"}),
        ("base.name", {"fingerprint": BASE, "name": ""}),
        ("adapters", []),
        ("adapters", [{"name": str(i), "digest": DIGEST} for i in range(63)]),
        ("adapters", [{"name": "plus", "digest": DIGEST}] * 2),
        ("adapters[1]", [{"name": "plus", "digest": DIGEST}, "spell"]),
        ("adapters[0].name", [{"name": "x" * 129, "digest": DIGEST}]),
        ("adapters[0].digest", [{"name": "plus", "digest": DIGEST[1:]}]),
        ("targets", []),
        ("targets", "q_proj"),
        ("targets", ["lm_head"]),
        ("targets", [["q_proj"]]),
        ("targets", ["q_proj", "q_proj"]),
        ("top_k", 0),
        ("top_k", 4),
        ("top_k", True),
        ("top_k", 2.0),
        ("temperature", 0),
        ("temperature", True),
        ("temperature", 10**400),
        ("temperature", "warm"),
        ("has_null", 1),
        ("sha256", "A" * 64),
        ("name", ""),
        ("training", []),
    ],
)
def test_a_wrong_field_is_named(folder: Path, name: str, value: object) -> None:
    edit(folder, lambda fields: fields.update({name.partition(".")[0].partition("[")[0]: value}))
    escaped = name.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(RouterFolderError, match=rf"^router\.json: field {escaped}: expected "):
        read_gates(folder)


@pytest.mark.parametrize("name", ["version", "base", "adapters", "targets", "top_k", "temperature", "has_null"])
def test_a_missing_field_is_named(folder: Path, name: str) -> None:
    edit(folder, lambda fields: fields.pop(name))
    with pytest.raises(RouterFolderError, match=f"field {name}: expected a value, got nothing"):
        read_gates(folder)


def test_an_infinite_temperature_and_an_unknown_field_are_refused(folder: Path) -> None:
    text = (folder / CARD_FILE).read_text()
    (folder / CARD_FILE).write_text(text.replace("1.5", "1e999"))
    with pytest.raises(RouterFolderError, match="field temperature: expected a number above 0"):
        read_gates(folder)
    (folder / CARD_FILE).write_text(text)
    edit(folder, lambda fields: fields.update(trust=True))
    with pytest.raises(RouterFolderError, match="field trust: no such field"):
        read_gates(folder)


def test_another_base_model_is_said_to_be_one(folder: Path) -> None:
    with pytest.raises(
        RouterFolderError, match=r"field base\.fingerprint: the gates belong to another base model, tiny"
    ):
        read_gates(folder, SHAPE, "f" * 64)


def test_a_missing_or_exchanged_file_is_named(folder: Path) -> None:
    (folder / CHANGE_FILE).rename(folder / "away")
    with pytest.raises(RouterFolderError, match=r"^router\.safetensors: expected a readable file"):
        load_gates(folder)
    save_file({"a": torch.ones(1)}, folder / CHANGE_FILE)
    with pytest.raises(RouterFolderError, match="field sha256"):
        load_gates(folder)


Q0 = "model.layers.0.self_attn.q_proj.gate"
Q1 = "model.layers.1.self_attn.q_proj.gate"


@pytest.mark.parametrize("shape", [SHAPE, None])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q1: None}, rf"tensor {Q1}: expected one for each of 2 layers"),
        ({"head": torch.ones(1)}, r"router\.safetensors: tensor "),
        ({"model.layers.01.mlp.down_proj.gate": torch.ones(3, 10)}, r"router\.safetensors: tensor "),
        ({Q0: torch.ones(2, 6)}, rf"tensor {Q0}: shape \[2, 6\], expected \[3, 6\]"),
        ({Q1: torch.ones(3, 7)}, rf"tensor {Q1}: shape \[3, 7\], expected \[3, 6\]"),
        ({Q0: torch.ones(())}, rf"tensor {Q0}: shape \[\]"),
        ({Q0: torch.ones(3, 0)}, rf"tensor {Q0}: shape \[3, 0\]"),
        ({Q0: torch.ones(3, 6).double()}, rf"tensor {Q0}: F64, expected F32, BF16, F16"),
        ({Q0: torch.full((3, 6), torch.nan)}, rf"tensor {Q0}: expected finite numbers only"),
        ({Q1: torch.full((3, 6), -torch.inf).half()}, rf"tensor {Q1}: expected finite numbers only"),
    ],
)
def test_tensors_of_another_form_are_refused(
    folder: Path, shape: LinearShape | None, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {**load_file(folder / CHANGE_FILE), **change}
    resave(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(RouterFolderError, match=message):
        read_gates(folder, shape)


def test_a_model_of_other_sizes_is_refused(folder: Path) -> None:
    with pytest.raises(RouterFolderError, match=r"tensor model\.layers\.2\.self_attn\.q_proj\.gate"):
        read_gates(folder, replace(SHAPE, num_layers=3))
    with pytest.raises(RouterFolderError, match="no such gate in 1 layers"):
        read_gates(folder, replace(SHAPE, num_layers=1))
    with pytest.raises(RouterFolderError, match=r"shape \[3, 6\], expected \[3, 8\]"):
        read_gates(folder, replace(SHAPE, inputs={"q_proj": 8, "down_proj": 10}))


def test_linears_that_share_an_input_have_gates_of_one_width(tmp_path: Path) -> None:
    found = {(0, "q_proj"): torch.ones(3, 6), (0, "k_proj"): torch.ones(3, 8)}
    with pytest.raises(RouterFolderError, match=r"k_proj\.gate: shape \[3, 8\], expected \[3, 6\]"):
        write_gates(tmp_path, replace(CARD, targets=("q_proj", "k_proj")), found)


@pytest.mark.parametrize(
    ("card", "change"),
    [
        (CARD, {(1, "q_proj"): torch.full((3, 6), torch.nan)}),
        (CARD, {(1, "q_proj"): torch.ones(2, 6)}),
        (replace(CARD, temperature=0.0), {}),
    ],
)
def test_a_bad_router_does_not_replace_a_good_one(
    folder: Path, card: GateCard, change: dict[tuple[int, str], Tensor]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RouterFolderError):
        write_gates(folder, card, {**gates(), **change})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    better = write_gates(folder, replace(CARD, top_k=1), {module: 2 * gate for module, gate in gates().items()})
    assert read_gates(folder) == better
    assert better.top_k == 1
    assert {path.name for path in folder.iterdir()} == before.keys()
    assert {path.stat().st_mode & 0o444 for path in folder.iterdir()} == {0o444}


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_are_mistaken_for_gates(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("router")
    write_gates(folder, CARD, gates())
    (folder / CHANGE_FILE).write_bytes(content)
    edit(folder, lambda fields: fields.update(sha256=file_sha256(folder / CHANGE_FILE)))
    with pytest.raises(RouterFolderError, match=r"^router\.safetensors: "):
        read_gates(folder)


def test_reading_needs_nothing_of_the_server() -> None:
    script = (
        "import sys, routing.gate_folder\n"
        "print([n for n in ('fastapi', 'pydantic', 'msgspec', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
