"""What names mean, against every order in which writes, answers and failures can come."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters_store.names_cache import NamesCache
from adapters_store.registry import RegistryUnavailable, Resolved


def version(name: str, number: int) -> Resolved:
    return Resolved("default", name, str(number), False, "config", "weights")


class Source:
    """A registry by hand: each question waits until it is answered."""

    def __init__(self) -> None:
        self.truth: dict[str, int] = {}
        self.asked: list[tuple[tuple[str, ...], asyncio.Future[dict[str, Resolved]]]] = []
        self.now = 0.0
        self.cache = NamesCache(self.fetch, lambda: self.now, patience=30.0, max_entries=4)

    async def fetch(self, _: str, names: Sequence[str]) -> dict[str, Resolved]:
        future: asyncio.Future[dict[str, Resolved]] = asyncio.get_running_loop().create_future()
        self.asked.append((tuple(names), future))
        return await future

    def read(self, names: Sequence[str]) -> dict[str, Resolved]:
        plain = {name: name.partition("@")[0] for name in names}
        return {name: version(each, self.truth[each]) for name, each in plain.items() if each in self.truth}

    def answer(self) -> None:
        names, future = self.asked.pop(0)
        future.set_result(self.read(names))

    def fail(self) -> None:
        self.asked.pop(0)[1].set_exception(RegistryUnavailable("gone"))

    async def ask(self, *names: str, tenant: str = "t") -> "asyncio.Task[dict[str, Resolved]]":
        task = asyncio.create_task(self.cache.resolve(tenant, names))
        await settle()
        return task

    async def learn(self, *names: str, tenant: str = "t") -> None:
        task = await self.ask(*names, tenant=tenant)
        self.answer()
        await task


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


@pytest.fixture
def source() -> Source:
    return Source()


async def test_an_answer_lives_a_second_from_when_it_was_asked(source: Source) -> None:
    source.truth = {"a": 1}
    task = await source.ask("a", "x", "a")
    source.now = 0.6
    source.answer()
    assert await task == {"a": version("a", 1)}
    source.now = 0.99
    assert (await source.ask("a", "x")).done()
    source.now = 1.0
    assert not (await source.ask("a", "x")).done()
    assert source.asked[0][0] == ("a", "x")
    source.answer()


async def test_tenants_do_not_share_answers(source: Source) -> None:
    source.truth = {"a": 1}
    await source.learn("a")
    assert not (await source.ask("a", tenant="other")).done()
    source.answer()


async def test_equal_questions_are_asked_once(source: Source) -> None:
    source.truth = {"a": 1}
    tasks = [await source.ask("a") for _ in range(10)]
    assert len(source.asked) == 1
    tasks[0].cancel()
    source.answer()
    assert await asyncio.gather(*tasks[1:]) == [{"a": version("a", 1)}] * 9


async def test_a_write_drops_every_spelling_for_every_tenant(source: Source) -> None:
    source.truth = {"a": 1, "b": 1}
    await source.learn("a", "b", "a@12345678")
    await source.learn("a", tenant="other")
    source.cache.forget("a")
    assert (await source.ask("b")).done()
    for names, tenant in ((("a",), "t"), (("a@12345678",), "t"), (("a",), "other")):
        assert not (await source.ask(*names, tenant=tenant)).done()
        source.answer()
    source.cache.check_integrity()


async def test_an_answer_from_before_a_write_is_not_kept(source: Source) -> None:
    source.truth = {"a": 1}
    before = await source.ask("a")
    _, future = source.asked.pop()
    stale = source.read(["a"])
    source.truth["a"] = 2
    source.cache.forget("a")
    after = await source.ask("a")
    future.set_result(stale)
    await settle()
    assert not before.done()  # asked again, since the name was written meanwhile
    while source.asked:
        source.answer()
    assert (await before, await after) == ({"a": version("a", 2)}, {"a": version("a", 2)})
    assert (await source.ask("a")).result() == {"a": version("a", 2)}


async def test_a_name_that_is_written_all_the_time_is_answered(source: Source) -> None:
    source.truth = {"a": 1}
    task = await source.ask("a")
    for _ in range(2):
        source.cache.forget("a")
        source.answer()
        await settle()
    source.cache.forget("a")
    later = await source.ask("a")  # must not get the other's answer, which may be from before the last write
    assert len(source.asked) == 2
    source.answer()
    assert await task == {"a": version("a", 1)}
    assert not later.done()
    source.answer()
    await later


async def test_an_answer_that_was_overtaken_is_not_kept(source: Source) -> None:
    source.truth = {"a": 1, "b": 1}
    await source.ask("a")
    _, slow = source.asked.pop()
    old = source.read(["a"])
    source.truth["a"] = 2
    source.now = 0.5
    await source.learn("a", "b")
    slow.set_result(old)
    await settle()
    assert (await source.ask("a")).result() == {"a": version("a", 2)}


async def test_known_names_outlive_the_registry(source: Source) -> None:
    source.truth = {"a": 1}
    await source.learn("a", "x")
    source.now = 5.0
    known, unknown = await source.ask("a"), await source.ask("x")
    source.fail()
    source.fail()
    assert await known == {"a": version("a", 1)}
    with pytest.raises(RegistryUnavailable, match="gone"):
        await unknown
    assert (await source.ask("a")).done()  # not asked again at once
    with pytest.raises(RegistryUnavailable, match="gone"):
        await (await source.ask("a", "x"))
    assert source.asked == []
    source.now = 6.0
    source.truth["a"] = 2
    back = await source.ask("a")
    source.answer()
    assert await back == {"a": version("a", 2)}
    assert not (await source.ask("x")).done()
    source.answer()


async def test_a_write_leaves_nothing_to_fall_back_on(source: Source) -> None:
    source.truth = {"a": 1}
    await source.learn("a")
    source.now = 5.0
    task = await source.ask("a")
    source.cache.forget("a")
    source.fail()
    with pytest.raises(RegistryUnavailable):
        await task


async def test_a_slow_registry_is_not_waited_for_when_names_are_known() -> None:
    source = Source()
    source.cache = NamesCache(source.fetch, lambda: source.now, patience=0.01)
    source.truth = {"a": 1}
    await source.learn("a")
    source.now = 5.0
    assert await (await source.ask("a")) == {"a": version("a", 1)}
    assert (await source.ask("a")).done()
    source.truth["a"] = 2
    source.answer()
    await settle()
    assert (await source.ask("a")).result() == {"a": version("a", 2)}


async def test_it_holds_so_many(source: Source) -> None:
    for name in "abcd":
        await source.learn(name)
    assert (await source.ask("a")).done()
    await source.learn("e")
    source.cache.check_integrity()
    assert (await source.ask("a")).done()
    assert not (await source.ask("b")).done()
    source.answer()


class CacheMachine(RuleBasedStateMachine):
    """Names count how often they were written.

    Nobody may see a number from before this process's last write of the name nor, while the registry answers, one that
    was outdated for a second when the question came.
    """

    names = st.sampled_from(["a", "b", "c", "a@1234", "d", "e"])
    plain = st.sampled_from(["a", "b", "c", "d", "e"])

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.source = Source()
        self.own: dict[str, int] = {}  # number at the last own write
        self.history: dict[str, list[tuple[float, int]]] = {}  # numbers and since when
        self.pending: list[tuple[asyncio.Task[dict[str, Resolved]], dict[str, int], dict[str, int]]] = []
        self.is_down = False

    def teardown(self) -> None:
        while self.source.asked:
            self.source.answer()
            self._settle()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.answers_are_new_enough()
        assert not self.pending
        self.loop.close()

    @initialize()
    def some_exist(self) -> None:
        for name in "ab":
            self._write(name)

    def _settle(self) -> None:
        self.loop.run_until_complete(settle())

    def _write(self, name: str) -> None:
        self.source.truth[name] = self.source.truth.get(name, 0) + 1
        self.history.setdefault(name, []).append((self.source.now, self.source.truth[name]))

    def _least(self, name: str) -> int:
        name = name.partition("@")[0]
        old = [number for since, number in self.history.get(name, ()) if since <= self.source.now - 1.0]
        return max([self.own.get(name, 0), *([] if self.is_down else old[-1:])])

    @rule(names=st.lists(names, min_size=1, max_size=3))
    def resolve(self, names: list[str]) -> None:
        own = {name: self.own.get(name.partition("@")[0], 0) for name in names}
        least = {name: self._least(name) for name in names}
        task = self.loop.create_task(self.source.cache.resolve("t", names))
        self.pending.append((task, own, least))
        self._settle()

    @rule(name=plain)
    def write_here(self, name: str) -> None:
        self._write(name)
        self.own[name] = self.source.truth[name]
        self.source.cache.forget(name)
        self._settle()

    @rule(name=plain)
    def write_elsewhere(self, name: str) -> None:
        self._write(name)

    @rule(seconds=st.sampled_from([0.3, 0.7, 1.0]))
    def wait(self, seconds: float) -> None:
        self.source.now += seconds

    @precondition(lambda self: self.source.asked)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """The registry reads now or has read before; answers overtake each other."""
        index = data.draw(st.integers(0, len(self.source.asked) - 1))
        self.source.asked.insert(0, self.source.asked.pop(index))
        self.source.answer()
        self.is_down = False
        self._settle()

    @precondition(lambda self: self.source.asked)
    @rule()
    def fail(self) -> None:
        self.source.fail()
        self.is_down = True
        for _, own, least in self.pending:
            least |= own  # they may get what was known before
        self._settle()

    @invariant()
    def answers_are_new_enough(self) -> None:
        for ended in [each for each in self.pending if each[0].done()]:
            self.pending.remove(ended)
            task, _, least = ended
            if task.exception() is None:
                for name, number in least.items():
                    found = task.result().get(name)
                    assert (int(found.digest) if found is not None else 0) >= number, name
        self.source.cache.check_integrity()


class TestAllOrders(CacheMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
