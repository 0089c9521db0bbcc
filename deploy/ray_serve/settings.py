"""How an application is spread over a Ray cluster, and what it cannot be served with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.config import Settings, SettingsError, load_settings

PREFIX = "ray_"
"""Of this module's settings among the arguments of an application; the others are those of `loramux serve`."""


class RaySettings(BaseModel):
    """Replicas, and what each of them takes of its machine.

    An engine replica is added when more than `requests_per_engine` requests (None: `max_num_seqs`) for each of them run
    or wait during `upscale_delay` seconds, and taken away after `downscale_delay` seconds with too few.
    `cpus_per_engine` None: `num_threads`, or 1. `gpus_per_engine` None: 1 with `device` cuda, else 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    front_ends: int = Field(default=1, ge=1, le=64)
    cpus_per_front_end: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    min_engines: int = Field(default=1, ge=1, le=1024)
    max_engines: int = Field(default=1, ge=1, le=1024)
    cpus_per_engine: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    gpus_per_engine: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    requests_per_engine: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    upscale_delay: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    downscale_delay: float = Field(default=300.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _in_order(self) -> "RaySettings":
        if self.min_engines > self.max_engines:
            raise ValueError(
                f"ray_min_engines is {self.min_engines}, expected at most ray_max_engines, {self.max_engines}"
            )
        return self


def read_settings(arguments: Mapping[str, Any]) -> tuple[Settings, RaySettings]:
    """The settings of an application from its arguments: `ray_*` are of this module, `data_dir`, `limits`, `http`,
    `sources` and `routing` as in the TOML file, `config` is such a file, all others are those of `loramux serve`.

    Raises SettingsError.
    """
    given = dict(arguments)
    file = given.pop("config", None)
    spread = {name.removeprefix(PREFIX): given.pop(name) for name in tuple(given) if name.startswith(PREFIX)}
    top = {name: given.pop(name) for name in tuple(given) if name in Settings.model_fields and name != "serve"}
    if "encoder" in given:
        top["routing"] = {**top.get("routing", {}), "encoder": given.pop("encoder")}
    settings = load_settings(top | ({"serve": given} if given else {}), Path(file) if file is not None else None)
    try:
        ray = RaySettings(**spread)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = "".join(f"{PREFIX}{part}: " for part in first["loc"])
        raise SettingsError(name + first["msg"].removeprefix("Value error, ")) from None
    check(settings)
    return settings, ray


def check(settings: Settings) -> None:
    """Raise SettingsError for what cannot be shared by several machines."""
    if settings.serve.model is None:
        raise SettingsError("no model is given: expected model=FOLDER, a pulled model or a hub id")
    if settings.serve.frontends != 1:
        raise SettingsError("frontends: each replica is one, expected ray_front_ends")
    if settings.serve.engines != 1:
        raise SettingsError("engines: each replica has one, expected ray_min_engines and ray_max_engines")
    database, blobs = settings.serve.database_url, settings.serve.blob_url
    if database is None or not database.startswith(("postgresql:", "postgresql+", "postgres:")):
        raise SettingsError(
            "database_url: front ends and engines share one registry, and SQLite is a file of one machine:"
            " expected postgresql://..."
        )
    if blobs is None or not blobs.startswith("s3://"):
        raise SettingsError(
            "blob_url: every engine fetches adapters from one store, and a folder is on one machine:"
            " expected s3://bucket/prefix"
        )
