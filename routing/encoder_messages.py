"""What crosses the boundary between a server and its encoder process: msgspec messages in MessagePack."""

import msgspec


class Start(msgspec.Struct, tag=True):
    """To the encoder, first: load the encoder in `folder` with `loader`, "module:attribute", onto `device`.

    The device `auto` is a GPU where there is one. `log_format` is `text` or `json`.
    """

    folder: str
    device: str
    max_batch: int
    loader: str
    gpu_share: float | None = None
    log_format: str = "text"


class Embed(msgspec.Struct, tag=True):
    """To the encoder: texts, each with a number of its own and of one of the `tenants`, for the encoder of this id,
    which is base plus `change`.

    `plain` texts are embedded as they are, without the instruction that routing puts before them. Every number is
    answered once, by an `Embedded` or a `Failed`, unless a `Forget` came in time.
    """

    encoder: str
    change: str | None
    numbers: list[int]
    texts: list[str]
    tenants: list[str]
    bulk: bool
    plain: bool = False


class Hurry(msgspec.Struct, tag=True):
    """To the encoder: somebody waits for these now, which were sent as bulk. Answered ones are ignored."""

    numbers: list[int]


class Forget(msgspec.Struct, tag=True):
    """To the encoder: nobody waits for these any more. Answered ones are ignored."""

    numbers: list[int]


class Ready(msgspec.Struct, tag=True):
    """From the encoder: the base encoder is loaded."""


class StartFailed(msgspec.Struct, tag=True):
    """From the encoder: it cannot start, and why in one sentence. The process ends."""

    message: str


class Embedded(msgspec.Struct, tag=True):
    """From the encoder: `vectors` holds one row of `width` float32 in native byte order for each number."""

    numbers: list[int]
    width: int
    vectors: bytes


class Failed(msgspec.Struct, tag=True):
    """From the encoder: these cannot be embedded, and why in one sentence."""

    numbers: list[int]
    message: str


ToEncoder = Start | Embed | Hurry | Forget
FromEncoder = Ready | StartFailed | Embedded | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_encoder = msgspec.msgpack.Decoder(ToEncoder).decode
decode_from_encoder = msgspec.msgpack.Decoder(FromEncoder).decode
