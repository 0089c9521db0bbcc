"""A study's steps: each runs once, failures stop what needs them, and a call goes on where another was stopped."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from routing.evaluate import study
from routing.evaluate.study import DONE, FAILED, MORE, WRONG, Study, carry_out, main
from routing.evaluate.study_plan import Places
from routing.evaluate.study_steps import Step, StudyError


def python(name: str, code: str, **more: Any) -> Step:
    """A step that runs some lines: `timeit` is the standard library's module that takes them as an argument."""
    return Step(name, "timeit", ("-n1", "-r1", code), **more)


def noting(name: str, log: Path, *needs: str) -> Step:
    return python(name, f"open({str(log)!r}, 'a').write({name!r} + ' ')", needs=frozenset(needs))


class World:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.log = folder / "out", folder / "log"
        self.said: list[str] = []
        self._patch = monkeypatch

    def run(
        self, steps: Sequence[Step], jobs: int = 1, seconds: float | None = None, names: tuple[str, ...] = ()
    ) -> int:
        self._patch.setattr(study, "plan", lambda *_: tuple(steps))
        places = Places(self.out, self.out, self.out)
        return carry_out(Study(places, "cpu", jobs, seconds, names), self.said.append)

    @property
    def ran(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_every_step_runs_once_in_order_and_is_reported(world: World) -> None:
    steps = [noting("a", world.log), noting("b", world.log), noting("c", world.log, "a", "b")]
    assert world.run(steps) == DONE
    assert world.ran == ["a", "b", "c"]
    assert world.run(steps) == DONE
    assert world.ran == ["a", "b", "c"]
    report = json.loads((world.out / "study.json").read_text())
    assert list(report["steps"]) == ["a", "b", "c"]
    assert report["cores"] >= 1
    assert re.search(r"^\| b \| \d+ \| \d+ \|$", (world.out / "study.md").read_text(), re.M)


def test_a_step_that_is_asked_for_otherwise_runs_again(world: World) -> None:
    assert world.run([noting("a", world.log)]) == DONE
    again = python("a", f"open({str(world.log)!r}, 'a').write('other')")
    assert world.run([again]) == DONE
    assert world.ran == ["a", "other"]
    (world.out / "steps" / "a.json").write_text("{")
    assert world.run([again]) == DONE
    assert world.log.read_text() == "a otherother"


def test_a_failure_stops_what_needs_it_and_nothing_else(world: World) -> None:
    rest = [noting("beside", world.log), noting("after", world.log, "bad"), noting("other", world.log, "beside")]
    assert world.run([python("bad", "raise SystemExit(7)"), *rest]) == FAILED
    assert world.ran == ["beside", "other"]
    assert any(line.startswith("failed: bad; see ") for line in world.said)
    assert "SystemExit: 7" in world.said, "the last line of what it said"
    assert not (world.out / "steps" / "bad.json").exists()
    assert world.run([noting("bad", world.log), *rest]) == DONE
    assert world.ran == ["beside", "other", "bad", "after"]


def test_when_the_time_is_up_what_runs_is_stopped_and_a_later_call_goes_on(world: World) -> None:
    long = python("long", "import time; time.sleep(600)")
    assert world.run([long, noting("b", world.log, "long")], seconds=1.0) == MORE
    assert world.ran == []
    assert not (world.out / "steps" / "long.json").exists()
    assert world.run([noting("long", world.log), noting("b", world.log, "long")]) == DONE
    assert world.ran == ["long", "b"]


def test_a_step_begins_when_what_it_needs_is_done_although_others_still_run(world: World) -> None:
    """The one that still runs waits for the file that the other writes."""
    waiting = f"import os, time\nwhile not os.path.exists({str(world.log)!r}): time.sleep(0.05)"
    steps = [python("long", waiting), python("short", "pass"), noting("next", world.log, "short")]
    assert world.run(steps, jobs=2, seconds=120.0) == DONE


def test_steps_run_side_by_side(world: World, tmp_path: Path) -> None:
    """Each waits for the other's file."""

    def meets(name: str, other: str) -> Step:
        own, theirs = (str(tmp_path / f"met-{each}") for each in (name, other))
        waiting = f"while not os.path.exists({theirs!r}): time.sleep(0.05)"
        return python(name, f"import os, time; open({own!r}, 'w')\n{waiting}")

    assert world.run([meets("a", "b"), meets("b", "a")], jobs=2, seconds=120.0) == DONE


def test_steps_side_by_side_share_the_processors(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    step = python("a", f"import os; open({str(world.log)!r}, 'a').write(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert world.run([step], jobs=5) == DONE
    assert world.ran == ["2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert world.run([replace(step, name="b")], jobs=5) == DONE
    assert world.log.read_text() == "27"


def test_only_the_steps_that_are_named_run_with_what_they_need(world: World) -> None:
    steps = [noting(name, world.log, *needs) for name, needs in {"a": "", "b": "a", "c": "a", "d": "bc"}.items()]
    assert world.run(steps, names=("c",)) == DONE
    assert world.ran == ["a", "c"]
    assert world.run(steps, names=("b", "c")) == DONE
    assert list(json.loads((world.out / "study.json").read_text())["steps"]) == ["a", "b", "c"], "earlier ones, too"
    with pytest.raises(StudyError, match="there is no step e, expected some of a, b, c, d"):
        world.run(steps, names=("d", "e"))
    assert world.ran == ["a", "c", "b"]
    assert world.run(steps) == DONE
    assert world.ran == ["a", "c", "b", "d"]


def test_no_time_begins_nothing(world: World) -> None:
    assert world.run([noting("a", world.log)], seconds=0.0) == MORE
    assert world.ran == []


def test_links_are_made_before_the_step_also_in_place_of_older_ones(world: World, tmp_path: Path) -> None:
    link, old, new = tmp_path / "links" / "own", tmp_path / "old", tmp_path / "new"
    new.mkdir()
    link.parent.mkdir()
    link.symlink_to(old)
    (new / "file").write_text("here ")
    code = f"open({str(world.log)!r}, 'a').write(open({str(link / 'file')!r}).read())"
    assert world.run([python("reads", code, links={link: new})]) == DONE
    assert world.ran == ["here"]


def test_tables_of_evaluations_stand_in_the_report(world: World) -> None:
    (world.out / "eval-a").mkdir(parents=True)
    (world.out / "eval-a" / "gates.md").write_text("| method | mean |\n")
    assert world.run([noting("eval-a", world.log)]) == DONE
    assert "## eval-a\n\n| method | mean |\n" in (world.out / "study.md").read_text()


def test_tasks_without_the_groups_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--model", str(tmp_path), "--tasks", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*places, "--scale", "cuda"]) == WRONG
    assert "there is no group 'small'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*places[:-1], str(tmp_path / "file")]) == WRONG
    assert "it is a file, expected a folder" in capsys.readouterr().err
    assert main([*places, "--jobs", "0"]) == WRONG
    assert "jobs 0: expected a whole number of at least 1" in capsys.readouterr().err


def test_a_terminated_study_takes_its_step_with_it(tmp_path: Path) -> None:
    code = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} '); import time; time.sleep(600)"
    driver = f"""
from routing.evaluate import study
from routing.evaluate.study_steps import Step
study.plan = lambda *_: (Step("long", "timeit", ("-n1", "-r1", {code!r})),)
study.run_alone(["--model", "m", "--tasks", "t", "--out", {str(tmp_path / "out")!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", driver], stderr=subprocess.DEVNULL)
    try:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith(" "))
        child = int((tmp_path / "pid").read_text())
        process.terminate()
        assert process.wait(timeout=60) == MORE
    finally:
        process.kill()
    until(lambda: not Path(f"/proc/{child}").exists())


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
