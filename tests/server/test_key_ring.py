"""Stored keys: right, wrong, revoked, and how much work each costs."""

import asyncio
import hashlib
import hmac
import secrets
import threading
from dataclasses import replace

import pytest
from polling import until

from adapters_store.registry import KeyRow
from server.errors import Unavailable
from server.key_ring import MAX_CHECKS, MAX_REFUSED, PATTERN, KeyRing, looks_stored, make_key, scrypt


class CountingHash:
    """A cheap hash that counts its calls; while `gate` is closed they wait, in their threads, but for `ungated`."""

    def __init__(self) -> None:
        self.ungated = b""
        self.calls = 0
        self.at_once = 0
        self.most_at_once = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def __call__(self, key: bytes, salt: bytes) -> bytes:
        with self._lock:
            self.calls += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        if key != self.ungated:
            self.gate.wait()
        with self._lock:
            self.at_once -= 1
        return hashlib.sha256(salt + key).digest()


def made(hash_key: CountingHash, tenant: str = "acme") -> tuple[KeyRow, str]:
    row, key = make_key(tenant, "laptop", secrets.token_bytes, hash_key)
    hash_key.calls = 0
    return row, key


def wrong(key: str) -> str:
    """A key of the same id with another secret."""
    return key[:16] + secrets.token_urlsafe(32)


def test_what_is_stored_of_a_key() -> None:
    row, key = make_key("acme", "laptop", secrets.token_bytes)
    assert PATTERN.fullmatch(key)
    assert key.startswith(f"lm-{row.id}-")
    assert (row.tenant, row.label, len(row.salt), len(row.hash)) == ("acme", "laptop", 16, 32)
    assert row.hash == scrypt(key.encode(), row.salt) != scrypt(key.encode(), bytes(16))
    stored = repr(row)
    assert key not in stored
    assert key.split("-", 2)[2] not in stored
    others = {make_key("acme", "", secrets.token_bytes)[0].id for _ in range(20)}
    assert len(others | {row.id}) == 21


@pytest.mark.parametrize("bad", ["", "lm-", "sk-123", "lm-abc-def", "LM-" + "a" * 12 + "-" + "b" * 43])
async def test_what_does_not_look_like_a_key_is_not_hashed(bad: str) -> None:
    hash_key = CountingHash()
    ring = KeyRing(hash_key)
    assert not looks_stored(bad)
    assert await ring.owner(bad) is None
    assert hash_key.calls == 0


async def test_a_key_is_hashed_once() -> None:
    hash_key = CountingHash()
    (row, key), ring = made(hash_key), KeyRing(hash_key)
    ring.replace([row])
    assert [await ring.owner(key) for _ in range(50)] == ["acme"] * 50
    assert hash_key.calls == 1
    ring.replace([replace(row)])  # read again, unchanged
    assert await ring.owner(key) == "acme"
    assert hash_key.calls == 1


async def test_requests_at_once_share_one_hash() -> None:
    hash_key = CountingHash()
    (row, key), ring = made(hash_key), KeyRing(hash_key)
    ring.put(row)
    assert set(await asyncio.gather(*[ring.owner(key) for _ in range(100)])) == {"acme"}
    assert hash_key.calls == 1


async def test_wrong_keys() -> None:
    hash_key = CountingHash()
    (row, key), ring = made(hash_key), KeyRing(hash_key)
    ring.put(row)
    unknown = make_key("acme", "", secrets.token_bytes, hash_key)[1]
    hash_key.calls = 0
    assert await ring.owner(unknown) is None
    assert hash_key.calls == 0
    bad = wrong(key)
    assert [await ring.owner(bad) for _ in range(3)] == [None] * 3
    assert hash_key.calls == 1
    assert await ring.owner(key) == "acme"
    # Once the right key is known, all others are wrong without any hash.
    assert [await ring.owner(wrong(key)) for _ in range(20)] == [None] * 20
    assert hash_key.calls == 2


async def test_wrong_keys_are_remembered_up_to_a_bound() -> None:
    hash_key = CountingHash()
    row, key = made(hash_key)
    ring = KeyRing(hash_key)
    ring.put(row)
    ring._refused.update(dict.fromkeys((bytes([i % 256, i // 256]) for i in range(MAX_REFUSED)), None))
    assert await ring.owner(wrong(key)) is None
    assert len(ring._refused) == MAX_REFUSED


async def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hash_key, compared = CountingHash(), list[tuple[bytes, bytes]]()
    (row, key), ring = made(hash_key), KeyRing(hash_key)
    ring.put(row)
    original = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    assert await ring.owner(wrong(key)) is None
    assert await ring.owner(key) == "acme"
    assert await ring.owner(key) == "acme"
    assert await ring.owner(wrong(key)) is None
    assert [len(one) for one, _ in compared] == [32] * 4
    assert [one == other for one, other in compared] == [False, True, True, False]


async def test_revoked_keys_are_nobodys() -> None:
    hash_key = CountingHash()
    (row, key), (other_row, other), ring = made(hash_key), made(hash_key, "umbrella"), KeyRing(hash_key)
    ring.replace([row, other_row])
    assert (await ring.owner(key), await ring.owner(other)) == ("acme", "umbrella")
    ring.drop(row.id)
    assert await ring.owner(key) is None
    ring.replace([other_row])
    assert await ring.owner(other) == "umbrella"
    ring.drop_tenant("umbrella")
    assert await ring.owner(other) is None
    assert not ring._verified


@pytest.mark.parametrize("how", ["drop", "replace", "rewrite"])
async def test_a_key_revoked_during_its_check_is_nobodys(how: str) -> None:
    hash_key = CountingHash()
    (row, key), ring = made(hash_key), KeyRing(hash_key)
    ring.put(row)
    hash_key.gate.clear()
    asking = asyncio.create_task(ring.owner(key))
    await until(lambda: hash_key.calls == 1)
    if how == "drop":
        ring.drop(row.id)
    elif how == "replace":
        ring.replace([])
    else:
        ring.replace([replace(row, hash=bytes(32))])
    hash_key.gate.set()
    await asking
    assert await ring.owner(key) is None


async def test_few_checks_run_at_once_and_few_wait() -> None:
    hash_key = CountingHash()
    pairs = [made(hash_key) for _ in range(MAX_CHECKS + 1)]
    ring = KeyRing(hash_key)
    ring.replace([row for row, _ in pairs])
    hash_key.gate.clear()
    asking = [asyncio.create_task(ring.owner(key)) for _, key in pairs[:-1]]
    await until(lambda: hash_key.calls == 2)
    with pytest.raises(Unavailable, match="too many keys"):
        await ring.owner(pairs[-1][1])
    asking[0].cancel()  # a client that leaves does not stop the check
    hash_key.gate.set()
    assert set(await asyncio.gather(*asking[1:])) == {"acme"}
    assert hash_key.most_at_once == 2
    assert await ring.owner(pairs[0][1]) == "acme"
    assert await ring.owner(pairs[-1][1]) == "acme"
    assert hash_key.calls == MAX_CHECKS + 1


async def test_wrong_keys_that_wait_cost_no_hash_once_the_right_one_is_known() -> None:
    hash_key = CountingHash()
    (row, key), ring = made(hash_key), KeyRing(hash_key)
    ring.put(row)
    hash_key.ungated = key.encode()
    hash_key.gate.clear()
    right, *rest = [asyncio.create_task(ring.owner(each)) for each in (key, *(wrong(key) for _ in range(20)))]
    assert await right == "acme"
    hash_key.gate.set()
    assert await asyncio.gather(*rest) == [None] * 20
    assert hash_key.calls == 2  # the right one, and the wrong one that was being hashed beside it
