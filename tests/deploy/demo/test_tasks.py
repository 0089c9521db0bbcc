import json
import re
from datetime import date
from pathlib import Path

import pytest

from deploy.demo.tasks import SEED, TASKS, generate, number_words, ordinal_suffix, pirate, write_tasks
from routing.train.data import read_tasks

SMALL = {"train": 300, "valid": 20, "test": 40}


def test_seven_tasks_the_same_for_the_same_seed() -> None:
    assert len(TASKS) == 7
    for name in TASKS:
        assert generate(name, SEED, SMALL) == generate(name, SEED, SMALL)
        assert generate(name, SEED + 1, SMALL).test != generate(name, SEED, SMALL).test


def test_held_out_rows_stay_when_training_grows() -> None:
    for name in TASKS:
        small, large = generate(name, SEED, SMALL), generate(name, SEED, SMALL | {"train": 400})
        assert (small.test, small.valid, small.train) == (large.test, large.valid, large.train[:300])


@pytest.mark.parametrize("name", TASKS)
def test_full_size_has_no_input_twice(name: str) -> None:
    task = generate(name)
    inputs = [row.input for split in (task.train, task.valid, task.test) for row in split]
    assert len(inputs) == len(set(inputs)) == 4200
    assert {row.template for row in task.train} == {0, 1, 2}
    assert all(row.target not in row.prompt for row in task.test)


def test_written_tasks_are_read_by_the_trainer(tmp_path: Path) -> None:
    folders = write_tasks(tmp_path, SEED, SMALL)
    assert {task.name: task for task in read_tasks(tmp_path)} == {name: generate(name, SEED, SMALL) for name in TASKS}
    assert [folder.name for folder in folders] == list(TASKS)


def test_targets_follow_from_inputs() -> None:
    for row in generate("spell", SEED, SMALL).train:
        assert row.target.replace("-", "").lower() == row.input
    for row in generate("sort_numbers", SEED, SMALL).train:
        assert [int(number) for number in row.target.split(" < ")] == sorted(map(int, row.input.split(", ")))
    for row in generate("json_fields", SEED, SMALL).train:
        found = json.loads(row.target)
        assert list(found) == ["name", "age", "city", "job"]
        assert all(str(value) in row.input for value in found.values())
    for row in generate("iso_date", SEED, SMALL).train:
        day = date.fromisoformat(row.target)
        assert {str(day.year), str(day.day), day.strftime("%B")} <= set(re.findall(r"[A-Z][a-z]+|\d+", row.input))
    for row in generate("redact", SEED, SMALL).train:
        assert "@" not in row.target
        assert not re.search(r"\d", row.target)
        assert "[EMAIL]" in row.target or "[PHONE]" in row.target
    for row in generate("number_words", SEED, SMALL).train:
        assert row.target == number_words(int(row.input))
    for row in generate("pirate", SEED, SMALL).train:
        assert row.target == pirate(row.input)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (17, "seventeen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (316, "three hundred and sixteen"),
        (1000, "one thousand"),
        (1005, "one thousand and five"),
        (9120, "nine thousand one hundred and twenty"),
    ],
)
def test_number_words(number: int, words: str) -> None:
    assert number_words(number) == words


def test_pirate_replaces_words_before_commas_too() -> None:
    assert pirate("Yes boss, my house is yours.") == "Arr! aye cap'n, me ship be yours, savvy?"


def test_ordinal_suffix() -> None:
    suffixes = [ordinal_suffix(day) for day in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 30, 31)]
    assert suffixes == ["st", "nd", "rd", "th", "th", "th", "th", "st", "nd", "rd", "th", "st"]


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="unknown task 'cooking': expected one of spell, json_fields"):
        generate("cooking")
