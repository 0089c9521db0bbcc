"""Virtual token counters: bounded differences between tenants that both wait, and no credit for not asking."""

from collections import Counter, defaultdict

from fair_server import Server, Work, bound
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.types import BASE, Mix
from server.engine.fairness import EXPECTED, INPUT_PRICE, OUTPUT_PRICE, FairQueue
from server.engine.sequence import Request, SamplingParams, Sequence

works = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=40, max_size=80)


@given(rows=st.integers(1, 6), first=works, second=works, third=works)
@settings(max_examples=25, deadline=None)
def test_tenants_that_wait_get_the_same(rows: int, first: list[Work], second: list[Work], third: list[Work]) -> None:
    server = Server(rows)
    server.submit("a", *first)
    server.submit("b", *second)
    server.submit("c", *third)
    for _ in server.steps_while_both_wait("a", "b", "c"):
        spread = max(server.served[name] for name in "abc") - min(server.served[name] for name in "abc")
        assert spread <= bound(rows, 60, 12)


def test_a_tenant_with_ten_times_the_requests_gets_no_more() -> None:
    server = Server(8)
    for _ in range(300):
        server.submit("greedy", *[(20, 10)] * 10)
        server.submit("modest", (20, 10))
    for _ in server.steps_while_both_wait("greedy", "modest"):
        pass
    assert abs(server.served["greedy"] - server.served["modest"]) <= bound(8, 20, 10)
    assert min(server.served.values()) > 10 * bound(8, 20, 10)


def test_a_light_tenant_is_served_next() -> None:
    server = Server(2)
    server.submit("heavy", *[(10, 5)] * 500)
    for _ in range(20):
        server.submit("light", (10, 5))
        waited = 0
        while any(sequence.request.tenant == "light" for sequence in server.queue):
            server.step()
            waited += 1
        assert waited <= 2 * 5  # both rows ended once
        for _ in range(15):
            server.step()


def test_idling_earns_no_credit() -> None:
    server = Server(4)
    server.submit("busy", *[(10, 10)] * 400)
    server.submit("late", (10, 10))
    for _ in range(300):
        server.step()
    before = dict(server.served)
    assert before["busy"] > 20 * before["late"]
    server.submit("late", *[(10, 10)] * 400)
    for _ in server.steps_while_both_wait("busy", "late"):
        gained = {tenant: server.served[tenant] - before[tenant] for tenant in before}
        assert abs(gained["busy"] - gained["late"]) <= bound(4, 10, 10)
    assert gained["late"] > 10 * bound(4, 10, 10)


def test_a_long_lonely_stream_earns_no_credit_either() -> None:
    server = Server(8)
    server.submit("stream", (10, 2000))
    server.submit("busy", *[(10, 10)] * 2000)
    for _ in range(800):
        server.step()
    before = dict(server.served)
    server.submit("stream", *[(10, 10)] * 2000)
    for _ in range(400):
        server.step()
        gained = {tenant: server.served[tenant] - before[tenant] for tenant in before}
        assert abs(gained["busy"] - gained["stream"]) <= bound(8, 10, 10)


def test_nor_does_it_when_nobody_waits_at_the_moment() -> None:
    server = Server(8)
    server.submit("stream", (10, 2000))
    for _ in range(400):
        server.submit("busy", *[(10, 10)] * (8 - max(1, len(server.running))))
        server.step()
    assert not len(server.queue)
    before = dict(server.served)
    server.submit("stream", *[(10, 10)] * 1000)
    server.submit("busy", *[(10, 10)] * 1000)
    for _ in range(400):
        server.step()
        gained = {tenant: server.served[tenant] - before[tenant] for tenant in before}
        assert abs(gained["busy"] - gained["stream"]) <= bound(8, 10, 10)


def test_what_a_tenant_had_more_than_others_is_remembered() -> None:
    server = Server(1)
    server.submit("a", (100, 1))
    server.submit("b", (1, 1), (1, 1), (1, 1))
    server.step()  # a is served first, by name
    server.step()
    server.submit("a", (1, 1))
    assert server.queue.counters["a"] == 100 * INPUT_PRICE + OUTPUT_PRICE
    order = [sequence.request.tenant for sequence in server.queue.in_turn()]
    assert order == ["b", "b", "a"]


def test_counters_restart_when_nobody_is_served() -> None:
    server = Server(2)
    server.submit("a", (100, 1))
    server.drain()
    assert server.queue.counters["a"] > 0
    server.submit("b", (1, 1))
    server.submit("a", (1, 1))
    assert server.queue.counters.get("a", 0.0) == 0.0


def test_counters_do_not_restart_while_somebody_runs() -> None:
    server = Server(1)
    server.submit("a", (100, 5))
    server.step()
    server.submit("b", (1, 1))
    assert server.queue.counters["a"] == 100 * INPUT_PRICE


def test_a_preempted_sequence_goes_first_and_pays_its_prompt_once() -> None:
    queue = FairQueue()
    sequences = [Sequence.of(Request(name, (0,) * 7, SamplingParams())) for name in "abc"]
    for sequence in sequences:
        queue.push(sequence)
    queue.started(sequences[0])
    queue.charge(sequences[0], 1, OUTPUT_PRICE)
    queue.push_front(sequences[0])
    queue.stopped(sequences[0])
    assert list(queue.in_turn()) == sequences
    assert sequences[0].num_charged == 8
    queue.started(sequences[0])
    assert queue.counters["default"] == 7 * INPUT_PRICE + OUTPUT_PRICE
    assert len(queue) == 2


queued = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 30)), max_size=24)


@given(queued=queued, charged=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50)), data=st.data())
@settings(max_examples=150, deadline=None)
def test_in_turn_follows_the_counters(
    queued: list[tuple[str, int]], charged: dict[str, int], data: st.DataObject
) -> None:
    """The caller starts some and passes over others, or whole tenants; each is offered once at most.

    It is always one of the tenant's that is the poorest, with what its running ones will soon have made.
    """
    queue = FairQueue()
    left: dict[str, list[Sequence]] = defaultdict(list)
    for number, (tenant, prompt) in enumerate(queued):
        sequence = Sequence.of(Request(str(number), (0,) * prompt, SamplingParams(), tenant=tenant))
        queue.push(sequence)
        left[tenant].append(sequence)
    for tenant, tokens in charged.items():
        queue.counters[tenant] = float(tokens)
    passed, refused = [], set[str]()
    running: dict[str, int] = defaultdict(int)

    def place(name: str) -> tuple[float, str]:
        return queue.counters.get(name, 0.0) + running[name] * EXPECTED * OUTPUT_PRICE, name

    for sequence in queue.in_turn(refused):
        tenant = sequence.request.tenant
        assert place(tenant) == min(place(name) for name in left if name not in refused)
        assert left[tenant].pop(0) is sequence
        if not left[tenant]:
            del left[tenant]
        choice = data.draw(st.sampled_from(["start", "start", "pass", "pass", "refuse"]))
        if choice == "start":
            queue.started(sequence)
            running[tenant] += 1
        else:
            passed.append(sequence)
        if choice == "refuse":
            refused.add(tenant)
    assert not left.keys() - refused
    passed += [sequence for rest in left.values() for sequence in rest]
    assert sorted(map(id, queue)) == sorted(map(id, passed))
    assert len(queue) == len(passed)


def test_sequences_without_adapters_go_on_when_only_these_are_wanted() -> None:
    queue = FairQueue()
    mix = Mix((("a", 1.0),))
    mixes = [mix, BASE, mix, BASE, mix, BASE]
    sequences = [Sequence.of(Request(str(n), (0,), SamplingParams(), own)) for n, own in enumerate(mixes)]
    for sequence in sequences:
        queue.push(sequence)
    given: list[str] = []
    for sequence in queue.in_turn(only_plain=lambda _: "2" in given):
        given.append(sequence.request.id)
        if sequence.request.id in "13":
            queue.started(sequence)
    assert given == ["0", "1", "2", "3", "5"]
    queue.push_front(sequences[1])
    queue.stopped(sequences[1])
    queue.remove(sequences[5])
    assert [sequence.request.id for sequence in queue.in_turn(only_plain=lambda _: True)] == ["1"]


def test_rows_that_become_free_together_are_divided() -> None:
    server = Server(8)
    server.submit("first", *[(4, 20)] * 8)
    server.step()
    server.submit("b", *[(4, 20)] * 40)
    for _ in range(5):
        server.step()
    server.submit("a", *[(4, 20)] * 40)
    for _ in range(16):
        server.step()
    rows = Counter(sequence.request.tenant for sequence in server.running)
    assert rows == {"a": 4, "b": 4}


def test_removing_from_the_middle_keeps_the_order() -> None:
    queue = FairQueue()
    sequences = [Sequence.of(Request(str(number), (0,), SamplingParams())) for number in range(5)]
    for sequence in sequences:
        queue.push(sequence)
    queue.remove(sequences[2])
    queue.remove(sequences[0])
    assert list(queue.in_turn()) == [sequences[1], sequences[3], sequences[4]]
