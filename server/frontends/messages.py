"""What a parent and its front ends tell each other: msgspec messages in MessagePack."""

import msgspec

from server.engine.config import EngineInfo


class Begin(msgspec.Struct, tag=True):
    """To a front end, first. `settings` is the tree as JSON; `name` no other front end of this server ever has.

    `is_first`: no front end was there before it, so that it does what is done once.
    """

    settings: bytes
    port: int
    slot: int
    name: str
    is_first: bool


class EngineUp(msgspec.Struct, tag=True):
    """To a front end: this engine listens at `address`. `suspects`: how often engines died of what, by its key."""

    engine: int
    address: str
    info: EngineInfo
    suspects: dict[bytes, int]


class EngineDown(msgspec.Struct, tag=True):
    """To a front end: this engine is gone. Answered by `InFlight`."""

    engine: int
    reason: str


class Question(msgspec.Struct, tag=True):
    """To a front end: another one asks. Answered by `Answer`."""

    number: int
    topic: str
    data: bytes


class Answers(msgspec.Struct, tag=True):
    """To a front end: what the others answered to its `Ask`, as far as they live and were in time."""

    number: int
    answers: list[bytes]


class Turn(msgspec.Struct, tag=True):
    """To a front end: it is the turn of the suspect that it asked for, or it has been convicted."""

    number: int
    is_convicted: bool


class Drain(msgspec.Struct, tag=True):
    """To a front end: take no new requests, and leave when those that run have ended."""


class Stop(msgspec.Struct, tag=True):
    """To a front end: leave."""


class Ping(msgspec.Struct, tag=True):
    """To a front end: whether it is well. Answered by `Pong` at once."""


class Pong(msgspec.Struct, tag=True):
    """To the parent: it is."""


class Serving(msgspec.Struct, tag=True):
    """To the parent: requests can come. `line` is for whoever started the server."""

    line: str


class Failed(msgspec.Struct, tag=True):
    """To the parent: the front end cannot start, and why in one sentence. The process ends."""

    message: str


class InFlight(msgspec.Struct, tag=True):
    """To the parent: what the engine was asked that is gone, by keys."""

    engine: int
    keys: list[bytes]


class Stuck(msgspec.Struct, tag=True):
    """To the parent: the engine does not answer, or not so that it could be understood."""

    engine: int


class Proven(msgspec.Struct, tag=True):
    """To the parent: the engine has answered a request. Told once of each engine."""

    engine: int


class Ask(msgspec.Struct, tag=True):
    """To the parent, for all other front ends. `seconds`: how long answers may take; None as long as they do."""

    number: int
    topic: str
    data: bytes
    seconds: float | None


class Answer(msgspec.Struct, tag=True):
    """To the parent: the answer to a question."""

    number: int
    data: bytes


class TakeTurn(msgspec.Struct, tag=True):
    """To the parent: a suspect wants to run. Answered by `Turn`."""

    number: int
    key: bytes


class GiveTurn(msgspec.Struct, tag=True):
    """To the parent: it has run, or does not want to any more."""

    number: int


class Cleared(msgspec.Struct, tag=True):
    """To the parent: a suspect was answered. `number` is that of its turn, -1 where it had none."""

    key: bytes
    number: int


ToFront = Begin | EngineUp | EngineDown | Question | Answers | Turn | Ping | Drain | Stop
ToParent = Serving | Failed | Pong | InFlight | Stuck | Proven | Ask | Answer | TakeTurn | GiveTurn | Cleared

decode_to_front = msgspec.msgpack.Decoder(ToFront).decode
decode_to_parent = msgspec.msgpack.Decoder(ToParent).decode
