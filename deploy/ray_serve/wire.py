"""What front ends and engine replicas tell each other, in MessagePack within Ray's calls."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from server.engine.config import EngineInfo, EngineStats
from server.engine.messages import Refusal
from server.engine.sequence import Output, Request


@dataclass(frozen=True)
class Hint:
    """What the request router needs of a call, its first argument. Replicas are given by their unique ids.

    `target`: the call is for this one, or for any if it is gone. `avoid`: these have lost the request before.
    """

    target: str | None = None
    avoid: tuple[str, ...] = ()


class Part(msgspec.Struct):
    """Of the answer to a request, what came at once.

    `refusal`: the engine does not take it, or does not take it any more. `lost`: it could not be answered here, and may
    be elsewhere; with `crashed` it was in flight when an engine process died.
    """

    replica: str
    outputs: list[Output] = []
    refusal: Refusal | None = None
    lost: str | None = None
    crashed: bool = False

    @property
    def is_last(self) -> bool:
        if self.refusal is not None or self.lost is not None:
            return True
        return any(output.finish_reason is not None for output in self.outputs)


class Report(msgspec.Struct):
    """An engine's state. `tiers`: of adapters that moved since the `version` that was asked for, or of all."""

    replica: str
    alive: bool
    stalled: bool
    stats: EngineStats
    version: int
    tiers: Mapping[str, str]


encode = msgspec.msgpack.Encoder().encode
decode_info = msgspec.msgpack.Decoder(EngineInfo).decode
decode_part = msgspec.msgpack.Decoder(Part).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
decode_request = msgspec.msgpack.Decoder(Request).decode
