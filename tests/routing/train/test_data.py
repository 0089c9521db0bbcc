import json
from pathlib import Path

import pytest

from routing.train.data import Task, TaskDataError, TaskRow, read_rows, read_task, read_tasks, write_task

ROW = {"task": "echo", "cluster": "c", "instruction": "Repeat.", "input": "é 1", "target": "é 1", "template": 0}


def row(text: str) -> TaskRow:
    return TaskRow("echo", "c", "Repeat.", text, text, 0)


def test_written_tasks_are_read_back(tmp_path: Path) -> None:
    task = Task("echo", (row("a"), row("line\u2028separator \U0001f642")), (row("b"),), (row("c"),))
    assert write_task(tmp_path, task) == tmp_path / "echo"
    assert read_task(tmp_path / "echo") == task
    assert read_tasks(tmp_path) == [task]


def test_the_row_of_the_readme_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith('{"task"'))
    (tmp_path / "train.jsonl").write_text(line)
    (shown,) = read_rows(tmp_path / "train.jsonl")
    assert shown.prompt == "Spell this word.\nsun"


def test_prompt_is_instruction_line_input() -> None:
    assert row("x").prompt == "Repeat.\nx"
    assert row("").prompt == "Repeat."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one row"),
        ("\n\n", "expected at least one row"),
        ("{", r"line 1: expected a JSON object \("),
        ("[1]", "line 1: expected a JSON object, got list"),
        (json.dumps(ROW) + "\n{}", "line 2: field task: expected str, got nothing"),
        (json.dumps(ROW | {"target": 3}), "line 1: field target: expected str, got 3"),
        (json.dumps(ROW | {"target": " "}), "line 1: field target: expected text, got an empty string"),
        (json.dumps(ROW | {"template": True}), "field template: expected int, got true"),
        (json.dumps(ROW | {"input": None}), "field input: expected str, got null"),
    ],
)
def test_malformed_rows_name_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(TaskDataError, match=message):
        read_rows(tmp_path / "train.jsonl")


def test_missing_folder_split_and_leaked_row(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match="no such task folder"):
        read_task(tmp_path / "none")
    with pytest.raises(TaskDataError, match="expected folders <task>"):
        read_tasks(tmp_path)
    folder = write_task(tmp_path, Task("echo", (row("a"),), (row("b"),), (row("c"), row("a"))))
    with pytest.raises(TaskDataError, match=r"test\.jsonl, line 2: input is also a training row's"):
        read_task(folder)
    (folder / "test.jsonl").unlink()
    with pytest.raises(TaskDataError, match=r"test\.jsonl: expected a readable UTF-8 file"):
        read_task(folder)
