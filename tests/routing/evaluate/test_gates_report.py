"""The report of an evaluation of gates, from results that nobody measured."""

import json
from pathlib import Path
from xml.etree import ElementTree

from routing.evaluate.gate_scores import Lines
from routing.evaluate.gates_report import document, markdown, plots, write_report

METHODS = {"oracle": 1.0, "base": 0.0, "5 rows a task, top 2": 0.5, "50 rows a task, top 2": 1.0, "gates, top 2": 0.75}


def made() -> dict[str, object]:
    lines = Lines(list(METHODS))
    for method, score in METHODS.items():
        own = [
            {"task": task, "row": 0, "score": score, "em": float(score == 1), "wording": wording}
            for wording, task in ((1, "a"), (3, "b"))
        ]
        lines.add("tasks", method, [{**line, "share": 0.5} for line in own] if "top" in method else own)
    for part in ("composite-2", "composite-2, item by item"):
        for method, correct in {"base": 0.0, "gates, top 2, T 1": 1.0, "gates, top 2, T 15": 2.0}.items():
            em = [float(correct > 0), float(correct > 1)]
            lines.add(part, method, [{"tasks": ["a", "b"], "attempts": 2, "correct": correct, "em": em}])
    heated = {f"gates, top 2, T {t:g}": ("gates", t) for t in (15.0, 1.0)}
    curve = [(5, "5 rows a task, top 2"), (50, "50 rows a task, top 2"), (700, "not there yet")]
    return document(lines, curve, heated, ["b"], seed=0)


def test_tables_hold_every_figure() -> None:
    text = markdown(made())
    assert "| oracle | 100.0 | 100.0 to 100.0 |  | 100.0 |  |" in text
    assert "| gates, top 2 | 75.0 | 75.0 to 75.0 | -25.0 (-25.0 to -25.0) | 0.0 | 50.0 |" in text
    assert "| training rows a task | 5 | 50 |\n|---|---|---|\n| mean | 50.0 | 100.0 |" in text
    assert "| method | wording 1 | wording 3 |\n|---|---|---|\n| oracle | 100.0 | 100.0 |" in text
    assert "| method | b | the other tasks |" in text
    assert "| composite-2, item by item | attempts | 95 % interval | correct | 95 % interval | a | b |" in text
    assert "| gates, top 2, T 15 | 2.00 | 2.00 to 2.00 | 2.00 | 2.00 to 2.00 | 100.0 | 100.0 |" in text
    assert "| method | a | b |" in text


def test_plots_are_drawn_over_rows_and_over_temperatures() -> None:
    found = plots(made())
    assert set(found) == {"curve.svg", "composite-2-gates.svg", "composite-2-item-by-item-gates.svg"}
    for text in found.values():
        ElementTree.fromstring(text)
    assert found["composite-2-gates.svg"].index(">1</text>") < found["composite-2-gates.svg"].index(">15</text>")


def test_what_is_not_there_yet_is_left_out(tmp_path: Path) -> None:
    found = document(Lines(), [], {}, ["b"], seed=0)
    write_report(tmp_path, {"device": "cpu", **found})
    assert json.loads((tmp_path / "gates.json").read_text()) == {"device": "cpu", **found}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gates.json", "gates.md"]
