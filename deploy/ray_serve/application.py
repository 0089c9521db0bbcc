"""The application: a deployment of front ends, and one of engines."""

from collections.abc import Callable, Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deploy.ray_serve.affinity import AffinityRouter
from deploy.ray_serve.engine_replica import EngineReplica
from deploy.ray_serve.front_end import front_end
from deploy.ray_serve.settings import RaySettings, read_settings
from server.config import Settings, SettingsError
from server.engine.client import EngineClient
from server.engine.config import EngineConfig
from server.engine.placement import SLACK

ENGINES = "engines"
FRONT_ENDS = "front-ends"
CONSTRUCTIONS = 3
"""Tries to start a replica before a deployment fails; Ray counts 20, which hides a wrong setting for minutes."""
LEAST_LOOK_BACK = 2.0
STATS_SECONDS = 1.0
DRAIN_MARGIN = 10.0
"""Seconds that a replica gets beyond what its requests have, to end them and itself."""


def app(arguments: Mapping[str, Any]) -> Application:
    """What `serve run deploy.ray_serve:app name=value ...` and `serve deploy` run. Raises SettingsError.

    Serve's own options say where it listens, which nobody knows here: without keys somebody has to say that this is
    meant.
    """
    settings, spread = read_settings(arguments)
    if settings.serve.is_open and not settings.serve.insecure:
        raise SettingsError("no key is set: give LORAMUX_ADMIN_KEY, or insecure=true if everybody may use this server")
    return build(settings, spread)


def build(
    settings: Settings,
    spread: RaySettings,
    make_engine: Callable[[EngineConfig, float], EngineClient] = EngineClient,
) -> Application:
    """The application with these settings. `make_engine` makes a replica's engine client, as `EngineClient` does."""
    engines = _engines(settings, spread).bind(settings, make_engine)
    return _front_ends(settings, spread).bind(engines)


def _engines(settings: Settings, spread: RaySettings) -> Any:
    config = settings.serve
    cpus = spread.cpus_per_engine if spread.cpus_per_engine is not None else float(config.num_threads or 1)
    gpus = spread.gpus_per_engine if spread.gpus_per_engine is not None else float(config.device == "cuda")
    return serve.deployment(EngineReplica).options(
        name=ENGINES,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # Requests wait in the engine, which is fair to tenants; Serve's own queue is not.
        max_ongoing_requests=config.max_num_seqs + config.max_waiting,
        max_constructor_retry_count=CONSTRUCTIONS,
        autoscaling_config={
            "min_replicas": spread.min_engines,
            "max_replicas": spread.max_engines,
            "target_ongoing_requests": spread.requests_per_engine or config.max_num_seqs,
            "look_back_period_s": max(spread.upscale_delay, LEAST_LOOK_BACK),
            "upscale_delay_s": spread.upscale_delay,
            "downscale_delay_s": spread.downscale_delay,
        },
        request_router_config=RequestRouterConfig(
            request_router_class=AffinityRouter,
            # Ranks go on counting while replicas are replaced.
            request_router_kwargs={"engines": 2 * spread.max_engines, "slack": SLACK},
            request_routing_stats_period_s=STATS_SECONDS,
        ),
        graceful_shutdown_timeout_s=config.shutdown_timeout + DRAIN_MARGIN,
    )


def _front_ends(settings: Settings, spread: RaySettings) -> Any:
    config = settings.serve
    return serve.deployment(serve.ingress(front_end(settings, ENGINES))()).options(
        name=FRONT_ENDS,
        num_replicas=spread.front_ends,
        ray_actor_options={"num_cpus": spread.cpus_per_front_end},
        max_ongoing_requests=config.max_num_seqs + config.max_waiting,
        max_constructor_retry_count=CONSTRUCTIONS,
        graceful_shutdown_timeout_s=config.shutdown_timeout + DRAIN_MARGIN,
    )
