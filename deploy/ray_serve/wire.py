"""What front ends and engine replicas tell each other, in MessagePack within Ray's calls."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from server.engine.config import EngineInfo, EngineStats
from server.engine.messages import Refusal
from server.engine.placement import Wanted
from server.engine.sequence import Output, Request


@dataclass(frozen=True)
class Hint:
    """What the request router needs of a call, its first argument. Replicas are given by their unique ids.

    `wanted`: what a request would find well near, its digests shortened; `key` tells it from all others. Without it a
    call is for `target`, or for any replica if that one is gone. `avoid`: these have lost the request before. `front`:
    who calls.
    """

    wanted: Wanted | None = None
    key: str = ""
    target: str | None = None
    avoid: tuple[str, ...] = ()
    front: str = ""


def wanted_by(request: Request) -> Wanted:
    """What a request would find well near."""
    wanted = Wanted.by(request)
    return replace(wanted, digests=tuple(map(shortened, wanted.digests)))


def shortened(digest: str) -> str:
    """Enough of it to place requests by: a replica reports all adapters in its memory every second."""
    return digest[:16]


class Part(msgspec.Struct):
    """Of the answer to a request, what came at once.

    `refusal`: the engine does not take it, or does not take it any more. `lost`: it could not be answered here, and may
    be elsewhere; with `crashed` an engine process died while it had it in hand.
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
