"""Prompts that are waiting for a router's decision, and the decisions that are remembered."""

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import replace

from adapters_store.types import BASE
from server.engine.decisions import Decision
from server.engine.sequence import Request, Sequence

REMEMBERED_BYTES = 64 << 20
"""A decision of MoA takes some kilobytes, one of MiLoRA over 8 adapters and 32 layers about 10."""


class Deciding:
    """Every prompt is decided once for each router, options and tenant: equal ones wait for the first of them.

    Tenants are told apart by `Request.cache_key`, so that none learns what others have asked. Not thread-safe.
    """

    def __init__(self, most_bytes: int = REMEMBERED_BYTES) -> None:
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._known: OrderedDict[bytes, Decision] = OrderedDict()  # the least recently used first
        self._first: dict[bytes, Sequence] = {}
        self._followers: dict[bytes, list[Sequence]] = {}
        self._keys: dict[Sequence, bytes] = {}  # of the undecided ones

    @property
    def followers(self) -> tuple[Sequence, ...]:
        """Sequences that wait for another one's decision."""
        return tuple(sequence for own in self._followers.values() for sequence in own)

    @property
    def num_remembered(self) -> int:
        return len(self._known)

    def enter(self, sequence: Sequence) -> bool:
        """A sequence comes. True: it goes on, decided or as the first of its kind; else `decide` or `leave` gives it.

        A first one whose router reads the base model goes on as a row of it.
        """
        key = _key(sequence.asked)
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            settle(sequence, known, cached=True)
            return True
        self._keys[sequence] = key
        if key in self._first:
            self._followers.setdefault(key, []).append(sequence)
            return False
        self._begin(key, sequence)
        return True

    def waits(self, sequence: Sequence) -> bool:
        """Whether a sequence waits for another one's decision."""
        key = self._keys.get(sequence)
        return key is not None and self._first[key] is not sequence

    def decide(self, sequence: Sequence, decision: Decision) -> list[Sequence]:
        """The first one has its decision, and so have those that it returns, which waited for it."""
        key = self._keys.pop(sequence)
        del self._first[key]
        self._remember(key, decision)
        settle(sequence, decision, cached=False)
        followers = self._followers.pop(key, [])
        for follower in followers:
            del self._keys[follower]
            settle(follower, decision, cached=True)
        return followers

    def leave(self, sequence: Sequence) -> Sequence | None:
        """A sequence ends. Where it was to decide, the one that does so instead, if another waited for it."""
        key = self._keys.pop(sequence, None)
        if key is None:
            return None
        followers = self._followers.get(key, [])
        if self._first[key] is not sequence:
            followers.remove(sequence)
            successor = None
        elif followers:
            successor = followers.pop(0)
            self._begin(key, successor)
        else:
            successor = None
            del self._first[key]
        if not followers:
            self._followers.pop(key, None)
        return successor

    def check_integrity(self) -> None:
        """Raise RuntimeError unless whoever waits does so for someone, and no more is remembered than should be."""
        if lost := self._followers.keys() - self._first.keys():
            raise RuntimeError(f"{len(lost)} prompts wait for decisions that nobody makes")
        if set(self._keys) != {*self._first.values(), *self.followers}:
            raise RuntimeError("the undecided sequences are not those that decide or wait")
        if any(sequence.decision is not None for sequence in self._keys):
            raise RuntimeError("a sequence waits for a decision that it has")
        held = sum(decision.num_bytes for decision in self._known.values())
        if held != self._num_bytes or held > self._most_bytes:
            raise RuntimeError(f"decisions take {held} bytes, counted are {self._num_bytes} of {self._most_bytes}")

    def _begin(self, key: bytes, sequence: Sequence) -> None:
        self._first[key] = sequence
        use = sequence.asked.prompt_router
        assert use is not None
        if not use.layered:
            sequence.request = replace(sequence.asked, mix=BASE)

    def _remember(self, key: bytes, decision: Decision) -> None:
        self._known[key] = decision
        self._num_bytes += decision.num_bytes
        while self._num_bytes > self._most_bytes:
            self._num_bytes -= self._known.popitem(last=False)[1].num_bytes


def settle(sequence: Sequence, decision: Decision, *, cached: bool) -> None:
    """From now on the sequence is computed as was decided. It must hold nothing, or keep the mix that it has."""
    told = replace(decision.told, seconds=0.0, cached=True) if cached else decision.told
    sequence.decision = replace(decision, told=told)
    sequence.request = replace(sequence.asked, mix=decision.mix)


def _key(request: Request) -> bytes:
    """Of a prompt, its router and options, and the tenant."""
    assert request.prompt_router is not None
    name = hashlib.sha256(request.prompt_router.key)
    name.update(hashlib.sha256(request.cache_key).digest())
    name.update(array("q", request.prompt).tobytes())
    return name.digest()
