"""Requests whose front end is gone."""

from deploy.ray_serve.callers import PATIENCE_SECONDS, Callers


async def test_requests_of_a_silent_front_end_are_ended_and_no_others() -> None:
    now, aborted = [0.0], []
    callers = Callers(lambda: now[0], aborted.append)
    with callers.serving("a", "a1"), callers.serving("a", "a2"), callers.serving("b", "b1"):
        with callers.serving("a", "a3"):
            pass
        now[0] = PATIENCE_SECONDS - 1
        callers.heard("b")
        await callers.look()
        assert aborted == []
        now[0] = PATIENCE_SECONDS + 1
        await callers.look()
        await callers.look()
        assert sorted(aborted) == ["a1", "a2"]
        with callers.serving("a", "a4"):  # it was slow only
            await callers.look()
    assert sorted(aborted) == ["a1", "a2"]
    assert not callers._requests
