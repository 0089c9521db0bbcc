"""What crosses the boundary between the front end and an engine process: msgspec messages in MessagePack."""

import msgspec

from server.engine.config import EngineConfig, EngineInfo, EngineStats
from server.engine.sequence import Output, Request


class Start(msgspec.Struct, tag=True):
    """To the engine, first: load this."""

    config: EngineConfig


class Hello(msgspec.Struct, tag=True):
    """To the engine: a front end is there. It is told where all adapters are."""


class Left(msgspec.Struct, tag=True):
    """To the engine, from the process that started it: this front end is gone, and who waited for its answers."""

    front: str


class Submit(msgspec.Struct, tag=True):
    """To the engine: a new request. It is answered by `Output`s, or by one `Refusal`."""

    request: Request


class Abort(msgspec.Struct, tag=True):
    """To the engine: end a request. Unknown ids are ignored, since endings cross aborts on their way."""

    request_id: str


class ReadAhead(msgspec.Struct, tag=True):
    """To the engine: read these adapters (digest to folder) into host memory while there is nothing better to do."""

    paths: dict[str, str]


class Pin(msgspec.Struct, tag=True):
    """To the engine: keep an adapter on the device. Answered by a `Reply` whose value says whether there is room."""

    call: int
    digest: str
    path: str


class Unpin(msgspec.Struct, tag=True):
    """To the engine: undo `Pin`, if there was one."""

    digest: str


class Prefetch(msgspec.Struct, tag=True):
    """To the engine: bring an adapter as near as possible now. Answered by a `Reply` with its residency."""

    call: int
    digest: str
    path: str


class Evict(msgspec.Struct, tag=True):
    """To the engine: free an adapter's host memory, and its pages as soon as nothing uses them, unless it is pinned."""

    digest: str


class Shutdown(msgspec.Struct, tag=True):
    """To the engine: leave."""


class Ready(msgspec.Struct, tag=True):
    """From the engine: loaded, and this is what it is."""

    info: EngineInfo


class StartFailed(msgspec.Struct, tag=True):
    """From the engine: it cannot start, and why in one sentence. The process ends."""

    message: str


class Refusal(msgspec.Struct):
    """A request that the engine did not take."""

    request_id: str
    message: str
    param: str | None
    code: str


class Reply(msgspec.Struct):
    """The answer to the message with the same `call`: a value, or why there is none."""

    call: int
    value: bool | str = False
    error: str | None = None
    code: str = ""


class Update(msgspec.Struct, tag=True):
    """From the engine: all that one step brought, in one message. `residency`: tier by digest, where it changed.

    `taken`: requests that it begins to look at; told before it does, since it may die of them.
    """

    outputs: list[Output] = []
    refusals: list[Refusal] = []
    replies: list[Reply] = []
    residency: dict[str, str] = {}
    stats: EngineStats | None = None
    taken: list[str] = []


ToEngine = Start | Hello | Left | Submit | Abort | ReadAhead | Pin | Unpin | Prefetch | Evict | Shutdown
FromEngine = Ready | StartFailed | Update


def fronts_address(address: str) -> str:
    """Where an engine that takes its orders at `address` listens to front ends."""
    return f"{address}-fronts"


encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
