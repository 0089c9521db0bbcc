"""Embeddings of texts, for the server: a process that computes them, and a memory of those asked for last."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from routing.embedding_cache import EmbeddingCache, Key, text_key
from routing.encoder_child import CLOSED, EncoderChild
from routing.encoder_child import EncoderUnavailable as EncoderUnavailable
from routing.encoder_messages import Embed, Embedded, Failed, Forget, Hurry, Start
from routing.encoder_model import EncoderError, encoder_id, plain_id
from routing.encoder_width import encoder_width

LOADER = "routing.encoder_model:EncoderModel.load"
RESTART_SECONDS = 2.0

Identify = Callable[[Path, Path | None], tuple[str, int]]
"""The id and width of the encoder in a folder with a change; raises EncoderError."""


class Encoder(Protocol):
    """Turns texts into vectors. Vectors of encoders with different `id` cannot be compared."""

    @property
    def id(self) -> str: ...

    @property
    def width(self) -> int: ...

    async def embed(self, texts: Sequence[str], *, tenant: str = "", bulk: bool = False) -> np.ndarray:
        """(n, width) float32, rows of length 1. Raises EncoderUnavailable.

        What one `tenant` asks for is computed anew for another: how long it takes would tell what others ask. Tenants
        take turns.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServedEncoder:
    """One encoder of an EncoderProcess: the base, or the base with a trained router's change.

    A `plain` one puts no instruction before the texts: its embeddings are those that others know of this encoder.
    """

    process: "EncoderProcess"
    id: str
    width: int
    change: Path | None
    plain: bool = False

    async def embed(self, texts: Sequence[str], *, tenant: str = "", bulk: bool = False) -> np.ndarray:
        """See `Encoder`. `bulk` texts are embedded when no query waits, and are not remembered."""
        return await self.process.embed(self, texts, tenant=tenant, bulk=bulk)


@dataclass(eq=False, slots=True)
class _Call:
    """One caller, who waits for so many texts. `done` is its own: who gives up takes nothing from the others."""

    left: int
    done: "asyncio.Future[None]"


@dataclass(eq=False, slots=True)
class _Asked:
    """A text that the process has been asked for, by these callers. `outcome`: its row, or why there is none."""

    number: int
    key: Key
    bulk: bool
    calls: list[_Call] = field(default_factory=list)
    outcome: np.ndarray | str | None = None


class EncoderProcess:
    """One process for an encoder and any number of trained changes of it.

    Whoever of a tenant asks for a text at the same time shares one computation of it, and different texts share forward
    passes. Texts of the same turn of the event loop are one message, so that the first of them does not have a pass to
    itself while the others wait for its end. A process that dies is started again by the next text that needs it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        num_threads: int = 1,
        max_batch: int = 64,
        cache_texts: int = 10_000,
        gpu_share: float | None = None,
        restart_seconds: float = RESTART_SECONDS,
        loader: str = LOADER,
        identify: Identify | None = None,
        log_format: str = "text",
    ) -> None:
        """`gpu_share`: the most of the GPU's memory that the process may take, from 0 to 1."""
        self.folder = folder
        self.cache = EmbeddingCache(cache_texts)
        start = Start(str(folder), device, max_batch, loader, gpu_share, log_format)
        self._child = EncoderChild(start, num_threads, self._answered, self._lost, restart_seconds)
        self._identify = identify or _identify
        self._numbers = itertools.count()
        self._asked: dict[Key, _Asked] = {}
        self._by_number: dict[int, _Asked] = {}
        self._unsent: dict[tuple[str, bool], Embed] = {}  # by encoder and whether they are bulk

    @property
    def pid(self) -> int | None:
        """Process id, or None when none lives."""
        return self._child.pid

    async def start(self) -> None:
        """Start the process, and return at once: the encoder loads meanwhile, and texts wait until it has.

        Whether it could be loaded shows in `embed`. Raises EncoderUnavailable only after `close`.
        """
        self._child.revive()

    async def close(self) -> None:
        """End the process; texts in flight get EncoderUnavailable."""
        await self._child.close()
        self._lost(CLOSED)

    def encoder(self, change: Path | None = None) -> ServedEncoder:
        """The base encoder, or the one that the trained router in the folder `change` makes of it.

        Reads the weights' files once to know the id: 0.1 s for 90 MB. Raises EncoderUnavailable if they are not there.
        """
        try:
            identity, width = self._identify(self.folder, change)
        except (EncoderError, OSError) as error:
            raise EncoderUnavailable(str(error)) from error
        return ServedEncoder(self, identity, width, change)

    def plain_encoder(self) -> ServedEncoder:
        """The base encoder without routing's instruction before the texts. Raises EncoderUnavailable."""
        base = self.encoder()
        return ServedEncoder(self, plain_id(base.id), base.width, None, plain=True)

    async def embed(
        self, encoder: ServedEncoder, texts: Sequence[str], *, tenant: str = "", bulk: bool = False
    ) -> np.ndarray:
        """What `encoder.embed` does."""
        keys = [text_key(encoder.id, tenant, text) for text in texts]
        rows: dict[Key, np.ndarray] = {}
        missing: dict[Key, str] = {}
        for key, text in zip(keys, texts, strict=True):
            row = self.cache.get(key)
            if row is None:
                missing[key] = text
            else:
                rows[key] = row
        if missing:
            rows |= await self._compute(encoder, missing, tenant, bulk)
        found = np.empty((len(keys), encoder.width), dtype=np.float32)
        for index, key in enumerate(keys):
            found[index] = rows[key]
        return found

    async def _compute(
        self, encoder: ServedEncoder, missing: Mapping[Key, str], tenant: str, bulk: bool
    ) -> dict[Key, np.ndarray]:
        self._child.revive()
        call = _Call(len(missing), asyncio.get_running_loop().create_future())
        asked = self._ask(encoder, missing, tenant, bulk, call)
        try:
            await call.done
        finally:
            self._leave(asked, call)
        rows: dict[Key, np.ndarray] = {}
        for entry in asked:
            outcome = entry.outcome
            assert outcome is not None
            if isinstance(outcome, str):
                raise EncoderUnavailable(outcome)
            if outcome.shape != (encoder.width,):
                raise EncoderUnavailable(f"the encoder gives {outcome.size} numbers a text, expected {encoder.width}")
            rows[entry.key] = outcome
        return rows

    def _ask(
        self, encoder: ServedEncoder, missing: Mapping[Key, str], tenant: str, bulk: bool, call: _Call
    ) -> list[_Asked]:
        """Join those that are on their way, hurrying what was bulk until now, and send for the others."""
        asked: list[_Asked] = []
        hurried: list[int] = []
        for key, text in missing.items():
            entry = self._asked.get(key)
            if entry is None:
                entry = self._asked[key] = _Asked(next(self._numbers), key, bulk)
                self._by_number[entry.number] = entry
                self._write_down(encoder, entry.number, text, tenant, bulk)
            elif entry.bulk and not bulk:
                entry.bulk = False
                hurried.append(entry.number)
            entry.calls.append(call)
            asked.append(entry)
        if hurried:
            self._send(Hurry(hurried))
        return asked

    def _write_down(self, encoder: ServedEncoder, number: int, text: str, tenant: str, bulk: bool) -> None:
        """The text goes with all others of this turn of the event loop."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send)
        kind = (encoder.id, bulk)
        if kind not in self._unsent:
            change = None if encoder.change is None else str(encoder.change)
            self._unsent[kind] = Embed(encoder.id, change, [], [], [], bulk, encoder.plain)
        self._unsent[kind].numbers.append(number)
        self._unsent[kind].tenants.append(tenant)
        self._unsent[kind].texts.append(
            text.encode("utf-8", "replace").decode("utf-8")
        )  # MessagePack has no surrogates

    def _send(self, *messages: Hurry | Forget) -> None:
        """First the texts, which the messages may be about."""
        unsent, self._unsent = self._unsent, {}
        for message in (*unsent.values(), *messages):
            self._child.send(message)

    def _leave(self, asked: Iterable[_Asked], call: _Call) -> None:
        """A caller waits no longer; what nobody waits for need not be computed."""
        forgotten: list[int] = []
        for entry in asked:
            if entry.outcome is not None:
                continue
            entry.calls.remove(call)
            if not entry.calls:
                self._drop(entry)
                forgotten.append(entry.number)
        if forgotten:
            self._send(Forget(forgotten))

    def _answered(self, message: Embedded | Failed) -> None:
        if isinstance(message, Failed):
            for number in message.numbers:
                self._settle(number, message.message)
            return
        matrix = np.frombuffer(message.vectors, dtype=np.float32).reshape(len(message.numbers), message.width)
        for number, row in zip(message.numbers, matrix, strict=True):
            kept = row.copy()  # a view would keep the whole pass in memory
            kept.setflags(write=False)
            self._settle(number, kept)

    def _settle(self, number: int, outcome: np.ndarray | str) -> None:
        entry = self._by_number.get(number)
        if entry is None:  # everybody who waited has left
            return
        self._drop(entry)
        if not isinstance(outcome, str) and not entry.bulk:
            self.cache.put(entry.key, outcome)
        entry.outcome = outcome
        for call in entry.calls:
            call.left -= 1
            if not call.left and not call.done.done():
                call.done.set_result(None)

    def _drop(self, entry: _Asked) -> None:
        del self._by_number[entry.number]
        del self._asked[entry.key]

    def _lost(self, reason: str) -> None:
        self._unsent = {}
        for number in list(self._by_number):
            self._settle(number, reason)


def _identify(folder: Path, change: Path | None) -> tuple[str, int]:
    return encoder_id(folder, change), encoder_width(folder)
