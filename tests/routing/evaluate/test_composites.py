"""Answers to composite prompts: cut into their items, counted and scored."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.evaluate.composites import Composite, judge, read_composites, split_answer
from routing.train.data import TaskDataError

LINES = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), max_size=30)
COMPOSITE = Composite(0, "?", ("plural", "lists", "text"), (("cats",), ("a, b",), ("the black cat", "a cat")))
METRICS = {"plural": "em", "lists": "em_set", "text": "rougeL"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1. cats\n2. b, a\n3. a cat", ("cats", "b, a", "a cat")),
        ("1) cats\n 3. a cat.", ("cats", "", "a cat.")),
        ("1.\n2. \n3.x", ("", "", "")),
        ("Answers:\n1. cats\nand dogs\n2. 2. b", ("cats", "2. b", "")),
        ("1. cats\n2. b\n3. c\n\nExample 4:\n1. dogs\n2. e", ("cats", "b", "c")),
        ("cats", ("", "", "")),
        ("3.5 is a number\n1. x", ("x", "", "")),
        ("", ("", "", "")),
    ],
)
def test_an_item_begins_and_ends_with_its_line(text: str, parts: tuple[str, ...]) -> None:
    assert split_answer(text, 3) == parts


@given(st.lists(LINES, min_size=1, max_size=12), st.data())
def test_a_numbered_list_is_read_back(texts: list[str], data: st.DataObject) -> None:
    """In whatever order, with items left out, and with whatever a model goes on to say."""
    kept = data.draw(st.permutations(range(len(texts)))) if data.draw(st.booleans()) else range(len(texts))
    left_out = data.draw(st.sets(st.sampled_from(range(len(texts)))))
    lines = [f"{place + 1}. {texts[place]}" for place in kept if place not in left_out]
    invented = [f"{place + 1}. invented" for place in range(len(texts)) if place not in left_out]
    expected = tuple("" if place in left_out else text.strip() for place, text in enumerate(texts))
    assert split_answer("\n".join(lines), len(texts)) == expected
    assert split_answer("\n".join([*lines, "", *invented]), len(texts)) == expected


@given(st.text(), st.integers(1, 12))
def test_any_text_gives_as_many_parts_of_one_line_as_asked_for(text: str, count: int) -> None:
    parts = split_answer(text, count)
    assert len(parts) == count
    assert all(len(part.splitlines()) <= 1 and part == part.strip() for part in parts)


def test_attempts_and_right_answers_are_counted() -> None:
    found = judge(COMPOSITE, "1. Cats.\n2. b, a\n3. the cat", METRICS)
    assert (found.attempts, found.correct) == (3, 1.0)
    assert found.scores[:2] == (1.0, 1.0)
    assert found.scores[2] == pytest.approx(0.8)  # two of three words of one reference, one of two of the other
    assert found.exact == (1.0, 0.0, 0.0)
    none = judge(COMPOSITE, "cats", METRICS)
    assert (none.attempts, none.correct, none.scores) == (0, 0.0, (0.0, 0.0, 0.0))


def write(root: Path, count: int, *lines: object) -> None:
    (root / "composite").mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "composite" / f"composite_{count}.jsonl").write_text(text)


def test_prompts_are_read_whose_tasks_are_there(tmp_path: Path) -> None:
    line = {"prompt": "Both?", "tasks": ["a", "b"], "targets": ["x", "y"], "references": [["x", "z"], ["y"]]}
    write(tmp_path, 2, line, {**line, "references": None})
    write(tmp_path, 3, {"prompt": "All?", "tasks": ["a", "b", "c"], "targets": ["x", "y", "z"]})
    found = read_composites(tmp_path, ["a", "b"])
    assert list(found) == [2]
    assert found[2][0] == Composite(0, "Both?", ("a", "b"), (("x", "z"), ("y",)))
    assert found[2][1].references == (("x",), ("y",))
    assert [len(own) for own in read_composites(tmp_path, ["a", "b", "c"], rows=1).values()] == [1, 1]
    assert read_composites(tmp_path / "none", ["a"]) == {}


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "?", "tasks": ["a", "b"], "targets": ["x"]},
        {"prompt": "?", "tasks": ["a"], "targets": ["x"]},
        {"prompt": 1, "tasks": ["a", "b"], "targets": ["x", "y"]},
        {"tasks": ["a", "b"], "targets": ["x", "y"]},
        [],
    ],
)
def test_a_malformed_prompt_is_named(line: object, tmp_path: Path) -> None:
    write(tmp_path, 2, {"prompt": "?", "tasks": ["a", "b"], "targets": ["x", "y"]}, line)
    with pytest.raises(TaskDataError, match=r"composite_2\.jsonl, line 2: expected"):
        read_composites(tmp_path, ["a", "b"])
