"""Which texts share a forward pass."""

from hypothesis import given
from hypothesis import strategies as st

from routing.encoder_text import Text
from routing.encoder_waiting import SHORT_TOKENS, PassLimits, Waiting

LIMITS = PassLimits(texts=8, tokens=512, bulk_tokens=128)


def text(number: int, tokens: int = 20, encoder: str = "base", tenant: str = "") -> Text:
    return Text(number, encoder, None, "", tokens, tenant=tenant)


def numbers(taken: list[Text]) -> list[int]:
    return [entry.number for entry in taken]


def filled(*texts: Text, bulk: bool = False, limits: PassLimits = LIMITS) -> Waiting:
    waiting = Waiting(limits)
    for entry in texts:
        waiting.add(entry, bulk=bulk)
    return waiting


def test_queries_go_before_bulk_and_never_share_a_pass_with_it() -> None:
    waiting = filled(*(text(n) for n in range(4)), bulk=True)
    waiting.add(text(10), bulk=False)
    waiting.add(text(11), bulk=False)
    assert numbers(waiting.take()) == [10, 11]
    assert numbers(waiting.take()) == [0, 1, 2, 3]
    assert waiting.take() == []


def test_hurried_bulk_becomes_a_query_and_the_forgotten_is_never_taken() -> None:
    waiting = filled(*(text(n) for n in range(6)), bulk=True)
    waiting.hurry([4, 99])
    waiting.forget([0, 98])
    assert numbers(waiting.take()) == [4]
    assert numbers(waiting.take()) == [1, 2, 3, 5]


def test_a_long_text_does_not_pad_short_ones() -> None:
    waiting = filled(text(0, 13), text(1, 250), text(2, 14), text(3, 240), text(4, 15))
    assert numbers(waiting.take()) == [0, 2, 4]
    assert numbers(waiting.take()) == [3, 1]


def test_where_padding_is_free_lengths_do_not_matter() -> None:
    texts = [text(0, 13), text(1, 250), text(2, 14), text(3, 240), text(4, 15)]
    waiting = filled(*texts, limits=PassLimits(8, 1 << 16, 128, padded=1000))
    assert numbers(waiting.take()) == [0, 2, 4, 3]
    assert numbers(waiting.take()) == [1]
    waiting = filled(*texts, limits=PassLimits(8, 1 << 16, 128, padded=1250))
    assert numbers(waiting.take()) == [0, 2, 4, 3, 1]


def test_one_text_longer_than_any_pass_goes_alone() -> None:
    waiting = filled(text(0, 2000), text(1, 1900))
    assert numbers(waiting.take()) == [0]
    assert numbers(waiting.take()) == [1]


def test_passes_are_of_one_encoder() -> None:
    waiting = filled(text(0), text(1, encoder="trained"), text(2), text(3, encoder="trained"))
    assert numbers(waiting.take()) == [0, 2]
    assert numbers(waiting.take()) == [1, 3]


def test_a_tenant_who_asks_for_thousands_delays_another_by_one_pass() -> None:
    waiting = filled(*(text(n, 100 + 140 * (n % 2), tenant="flood") for n in range(2000)))
    waiting.take()
    waiting.add(text(5000, 30, tenant="small"), bulk=False)
    waiting.add(text(5001, 30, tenant="small"), bulk=False)
    assert [numbers(waiting.take()) for _ in range(3)][1] == [5000, 5001]
    assert len(waiting) > 1900


def test_tenants_share_a_pass_equally_where_lengths_allow() -> None:
    waiting = filled(*(text(n, tenant="flood") for n in range(50)))
    for n in range(50, 54):
        waiting.add(text(n, tenant="small"), bulk=False)
    assert numbers(waiting.take()) == [0, 50, 1, 51, 2, 52, 3, 53]


def test_lengths_are_estimated_from_bytes_and_bounded() -> None:
    short, latin, han, huge = (
        Text.of(0, "e", None, words, 256).tokens for words in ("", "a" * 80, "字" * 80, "a" * 10**5)
    )
    assert short == 12
    assert short < latin < han < huge == 256
    assert Text.of(0, "e", None, "\ud800" * 8, 256).tokens >= 12


def test_a_cpu_pass_is_smaller_than_one_of_a_gpu() -> None:
    cpu, gpu = PassLimits.of("cpu", 64), PassLimits.of("cuda", 64)
    assert cpu.texts == gpu.texts == 64
    assert cpu.bulk_tokens < cpu.tokens < gpu.bulk_tokens < gpu.tokens
    assert cpu.padded == 0


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 700), st.sampled_from("ab"), st.sampled_from("xyz"), st.booleans()),
        st.tuples(st.just("hurry"), st.integers(0, 60)),
        st.tuples(st.just("forget"), st.integers(0, 60)),
        st.tuples(st.just("take")),
    ),
    max_size=80,
)


@given(steps)
def test_every_text_is_taken_once_tenants_in_turn_and_within_limits(script: list[tuple[object, ...]]) -> None:
    """Against a plain model: two lists in the order of arrival, and the order of tenants' turns for each."""
    waiting = Waiting(LIMITS)
    query_turns: list[str] = []
    bulk_turns: list[str] = []
    queries: list[Text] = []
    bulk: list[Text] = []
    added = 0
    for name, *arguments in [*script, *([("take",)] * 100)]:
        if name == "add":
            tokens, encoder, tenant, is_bulk = arguments
            entry = text(added, tokens, encoder, tenant)  # type: ignore[arg-type]
            waiting.add(entry, bulk=bool(is_bulk))
            (bulk if is_bulk else queries).append(entry)
            added += 1
        elif name == "hurry":
            moved = [entry for entry in bulk if entry.number == arguments[0]]
            bulk = [entry for entry in bulk if entry not in moved]
            queries += moved
            waiting.hurry([int(str(arguments[0]))])
        elif name == "forget":
            waiting.forget([int(str(arguments[0]))])
            queries = [entry for entry in queries if entry.number != arguments[0]]
            bulk = [entry for entry in bulk if entry.number != arguments[0]]
        else:
            source, most, turns = (
                (queries, LIMITS.tokens, query_turns) if queries else (bulk, LIMITS.bulk_tokens, bulk_turns)
            )
            taken = waiting.take()
            assert bool(taken) == bool(source)
            if not taken:
                continue
            assert next(entry for entry in source if entry.tenant == turns[0]) in taken
            turns.append(turns.pop(0))
            assert set(numbers(taken)) <= set(numbers(source))
            assert len({entry.encoder for entry in taken}) == 1
            lengths = [entry.tokens for entry in taken]
            assert lengths == sorted(lengths)
            assert len(taken) == 1 or lengths[-1] * len(taken) <= most
            assert len(taken) <= LIMITS.texts
            assert lengths[-1] <= max(2 * lengths[0], SHORT_TOKENS)
            for entry in taken:
                source.remove(entry)
        for turns, texts in ((query_turns, queries), (bulk_turns, bulk)):
            tenants = list(dict.fromkeys(entry.tenant for entry in texts))
            turns[:] = [tenant for tenant in turns if tenant in tenants]
            turns += [tenant for tenant in tenants if tenant not in turns]
        assert len(waiting) == len(queries) + len(bulk)
    assert not queries
    assert not bulk
