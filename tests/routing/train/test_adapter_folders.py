"""Adapters are found by the names of tasks, and no folder among them is overlooked."""

from pathlib import Path

import pytest

from routing.train.adapter import TrainError
from routing.train.adapter_folders import adapter_folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("spell", "plus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes.txt").write_text("")
    return tmp_path


def test_folders_come_in_the_order_of_the_tasks(root: Path) -> None:
    found = adapter_folders(root, ["plus", "spell"])
    assert list(found.items()) == [("plus", root / "plus"), ("spell", root / "spell")]
    assert adapter_folders(root, ["spell", "other", "plus"], null=True).keys() == {"plus", "spell"}
    assert adapter_folders(root, ["spell"], narrowed=True) == {"spell": root / "spell"}


def test_a_task_without_an_adapter_is_told_where_it_was_expected(root: Path) -> None:
    with pytest.raises(TrainError, match=rf"^task other: it has no adapter, expected the folder {root}/other, or --nu"):
        adapter_folders(root, ["other", "plus", "spell"])


@pytest.mark.parametrize("null", [False, True])
def test_an_adapter_without_a_task_is_named(root: Path, null: bool) -> None:
    with pytest.raises(TrainError, match=rf"^{root}/spell: there is no task of this name, expected one of plus, spel$"):
        adapter_folders(root, ["plus", "spel"], null=null)


def test_what_is_no_folder_of_adapters_is_refused(root: Path) -> None:
    with pytest.raises(TrainError, match=rf"^{root}/nowhere: expected a folder of adapter folders"):
        adapter_folders(root / "nowhere", ["plus"])
    with pytest.raises(TrainError, match=rf"^{root}/notes.txt: expected a folder of adapter folders"):
        adapter_folders(root / "notes.txt", ["plus"])
    with pytest.raises(TrainError, match=rf"^{root}/plus: it is an adapter itself, expected the folder of all"):
        adapter_folders(root / "plus", ["plus"])
