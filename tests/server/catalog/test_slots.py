"""Places for registrations: so many at once, fair to tenants, none lost."""

import asyncio

import pytest

from server.catalog.slots import MOST_WAITING, Slots
from server.errors import Unavailable
from server.tenants import Caller, Tenant

ADMIN = Caller(Tenant("default"), admin=True)
A, B = Caller(Tenant("a")), Caller(Tenant("b"))


class Work:
    """Takes a place and keeps it until told to go."""

    def __init__(self, slots: Slots, caller: Caller) -> None:
        self.has_place = False
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._run(slots, caller))

    async def _run(self, slots: Slots, caller: Caller) -> None:
        async with slots.take(caller):
            self.has_place = True
            await self.go.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_others_wait_in_order() -> None:
    slots = Slots(1)
    works = [Work(slots, ADMIN) for _ in range(4)]
    await settle()
    assert [work.has_place for work in works] == [True, True, False, False]
    works[0].go.set()
    await settle()
    assert [work.has_place for work in works] == [True, True, True, False]
    for work in works:
        work.go.set()
    await asyncio.gather(*[work.task for work in works])
    assert slots.taken == 0


async def test_a_tenant_is_overtaken_when_it_has_its_half() -> None:
    slots = Slots(4)
    works = [Work(slots, A) for _ in range(3)] + [Work(slots, B)]
    await settle()
    assert [work.has_place for work in works] == [True, True, False, True]
    works[0].go.set()
    await settle()
    assert works[2].has_place
    for work in works:
        work.go.set()
    await asyncio.gather(*[work.task for work in works])
    assert slots.taken == 0


@pytest.mark.parametrize("most", [1, 4])
async def test_the_administrator_never_waits_for_tenants(most: int) -> None:
    slots = Slots(most)
    works = [Work(slots, Caller(Tenant(f"tenant{index}"))) for index in range(MOST_WAITING + most)]
    await settle()
    assert [work.has_place for work in works].count(True) == most
    with pytest.raises(Unavailable):
        async with slots.take(A):
            pass
    admin = Work(slots, ADMIN)
    await settle()
    assert admin.has_place
    assert [work.has_place for work in works].count(True) == most
    for work in [*works, admin]:
        work.go.set()
    await asyncio.gather(*[work.task for work in [*works, admin]])
    assert slots.taken == 0


async def test_who_leaves_gives_the_place_on() -> None:
    """Also who leaves in the moment in which it gets one."""
    slots = Slots(1)
    first, second, third = Work(slots, A), Work(slots, A), Work(slots, A)
    await settle()
    first.go.set()
    await asyncio.sleep(0)
    second.task.cancel()
    await settle()
    assert (second.has_place and not second.task.done()) is False
    assert third.has_place
    third.go.set()
    await asyncio.gather(first.task, third.task)
    waiting = Work(slots, A)
    await settle()
    left = Work(slots, A)
    await settle()
    left.task.cancel()
    await settle()
    waiting.go.set()
    await waiting.task
    assert slots.taken == 0


async def test_not_everybody_can_wait() -> None:
    slots = Slots(1)
    works = [Work(slots, A) for _ in range(1 + MOST_WAITING // 2)]
    await settle()
    with pytest.raises(Unavailable):
        async with slots.take(A):
            pass
    works += [Work(slots, ADMIN) for _ in range(1 + MOST_WAITING)]
    await settle()
    with pytest.raises(Unavailable):
        async with slots.take(ADMIN):
            pass
    for work in works:
        work.task.cancel()
    await asyncio.gather(*[work.task for work in works], return_exceptions=True)
    assert slots.taken == 0
