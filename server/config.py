"""Every setting: one frozen tree, read once from command line, environment and file. Nothing else reads these.

The option `--max-num-seqs` of `loramux serve` is the field `serve.max_num_seqs`: `max_num_seqs` under `[serve]` in the
TOML file, `LORAMUX_SERVE__MAX_NUM_SEQS` in the environment. The command line wins, then the environment, then the file.
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from adapters_store.store_config import StoreConfig
from adapters_store.types import AdapterLimits
from server.engine.config import GIB, MOST_BATCH_TOKENS, EngineConfig

PREFIX = "LORAMUX_"
SHORT_KEYS = {"LORAMUX_API_KEY": "api_key", "LORAMUX_ADMIN_KEY": "admin_key"}
CLIENT_VARIABLES = frozenset({"LORAMUX_URL"})
"""What commands read that talk to a server."""
KUBERNETES = re.compile(r"LORAMUX_(SERVICE_(HOST|PORT)|PORT_\d+_|PORT=(tcp|udp)://)")
"""What Kubernetes sets in every pod beside a Service of our name."""
DEFAULT_ENCODER = "all-minilm-l6-v2"
UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class SettingsError(ValueError):
    """A setting that is unknown or has no meaning. The message is one line that names it."""


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


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Size = Annotated[int | None, Field(ge=1), BeforeValidator(parse_size)]
Key = Annotated[SecretStr, Field(min_length=1)]


class ServeSettings(BaseModel):
    """What `loramux serve` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    served_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    adapters: Path | None = None
    adapter_root: Annotated[tuple[Path, ...], BeforeValidator(_as_list)] = ()
    database_url: str | None = None
    blob_url: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    api_key: Annotated[tuple[Key, ...], BeforeValidator(_as_list)] = ()
    admin_key: Key | None = None
    metrics_key: Key | None = None
    metrics_public: bool = False
    metrics_max_adapters: int = Field(default=100, ge=1, le=10_000)
    default_router: str = "retriever"
    tool_parser: Literal["auto", "hermes", "llama3_json", "mistral"] = "auto"
    engines: int = Field(default=1, ge=1, le=64)
    max_num_seqs: int = Field(default=64, ge=1, le=4096)
    max_batch_tokens: int = Field(default=512, ge=1, le=MOST_BATCH_TOKENS)
    max_model_len: int | None = Field(default=None, ge=1)
    kv_memory: Size = None
    page_memory: Size = None
    host_memory: Size = 4 * GIB
    gate_slots: int = Field(default=4, ge=0, le=64)
    max_layered_tokens: int = Field(default=4096, ge=1, le=MOST_BATCH_TOKENS)
    gates_per_slot: int = Field(default=64, ge=1, le=256)
    prefix_cache: bool = True
    num_threads: int | None = Field(default=None, ge=1)
    cuda_graphs: Literal["capture", "lazy", "eager"] = "capture"
    kernel_cache: Path | None = None
    shutdown_timeout: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    stall_timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    max_waiting: int = Field(default=4096, ge=1)
    insecure: bool = False

    @model_validator(mode="after")
    def _not_open_to_the_world(self) -> "ServeSettings":
        if self.is_open and not (is_loopback(self.host) or self.insecure):
            raise ValueError(
                f"host {self.host} is reachable from elsewhere and no key is set:"
                " give --api-key or --admin-key, or --insecure if everybody may use this server"
            )
        return self

    @model_validator(mode="after")
    def _reserved_names(self) -> "ServeSettings":
        if self.served_name is not None and (self.served_name == "auto" or self.served_name.startswith("auto:")):
            raise ValueError("served_name auto is reserved for routers, expected another name")
        return self

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not (self.api_key or self.admin_key)

    def store_config(self, served_name: str, data_dir: Path, max_adapter_bytes: int = 2 * GIB) -> StoreConfig:
        """Where adapters are kept: below the data folder, by the served name, unless the two URLs say otherwise."""
        name = served_name.replace("/", "--")
        return StoreConfig(
            database_url=self.database_url or f"sqlite:///{data_dir / 'registry' / name}.sqlite",
            blob_url=self.blob_url or str(data_dir / "blobs" / name),
            folder=data_dir / "store" / name,
            limits=AdapterLimits(max_bytes=max_adapter_bytes),
        )

    def engine_configs(self, model: Path, data_dir: Path) -> tuple[EngineConfig, ...]:
        """Those of all engines, for the model in a local folder."""
        return self.engine_config(model, data_dir).shared_out(self.engines, len(os.sched_getaffinity(0)))

    def engine_config(self, model: Path, data_dir: Path) -> EngineConfig:
        """What is given for all engines together, or for one."""
        return EngineConfig(
            model=str(model),
            device=self.device,
            dtype=self.dtype,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
            max_model_len=self.max_model_len,
            kv_memory=self.kv_memory,
            page_memory=self.page_memory,
            host_memory=self.host_memory or 4 * GIB,
            prefix_cache=self.prefix_cache,
            num_threads=self.num_threads,
            cuda_graphs=self.cuda_graphs,
            kernel_cache=str(self.kernel_cache or data_dir / "kernels"),
            gates="routing.token_router:TokenGateFactory",
            prompt_routers="routing.prompt_serving:PromptRouterFactory",
            gate_slots=self.gate_slots,
            max_layered_tokens=self.max_layered_tokens,
            gates_per_slot=self.gates_per_slot,
        )


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
    ends. `request_timeout`: headers or a body that have not come by then, and hardly get on, are given up. Beyond
    `max_connections`, or what the limit of descriptors allows, connections are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    keep_alive: float = Field(default=15.0, ge=0, allow_inf_nan=False)
    reader_timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    request_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
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

    An empty `hub_endpoint` switches hf:// off. Tenants' own registrations use neither the buckets nor the token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    https_hosts: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    s3_buckets: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    s3_endpoint: str | None = None
    s3_region: str | None = None
    hub_endpoint: str = "https://huggingface.co"
    hub_token: Key | None = None
    max_adapter_bytes: Annotated[int, Field(ge=1), BeforeValidator(parse_size)] = 2 * GIB
    timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)


class Settings(BaseSettings):
    """The tree."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix=PREFIX, env_nested_delimiter="__")

    data_dir: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "loramux")
    serve: ServeSettings = Field(default_factory=ServeSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    http: HttpSettings = Field(default_factory=HttpSettings)
    sources: SourceSettings = Field(default_factory=SourceSettings)
    routing: RoutingSettings = Field(default_factory=RoutingSettings)


def load_settings(overrides: Mapping[str, Any] | None = None, file: Path | None = None) -> Settings:
    """The settings from `overrides` (a tree; the command line's), the environment, `file` (TOML) and the defaults.

    Raises:
        SettingsError: a setting is unknown or has a value that it cannot have, or the file cannot be read.
    """
    _check_environment()

    class FromSources(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            keys = _short_keys()
            short = InitSettingsSource(settings_cls, {"serve": keys} if keys else {})
            toml = (TomlConfigSettingsSource(settings_cls, file),) if file is not None else ()
            return (init_settings, env_settings, short, *toml)

    if file is not None and not file.is_file():
        raise SettingsError(f"--config {file}: there is no such file")
    try:
        settings = FromSources(**(overrides or {}))
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None
    except (ValueError, OSError) as error:  # a file that is no TOML, an environment variable that is no JSON
        raise SettingsError(f"cannot read the settings: {error}") from error
    return settings


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _short_keys() -> dict[str, str]:
    return {field: os.environ[name] for name, field in SHORT_KEYS.items() if os.environ.get(name)}


def _check_environment() -> None:
    """pydantic-settings ignores variables that match no field; here a misspelt one is an error."""
    groups: dict[str, type[BaseModel]] = {
        "serve": ServeSettings,
        "limits": LimitSettings,
        "http": HttpSettings,
        "sources": SourceSettings,
        "routing": RoutingSettings,
    }
    for name, value in os.environ.items():
        if (
            not name.startswith(PREFIX)
            or name in {*SHORT_KEYS, *CLIENT_VARIABLES}
            or KUBERNETES.match(f"{name}={value}")
        ):
            continue
        group, _, field = name.removeprefix(PREFIX).lower().partition("__")
        known = field in groups[group].model_fields if group in groups else group in Settings.model_fields and not field
        if not known:
            raise SettingsError(f"environment variable {name} is no setting of loramux")


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
