"""Every setting: one frozen tree, read once from command line, environment and file. Nothing else reads these.

The option `--max-num-seqs` of `loramux serve` is the field `serve.max_num_seqs`: `max_num_seqs` under `[serve]` in the
TOML file, `LORAMUX_SERVE__MAX_NUM_SEQS` in the environment. The command line wins, then the environment, then the file.
"""

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
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
from server.config_groups import DEFAULT_ENCODER as DEFAULT_ENCODER
from server.config_groups import HttpSettings as HttpSettings
from server.config_groups import Key, Size, as_list
from server.config_groups import LimitSettings as LimitSettings
from server.config_groups import RoutingSettings as RoutingSettings
from server.config_groups import SourceSettings as SourceSettings
from server.config_groups import parse_size as parse_size
from server.engine.config import GIB, MOST_BATCH_TOKENS, EngineConfig
from server.otel_environment import otlp_endpoint, traces_url

PREFIX = "LORAMUX_"
SHORT_KEYS = {"LORAMUX_API_KEY": "api_key", "LORAMUX_ADMIN_KEY": "admin_key"}
CLIENT_VARIABLES = frozenset({"LORAMUX_URL"})
"""What commands read that talk to a server."""
KUBERNETES = re.compile(r"LORAMUX_(SERVICE_(HOST|PORT)|PORT_\d+_|PORT=(tcp|udp)://)")
"""What Kubernetes sets in every pod beside a Service of our name."""


class SettingsError(ValueError):
    """A setting that is unknown or has no meaning. The message is one line that names it."""


class ServeSettings(BaseModel):
    """What `loramux serve` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    served_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    adapters: Path | None = None
    adapter_root: Annotated[tuple[Path, ...], BeforeValidator(as_list)] = ()
    database_url: str | None = None
    blob_url: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    api_key: Annotated[tuple[Key, ...], BeforeValidator(as_list)] = ()
    admin_key: Key | None = None
    metrics_key: Key | None = None
    metrics_public: bool = False
    metrics_max_adapters: int = Field(default=100, ge=1, le=10_000)
    default_router: str = "retriever"
    tool_parser: Literal["auto", "hermes", "llama3_json", "mistral"] = "auto"
    engines: int = Field(default=1, ge=1, le=64)
    frontends: int = Field(default=1, ge=1, le=64)
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
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_prompts: bool = False
    otlp_endpoint: Annotated[str, AfterValidator(traces_url)] | None = None
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
            log_format=self.log_format,
            log_level=self.log_level,
        )


class Settings(BaseSettings):
    """The tree."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix=PREFIX, env_nested_delimiter="__")

    data_dir: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "loramux")
    serve: ServeSettings = Field(default_factory=ServeSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    http: HttpSettings = Field(default_factory=HttpSettings)
    sources: SourceSettings = Field(default_factory=SourceSettings)
    routing: RoutingSettings = Field(default_factory=RoutingSettings)

    def revealed(self) -> bytes:
        """All of it as JSON, secrets too: for another process of this server, and nobody else."""
        return json.dumps(self.model_dump(), default=_plain).encode()

    @classmethod
    def restored(cls, data: bytes) -> "Settings":
        """What was `revealed`, whatever this process's environment says."""
        return cls(**json.loads(data))

    @property
    def secrets(self) -> tuple[str, ...]:
        """What nobody is to read in a log."""
        keys = (*self.serve.api_key, self.serve.admin_key, self.serve.metrics_key, self.sources.hub_token)
        password = urlsplit(self.serve.database_url or "").password
        return (*(key.get_secret_value() for key in keys if key is not None), *((password,) if password else ()))

    @property
    def router_folder(self) -> Path:
        """Of trained routers' files, which can be made again."""
        return self.data_dir / "routers"


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
            short = InitSettingsSource(settings_cls, {"serve": known} if known else {})
            toml = (TomlConfigSettingsSource(settings_cls, file),) if file is not None else ()
            return (init_settings, env_settings, short, *toml)

    if file is not None and not file.is_file():
        raise SettingsError(f"--config {file}: there is no such file")
    try:
        known = _short_names()
        settings = FromSources(**(overrides or {}))
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"--config {file}: cannot be read as TOML ({error})") from error
    except ValueError as error:  # an environment variable that is no JSON
        raise SettingsError(f"cannot read the settings: {error}") from error
    return settings


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _short_names() -> dict[str, str]:
    """Settings of `serve` that have another name in the environment, too. Raises ValueError."""
    endpoint = otlp_endpoint(os.environ)
    keys = {field: os.environ[name] for name, field in SHORT_KEYS.items() if os.environ.get(name)}
    return keys if endpoint is None else keys | {"otlp_endpoint": endpoint}


def _check_environment() -> None:
    """pydantic-settings ignores variables that match no field; here a misspelt one is an error."""
    known = {_variable(name): name for name in _names()}
    for name, value in os.environ.items():
        if (
            not name.startswith(PREFIX)
            or name in {*SHORT_KEYS, *CLIENT_VARIABLES}
            or KUBERNETES.match(f"{name}={value}")
        ):
            continue
        if name.upper() not in known:
            meant = _meant(name.removeprefix(PREFIX).replace("__", ".").lower(), list(known.values()))
            hint = f", did you mean {_variable(meant)}?" if meant else ""
            raise SettingsError(f"environment variable {name} is no setting of loramux{hint}")


def _names() -> Iterator[str]:
    """Dotted names of all settings, such as `serve.port`."""
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            yield from (f"{name}.{inner}" for inner in group.model_fields)
        else:
            yield name


def _variable(name: str) -> str:
    """The setting's name in the environment."""
    return f"{PREFIX}{name.replace('.', '__')}".upper()


def _meant(name: str, known: Sequence[str]) -> str | None:
    """What somebody meant who wrote `name`: the same setting of another group, or one spelled much like it."""
    elsewhere = [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]]
    close = elsewhere or get_close_matches(name, known, 1, 0.8)
    return close[0] if close else None


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        meant = _meant(name, [*_names(), *Settings.model_fields])
        return f"unknown setting {name}" + (f", did you mean {meant}?" if meant else "")
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
