"""Groups of settings beside those of `loramux serve`, and how sizes are written in all of them."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator

from server.engine.config import GIB

DEFAULT_ENCODER = "all-minilm-l6-v2"
UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_size(value: object) -> object:
    """Bytes from `2GiB`, `500MB`, a plain number; None from `auto`. Raises ValueError for anything else."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "auto":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in UNITS:
        raise ValueError("expected a size such as 2GiB or 500MB, or auto")
    return int(float(match[1]) * UNITS[match[2]])


def as_list(value: object) -> object:
    """One text alone is a list of one."""
    return (value,) if isinstance(value, str) else value


Size = Annotated[int | None, Field(ge=1), BeforeValidator(parse_size)]
Key = Annotated[SecretStr, Field(min_length=1)]


class LimitSettings(BaseModel):
    """What one request may ask for. Bytes, counts; `messages` with all parts of their contents, `prompt_logprobs` over
    all tokens of all its prompts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int = Field(default=16 * 2**20, ge=1024)
    n: int = Field(default=16, ge=1)
    messages: int = Field(default=8192, ge=1)
    prompts: int = Field(default=128, ge=1)
    inputs: int = Field(default=2048, ge=1)
    prompt_logprobs: int = Field(default=2**18, ge=1)
    adapters: int = Field(default=256, ge=1)
    uploads: int = Field(default=4, ge=1)


class HttpSettings(BaseModel):
    """How answers travel. Seconds.

    `cors_origins`: pages of these origins may call, `*` means all; none by default. `keep_alive`: a stream that was
    silent for so long sends a comment, 0 sends none. `reader_timeout`: a stream whose reader took nothing for so long
    ends. `request_timeout`: headers or a body that have not come by then, and hardly get on, are given up.
    `idle_timeout`: a connection without requests for so long is closed; a proxy before the server should give its own
    up sooner. Beyond `max_connections`, or what the limit of descriptors allows, connections are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cors_origins: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    keep_alive: float = Field(default=15.0, ge=0, allow_inf_nan=False)
    reader_timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    request_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    idle_timeout: int = Field(default=75, ge=1)
    max_connections: int = Field(default=16_384, ge=1)

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"{origin} is no origin, expected * or the form https://app.example.com")
        return value


class RoutingSettings(BaseModel):
    """How adapters are chosen from the prompt.

    `encoder` is a pulled encoder, a sentence-transformers folder or hub id, or `none`; `device` auto is the engine's.
    `gpu_share` is the most of the GPU's memory that it may take; `min_score` None is what was calibrated for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str = DEFAULT_ENCODER
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1)
    gpu_share: float = Field(default=0.05, gt=0, le=1)
    top_k: int = Field(default=3, ge=1, le=256)
    min_score: float | None = Field(default=None, ge=-1, le=1)
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    cached_texts: int = Field(default=10_000, ge=0)


class SourceSettings(BaseModel):
    """Where adapters may be fetched from, and how much, in bytes and seconds.

    `https_hosts` are names, with a port that is not 443 as `name:8443`. Credentials of buckets are AWS's own variables.
    An empty `hub_endpoint` switches hf:// off. Tenants' own registrations use neither the buckets nor the token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    https_hosts: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    s3_buckets: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    s3_endpoint: str | None = None
    s3_region: str | None = None
    hub_endpoint: str = "https://huggingface.co"
    hub_token: Key | None = None
    max_adapter_bytes: Annotated[int, Field(ge=1), BeforeValidator(parse_size)] = 2 * GIB
    timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
