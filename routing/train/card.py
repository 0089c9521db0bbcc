"""The card of a trained adapter: `card.json` for programs and `README.md` for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from routing.train.data import TaskRow

SHOWN_ROWS = 3
SAMPLE_ROWS = 20
"""Prompts by which a router finds the adapter: as many as LoraRetriever's published configuration takes."""


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """What a reader needs to judge an adapter. Accuracies are shares of exactly matched held-out rows."""

    task: str
    cluster: str
    base_model: str
    recipe: dict[str, Any]
    train_rows: int
    test_rows: int
    accuracy_before: float
    accuracy_after: float
    final_loss: float
    examples: tuple[dict[str, str], ...]


def shown_examples(
    rows: Sequence[TaskRow], before: Sequence[str], after: Sequence[str], count: int = SHOWN_ROWS
) -> tuple[dict[str, str], ...]:
    """The first `count` held-out rows with both answers."""
    shown = list(zip(rows, before, after, strict=True))[:count]
    return tuple({"prompt": row.prompt, "target": row.target, "base": b, "adapter": a} for row, b, a in shown)


def write_card(folder: Path, card: AdapterCard) -> None:
    """Writes both forms into the adapter's folder."""
    text = json.dumps(asdict(card), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "card.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_markdown(card), encoding="utf-8")


def write_samples(folder: Path, rows: Sequence[TaskRow], count: int = SAMPLE_ROWS) -> None:
    """Writes the first `count` prompts into the adapter's folder, where the server looks for them."""
    text = json.dumps([row.prompt for row in rows[:count]], indent=1, ensure_ascii=False)
    (folder / "samples.json").write_text(text + "\n", encoding="utf-8")


def _markdown(card: AdapterCard) -> str:
    recipe = card.recipe
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {card.base_model}",
        "tags: [lora]",
        "---",
        f"# {card.task}",
        "",
        f"A rank-{recipe['rank']} LoRA of {card.base_model} for the task `{card.task}` ({card.cluster}).",
        "",
        "| exact match on held-out rows | base | with this adapter |",
        "|---|---|---|",
        f"| {card.test_rows} rows | {card.accuracy_before:.1%} | {card.accuracy_after:.1%} |",
        "",
        f"Recipe: {card.train_rows} training rows, {recipe['steps']} steps of {recipe['batch_size']} rows, "
        f"AdamW, peak learning rate {recipe['learning_rate']:g} after {recipe['warmup_steps']} warm-up steps, then "
        f"linear decay, alpha {recipe['alpha']}, targets {', '.join(recipe['targets'])}, loss on the answer only, "
        f"seed {recipe['seed']}; final training loss {card.final_loss:.4f}. Weights are stored in bf16, and the "
        "accuracy is that of the stored weights.",
        "",
        "Held-out examples:",
        "",
    ]
    for example in card.examples:
        for key in ("prompt", "target", "base", "adapter"):
            lines += [f"- {key}: `{_one_line(example[key])}`"]
        lines += [""]
    return "\n".join(lines)


def _one_line(text: str, longest: int = 160) -> str:
    line = text.replace("\n", " / ").replace("`", "'")
    return line if len(line) <= longest else line[: longest - 3] + "..."
