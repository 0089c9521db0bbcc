"""EleutherAI's evaluation harness over a real socket: the scores that it computes with transformers and peft itself."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval and what it needs are 400 MB: make test-lm-eval"
    ),
]
ADAPTER = "spell"
ADAPTERS = Path(__file__).parents[2] / "deploy" / "demo" / "adapters"
CAPITALS = {
    "France": "Paris",
    "Austria": "Vienna",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Nepal": "Kathmandu",
}
TEXTS = ["The quick brown fox jumps over the lazy dog, naïve as it is.", "漢字 and others: Größe, café, 😀."]
WORDS = ["lighthouse", "stone"]
METRICS = {
    "capitals": ["acc,none", "acc_norm,none"],
    "texts": ["word_perplexity,none", "byte_perplexity,none"],
    "words": ["exact_match,none"],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind: choices (log-likelihoods), texts (rolling ones) and words (generation)."""
    folder = tmp_path_factory.mktemp("tasks")
    cities = list(CAPITALS.values())
    write(
        folder,
        "capitals",
        [
            {"country": country, "choices": [cities[(index + step) % len(cities)] for step in (0, 2, 3)], "gold": 0}
            for index, country in enumerate(CAPITALS)
        ],
        output_type="multiple_choice",
        doc_to_text="The capital of {{country}} is",
        doc_to_choice="choices",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    write(
        folder,
        "texts",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    )
    write(
        folder,
        "words",
        [{"word": word, "spelled": "-".join(word.upper())} for word in WORDS],
        output_type="generate_until",
        doc_to_text="Spell this word.\n{{word}}",
        doc_to_target="spelled",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0},
        metric_list=[{"metric": "exact_match"}],
    )
    return folder


def write(folder: Path, name: str, items: list[dict[str, Any]], **task: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(item)}\n" for item in items))
    head = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    # JSON is YAML
    (folder / f"{name}.yaml").write_text(json.dumps({**head, "test_split": "test", **task}))


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--adapters", str(ADAPTERS), "--max-model-len", "1024", "--page-memory", "64MiB")
    served = Served(smollm2, tmp_path_factory.mktemp("data"), *options)
    yield served
    assert served.stop() == 0


def test_scores_equal_those_of_transformers_and_peft(
    served: Served, smollm2: Path, tasks: Path, tmp_path: Path
) -> None:
    """The base model and an adapter, through completions and through chat, greedily."""
    names = {"base": smollm2.name, "adapter": ADAPTER}
    runs = []
    for kind, model in names.items():
        local = {"pretrained": str(smollm2), "dtype": "float32", "device": "cpu", "batch_size": 1}
        local |= {"peft": str(ADAPTERS / ADAPTER)} if kind == "adapter" else {}
        here = {"model": model, "tokenizer": str(smollm2), "num_concurrent": 3}
        completions = here | {"base_url": f"{served.base_url}/completions"}
        chat = here | {"base_url": f"{served.base_url}/chat/completions"}
        runs += [
            asked(f"{kind} text", "local-completions", completions, ["capitals", "texts", "words"]),
            asked(f"{kind} text expected", "hf", local, ["capitals", "texts", "words"]),
            asked(f"{kind} chat", "local-chat-completions", chat, ["words"], chat=True),
            asked(f"{kind} chat expected", "hf", local, ["words"], chat=True),
        ]
    found = evaluated(runs, tasks, tmp_path)
    for kind in names:
        for way in ("text", "chat"):
            equal(found[f"{kind} {way}"], found[f"{kind} {way} expected"])
    spelled = {kind: found[f"{kind} chat"]["metrics"]["words"]["exact_match,none"] for kind in names}
    assert spelled["adapter"] > spelled["base"] == 0, "the adapter has learned to spell"
    assert found["base text"]["metrics"]["capitals"]["acc,none"] > 0.5
    assert found["base text"]["said"]["capitals"] != found["adapter text"]["said"]["capitals"]


def asked(name: str, model: str, arguments: dict[str, Any], tasks: list[str], *, chat: bool = False) -> dict[str, Any]:
    return {"name": name, "model": model, "arguments": arguments, "tasks": tasks, "metrics": METRICS, "chat": chat}


def evaluated(runs: list[dict[str, Any]], tasks: Path, folder: Path) -> dict[str, Any]:
    """What the harness finds, without any network but this machine's own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder)}
    out = folder / "found.json"
    script = Path(__file__).with_name("lm_eval_runs.py")
    given = json.dumps({"folder": str(tasks), "runs": runs, "out": str(out)})
    subprocess.run(
        [sys.executable, "-P", str(script)], input=given, text=True, check=True, env=environment, capture_output=True
    )
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def equal(found: Any, expected: Any) -> None:
    """Texts and decisions are the same, numbers as close as two implementations in fp32 are."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            equal(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            equal(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3, rel=1e-4)
    else:
        assert found == expected
