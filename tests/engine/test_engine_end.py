"""What is said of an engine's process that has ended."""

import pytest

from server.engine.engine_process import how_it_ended


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "ended with code 1"),
        (None, "ended with code None"),
        (-6, "was ended by signal 6 (Aborted)"),
        (-9, "was ended by signal 9 (Killed), perhaps by the system because memory ran out,"),
    ],
)
def test_a_signal_has_its_name_and_the_usual_cause(code: int | None, said: str) -> None:
    assert how_it_ended(code) == said
