"""A dead engine's successor comes at once, or later each time."""

from server.engine.backoff import Backoff


def test_it_doubles_up_to_the_longest_and_begins_again_after_success() -> None:
    backoff = Backoff(0.5, 3.0)
    assert [backoff.after(proven=False) for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.after(proven=True) == 0.0
    assert backoff.after(proven=False) == 0.5
