"""Patterns and targets mean what they mean to PEFT."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapters_store.linear_names import module_path
from adapters_store.patterns import PatternBudget
from adapters_store.peft_config import LoraSettings, read_settings
from adapters_store.types import TARGETS, AdapterError

MODULES = [module_path(layer, target) for layer in (0, 1, 10, 11) for target in TARGETS]
PARTS = st.sampled_from(
    [
        "q_proj",
        "proj",
        "mlp",
        "self_attn",
        "layers",
        "1",
        "10",
        "model",
        r".*",
        r"\d+",
        r"1\d?",
        "(q|k)_proj",
        "[a-z_]+",
        "",
        "x",
    ]
)
PATTERNS = st.lists(PARTS, min_size=1, max_size=4).map(r"\.".join) | st.lists(PARTS, min_size=1, max_size=3).map(
    ".".join
)
COMMON = st.sampled_from(
    [r".*_proj", r".*\.1\d?\..*", ["q_proj", "mlp.up_proj"], ["o_proj", *MODULES[:9]], list(TARGETS)]
)
NAMES = st.none() | COMMON | COMMON | PATTERNS | st.lists(PATTERNS | st.sampled_from(MODULES), max_size=3)


def parsed(folder: Path, **fields: Any) -> LoraSettings:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | fields))
    return read_settings(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(PATTERNS, st.integers(0, 64), max_size=4),
)
def test_patterns_like_peft(folder: Path, ranks: dict[str, int], alphas: dict[str, int]) -> None:
    ours = parsed(folder, rank_pattern=ranks, alpha_pattern=alphas)
    for module in MODULES:
        assert ours.of(module).rank == ranks.get(get_pattern_key(ranks.keys(), module), 4)
        assert ours.of(module).alpha == alphas.get(get_pattern_key(alphas.keys(), module), 8)


@settings(max_examples=200, deadline=None)
@given(
    targets=NAMES.filter(lambda names: names is not None),
    excluded=NAMES,
    layers=st.none() | st.integers(0, 11) | st.lists(st.integers(0, 11), max_size=3),
    layers_pattern=st.none()
    | st.sampled_from(["layers", r"lay\w+", "h", ""])
    | st.lists(st.sampled_from(["h", "layers"])),
)
def test_targets_like_peft(folder: Path, targets: Any, excluded: Any, layers: Any, layers_pattern: Any) -> None:
    if isinstance(targets, str):  # PEFT refuses to combine these
        layers = layers_pattern = None
    ours = parsed(
        folder,
        target_modules=targets,
        exclude_modules=excluded,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
    )
    theirs = SimpleNamespace(
        target_modules=targets,
        exclude_modules=excluded,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
        modules_to_save=None,
    )
    for module in MODULES:
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module))


@pytest.mark.parametrize(
    "key", ["self.attn.q.proj", "elf_attn.q_proj", "attn.q_proj", "0.self_attn.q_proj", ".q_proj", "q_proj."]
)
def test_plain_names_are_expressions_to_peft_too(folder: Path, key: str) -> None:
    """A dot stands for any character, as in PEFT."""
    for module in MODULES:
        assert parsed(folder, rank_pattern={key: 9}).of(module).rank == {key: 9}.get(get_pattern_key([key], module), 4)


@settings(max_examples=100, deadline=None)
@given(
    keys=st.lists(
        st.sampled_from([*MODULES, "q_proj", "mlp.up_proj", "self_attn.q_proj", "1.mlp.up_proj", "self.attn.q_proj"])
        | PATTERNS,
        unique=True,
        max_size=12,
    )
)
def test_the_first_of_names_and_expressions_decides(folder: Path, keys: list[str]) -> None:
    ranks = {key: number for number, key in enumerate(keys, 10)}
    ours = parsed(folder, rank_pattern=ranks)
    for module in MODULES:
        assert ours.of(module).rank == ranks.get(get_pattern_key(ranks.keys(), module), 4)


def test_a_budget_that_is_spent() -> None:
    """Not even a pattern that matches at once is tried any more, nor compiled."""
    budget = PatternBudget(0.0)
    with pytest.raises(AdapterError, match="rank_pattern holds 'a': expected patterns that match quickly"):
        budget.compile("rank_pattern", "a")
    budget = PatternBudget()
    expression = budget.compile("rank_pattern", "a")
    assert budget.seconds < PatternBudget().seconds, "compilation counts"
    before = budget.seconds
    assert expression.fullmatch("a")
    assert budget.seconds < before
    budget.seconds = -1e-9
    with pytest.raises(AdapterError, match="match quickly"):
        expression.fullmatch("a")


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR"])
def test_all_linear(folder: Path, spelling: str) -> None:
    assert all(map(parsed(folder, target_modules=spelling).targets, MODULES))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 16), (True, 12 / 4), (None, 12 / 16)])
def test_scale(folder: Path, rslora: bool | None, scale: float) -> None:
    assert parsed(folder, r=16, lora_alpha=12, use_rslora=rslora).of(MODULES[0]).scale == scale
