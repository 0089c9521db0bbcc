"""Several engines as one: where requests go, and what becomes of them when an engine dies."""

import asyncio
from dataclasses import replace

import pytest
from polling import until
from scripted_pool import PARAMS, Engines

from server.engine.adapter_calls import EngineUnavailable
from server.engine.config import EngineConfig, EngineStats
from server.engine.engine_process import EngineStartError
from server.engine.sequence import FinishReason, Output, Request, TokenLogprobs
from server.engine.suspects import Quarantined


async def test_a_request_without_a_token_moves_and_one_with_tokens_ends() -> None:
    engines = Engines()
    waiting = engines.ask("waiting", digest="d")
    begun = engines.ask("begun", digest="d")  # its adapter is on its way there
    first = await engines.where("waiting")
    assert await engines.where("begun") is first
    first.say("begun")
    await until(lambda: first.is_delivered("begun"))
    first.die()
    last = (await begun)[-1]
    assert (last.finish_reason, last.error) == (FinishReason.ERROR, "died")
    second = await engines.where("waiting", besides=first)
    second.say("waiting")
    second.finish("waiting")
    outputs = await waiting
    assert [output.finish_reason for output in outputs] == [None, FinishReason.LENGTH]
    assert engines.moves == 1
    assert not engines.pool._placed
    assert [engines.pool._placement.load(number) for number in range(2)] == [0, 0]


async def test_a_request_moves_once() -> None:
    engines = Engines(3)
    task = engines.ask("r")
    first = await engines.where("r")
    first.die()
    second = await engines.where("r", besides=first)
    engines.suspects.cleared(Request("r", tuple(b"r"), PARAMS))  # as an equal request that ended well would do
    second.die()
    assert (await task)[-1].finish_reason is FinishReason.ERROR
    assert engines.moves == 1


async def test_a_request_that_two_engines_died_of_is_not_tried_again() -> None:
    engines = Engines(4)
    poison, innocent = engines.ask("poison", digest="d"), engines.ask("innocent", digest="d")
    first = await engines.where("poison")
    assert await engines.where("innocent") is first
    first.die()
    second = await engines.where("poison", besides=first)
    bystander = engines.ask("bystander", digest="d")
    assert await engines.where("bystander") is second
    assert not any("innocent" in member.requests for member in engines.members)  # suspects take turns in the pool
    second.die()
    with pytest.raises(Quarantined):
        await poison
    tasks = {"innocent": innocent, "bystander": bystander}
    while tasks:  # in either order
        await until(lambda: any(name in member.requests for member in engines.members for name in tasks))
        (name,) = {name for member in engines.members for name in member.requests}
        (await engines.where(name)).finish(name)
        assert (await tasks.pop(name))[-1].finish_reason is FinishReason.LENGTH
    with pytest.raises(Quarantined):
        await engines.ask("poison", digest="d")


async def test_requests_that_a_dead_engine_never_looked_at_are_not_suspect() -> None:
    """Two engines that are ended at once take requests for a moment, until that is noticed."""
    engines = Engines(3)
    for member in engines.members[:2]:
        member.is_deaf = True
    engines.members[2].alive = False
    tasks = [engines.ask(name, digest="d") for name in ("a", "b")]
    first = await engines.where("a")
    first.die()
    second = engines.other(first) if engines.other(first) is not engines.members[2] else engines.members[1]
    await until(lambda: {"a", "b"} <= second.requests.keys())  # both at once: none waits for its turn
    second.die()
    assert [(await task)[-1].finish_reason for task in tasks] == [FinishReason.ERROR] * 2
    third = engines.members[2]
    third.alive = True
    again = [engines.ask(name, digest="d") for name in ("a", "b")]
    await until(lambda: {"a", "b"} <= third.requests.keys())
    for name, task in zip(("a", "b"), again, strict=True):
        third.finish(name)
        assert (await task)[-1].finish_reason is FinishReason.LENGTH


async def test_a_moved_request_that_has_come_further_makes_room_for_the_next() -> None:
    """Turns until the end of whole answers would make a hundred moved requests wait for a hundred answers."""
    engines = Engines()
    tasks = [engines.ask(name, digest="d") for name in ("a", "b")]
    first = await engines.where("b")
    first.die()
    second = await engines.where("a", besides=first)
    second.say("a")
    await until(lambda: second.is_delivered("a"))
    assert "b" not in second.requests
    second.say("a")
    await until(lambda: "b" in second.requests)
    assert "a" in second.requests
    for name in ("a", "b"):
        second.finish(name)
    assert [(await task)[-1].finish_reason for task in tasks] == [FinishReason.LENGTH] * 2


async def test_parts_of_a_prompt_that_died_with_an_engine_are_not_told_twice() -> None:
    engines = Engines()
    task = engines.ask("r")
    first = await engines.where("r")
    part = Output("r", prompt_logprobs=(TokenLogprobs(-1.0),))
    first.put(part)
    await until(lambda: first.is_delivered("r"))
    first.die()
    second = await engines.where("r", besides=first)
    second.put(part)
    second.finish("r")
    assert [len(output.prompt_logprobs) for output in await task] == [1, 0]


async def test_a_moved_request_has_what_is_left_of_its_time() -> None:
    engines = Engines()
    task = engines.ask("r", timeout=50.0)
    first = await engines.where("r")
    first.die()
    second = await engines.where("r", besides=first)
    left = second.requests["r"].timeout
    assert left is not None
    assert left < 50.0
    second.finish("r")
    await task


async def test_a_request_whose_time_is_over_ends_instead_of_moving() -> None:
    engines = Engines()
    task = engines.ask("r", timeout=0.001)
    first = await engines.where("r")
    await asyncio.sleep(0.01)  # its time passes
    first.die()
    assert [output.finish_reason for output in await task] == [FinishReason.TIMEOUT]


async def test_without_a_living_engine() -> None:
    engines = Engines()
    task = engines.ask("r")
    first = await engines.where("r")
    engines.other(first).die()
    assert engines.pool.alive
    first.die()
    assert (await task)[-1].finish_reason is FinishReason.ERROR
    assert not engines.pool.alive
    with pytest.raises(EngineUnavailable):
        await engines.ask("next")
    for call in (engines.pool.pin("d", "p"), engines.pool.prefetch_now("d", "p")):
        with pytest.raises(EngineUnavailable):
            await call


async def test_an_engine_that_dies_before_it_has_the_request() -> None:
    """A suspect waits for its turn; meanwhile the engine that it was placed on is gone."""
    engines = Engines()
    holder, waiter = (Request(name, tuple(name.encode()), PARAMS) for name in ("holder", "waiter"))
    engines.suspects.crashed([holder, waiter])
    held = engines.send(holder)
    first = await engines.where("holder")
    waiting = engines.send(waiter)
    await until(lambda: "waiter" in engines.pool._placed)
    doomed = engines.members[engines.pool._placed["waiter"]]
    if doomed is first:
        engines.other(first).stalled = True  # it may be used when there is no other
    doomed.alive = False
    first.put(Output("holder", (1,), finish_reason=FinishReason.LENGTH))
    await held
    survivor = engines.other(doomed)
    await until(lambda: "waiter" in survivor.requests)
    survivor.finish("waiter")
    assert (await waiting)[-1].finish_reason is FinishReason.LENGTH


async def test_closing_a_stream_early_leaves_nothing() -> None:
    engines = Engines()
    outputs = engines.pool.submit(Request("r", (2, 3), PARAMS))
    task = asyncio.ensure_future(anext(outputs))
    member = await engines.where("r")
    engines.pool.abort("r")
    engines.pool.abort("unknown")
    assert (member.aborted, engines.other(member).aborted) == (["r"], [])
    member.say("r")
    assert (await task).tokens == (5,)
    await outputs.aclose()
    assert not member.requests
    assert not engines.pool._placed
    assert engines.moves == 0


async def test_stuck_engines_get_nothing_while_there_are_others() -> None:
    engines = Engines()
    engines.members[0].stalled = True
    tasks = [engines.ask(f"r{number}") for number in range(4)]
    await until(lambda: len(engines.members[1].requests) == 4)
    for number, task in enumerate(tasks):
        engines.members[1].finish(f"r{number}")
        await task
    engines.members[1].alive = False
    task = engines.ask("last")
    assert await engines.where("last") is engines.members[0]
    engines.members[0].finish("last")
    await task


async def test_what_engines_say_of_themselves() -> None:
    engines = Engines()
    told: list[tuple[int, int]] = []
    engines.pool.on_stats = lambda number, stats: told.append((number, stats.running))
    engines.members[1].report(EngineStats(running=3, waiting=2))
    engines.members[0].report(EngineStats(running=9))
    engines.members[0].die()
    assert told == [(1, 3), (0, 9), (0, 0)]
    assert engines.pool._placement.load(0) == 0  # nothing is left of what it said
    assert engines.pool._placement.load(1) == 5
    assert engines.pool.info == engines.members[1].info


async def test_one_engine_that_cannot_start_is_told() -> None:
    engines = Engines(3)
    engines.members[1].start_error = "no such GPU"
    with pytest.raises(EngineStartError, match="no such GPU"):
        await engines.pool.start()
    await engines.pool.stop()


async def test_the_end_of_the_server_moves_nothing() -> None:
    engines = Engines()
    task = engines.ask("r")
    first = await engines.where("r")
    last = engines.other(first)
    last.may_stop.clear()
    stopping = asyncio.create_task(engines.pool.stop())
    await until(lambda: not first.alive)
    assert (await task)[-1].finish_reason is FinishReason.ERROR
    assert last.alive
    last.may_stop.set()
    await stopping

    assert engines.moves == 0


@pytest.mark.parametrize(("device", "devices"), [("cpu", ["cpu"] * 3), ("auto", ["auto:0", "auto:1", "auto:2"])])
def test_what_engines_share(device: str, devices: list[str]) -> None:
    config = EngineConfig("m", device=device, host_memory=300, kv_memory=50)
    assert config.shared_out(1, 8) == (config,)
    shared = config.shared_out(3, 8)
    assert [each.device for each in shared] == devices
    assert {(each.num_threads, each.host_memory, each.kv_memory) for each in shared} == {(2, 100, 50)}
    assert {each.num_threads for each in replace(config, num_threads=2).shared_out(3, 8)} == {1}
