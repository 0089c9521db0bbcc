"""Sentence encoders in a process of their own; `python -m routing.encoder_process ADDRESS PARENT_PID`."""

import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import numpy as np
import zmq

from routing.encoder_messages import (
    Embed,
    Embedded,
    Failed,
    Forget,
    FromEncoder,
    Hurry,
    Ready,
    Start,
    StartFailed,
    ToEncoder,
    decode_to_encoder,
    encode,
)
from routing.encoder_text import Text
from routing.encoder_waiting import PassLimits, Waiting
from server.logs import configure

PARENT_POLL_SECONDS = 0.5
MOST_MODELS = 8
"""Trained changes kept in memory beside the base; each takes as much as the base."""

logger = logging.getLogger(__name__)


class Model(Protocol):
    """What the loop needs of an encoder; `routing.encoder_model.EncoderModel` is the real one."""

    id: str
    width: int
    max_tokens: int

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...

    def plain(self) -> "Model": ...

    def use_graphs(self) -> None: ...


class ChangedOnDisk(Exception):
    """A folder no longer holds the encoder that was asked for."""


class Models:
    """The base encoder and those of its changes that were used last. `load` raises what its loader raises."""

    def __init__(self, load: Callable[[str | None], Model], most: int = MOST_MODELS) -> None:
        self._load = load
        self._most = most
        self.base = load(None)
        self._changed: OrderedDict[str, Model] = OrderedDict()

    def get(self, encoder: str, change: str | None, plain: bool = False) -> Model:
        """The encoder with this id. Raises ChangedOnDisk and what the loader raises."""
        if plain:
            return _same(self.base.plain(), encoder, "the base encoder")
        if change is None:
            return _same(self.base, encoder, "the base encoder")
        model = self._changed.get(encoder)
        if model is None:
            model = _same(self._load(change), encoder, change)
            self._changed[encoder] = model
        self._changed.move_to_end(encoder)
        while len(self._changed) > self._most:
            self._changed.popitem(last=False)
        return model


class EncoderLoop:
    """Embeds what arrives, one forward pass at a time, until the process is ended."""

    def __init__(self, models: Models, waiting: Waiting, socket: "zmq.Socket[bytes]") -> None:
        self.models = models
        self.waiting = waiting
        self.socket = socket

    def run(self) -> None:
        while True:
            self.step()

    def step(self) -> None:
        """Take in what has arrived, then one pass."""
        self._receive()
        if taken := self.waiting.take():
            self._answer(taken)

    def _receive(self) -> None:
        """Take all messages that are there; with no text waiting, wait for one."""
        while self.socket.poll(0 if self.waiting else None):
            self._take(decode_to_encoder(self.socket.recv()))

    def _take(self, message: ToEncoder) -> None:
        if isinstance(message, Embed):
            longest = self.models.base.max_tokens
            for number, text, tenant in zip(message.numbers, message.texts, message.tenants, strict=True):
                entry = Text.of(number, message.encoder, message.change, text, longest, message.plain, tenant)
                self.waiting.add(entry, bulk=message.bulk)
        elif isinstance(message, Hurry):
            self.waiting.hurry(message.numbers)
        elif isinstance(message, Forget):
            self.waiting.forget(message.numbers)

    def _answer(self, taken: list[Text]) -> None:
        numbers = [text.number for text in taken]
        try:
            model = self.models.get(taken[0].encoder, taken[0].change, taken[0].plain)
        except BaseException as error:  # whatever is wrong with this encoder, also a panic in Rust, others go on
            send(self.socket, Failed(numbers, _sentence(error)))
            return
        try:
            send(self.socket, Embedded(numbers, model.width, _embed(model, taken)))
        except BaseException as error:
            if len(taken) > 1:  # one text must not fail those that happened to share its pass
                for text in taken:
                    self._answer([text])
                return
            logger.exception("a text of %d characters could not be embedded", len(taken[0].text))
            send(self.socket, Failed(numbers, f"the text could not be embedded ({_sentence(error)})"))


def _embed(model: Model, taken: Sequence[Text]) -> bytes:
    vectors = np.ascontiguousarray(model.embed([text.text for text in taken]), dtype=np.float32)
    if vectors.shape != (len(taken), model.width) or not np.isfinite(vectors).all():
        raise ValueError(f"expected {len(taken)} finite vectors of {model.width}, got shape {vectors.shape}")
    return vectors.tobytes()


def _same(model: Model, encoder: str, what: str) -> Model:
    if model.id != encoder:
        raise ChangedOnDisk(f"{what} on disk is {model.id} by now, expected {encoder}; restart the server")
    return model


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def send(socket: "zmq.Socket[bytes]", message: FromEncoder) -> None:
    socket.send(encode(message))


def chosen_device(name: str) -> str:
    """`auto` is a GPU where there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_models(start: Start, device: str) -> Models:
    """Load the base onto `device`. Raises what the loader raises."""
    if start.gpu_share is not None and device != "cpu":
        import torch

        torch.cuda.set_per_process_memory_fraction(start.gpu_share)
    module, _, path = start.loader.partition(":")
    loader = attrgetter(path)(importlib.import_module(module))

    def load(change: str | None) -> Model:
        model: Model = loader(Path(start.folder), None if change is None else Path(change), device=device)
        if device != "cpu":
            model.use_graphs()
        return model

    return Models(load)


def leave_with(parent: int) -> None:
    """End this process when `parent` is gone, whatever it does at that moment; a pass or a load may take seconds."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def main() -> int:
    """Connect to the server, load what it says, and serve it."""
    address, parent = sys.argv[1], int(sys.argv[2])
    for name in (signal.SIGINT, signal.SIGTERM):  # they may go to the whole group; the server decides when to stop
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 1000)
        socket.set_hwm(0)
        socket.connect(address)
        start = decode_to_encoder(socket.recv())
        if not isinstance(start, Start):
            raise TypeError(f"the first message must be Start, got {type(start).__name__}")
        configure(start.log_format, "encoder", level=logging.WARNING)
        try:
            device = chosen_device(start.device)
            models = load_models(start, device)
        except Exception as error:  # one sentence for whoever asks next, whatever a library raised
            send(socket, StartFailed(_sentence(error)))
            return 1
        send(socket, Ready())
        EncoderLoop(models, Waiting(PassLimits.of(device, start.max_batch)), socket).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
