"""`python -m deploy.ray_serve --model ...`: serve on a Ray cluster until SIGTERM or SIGINT.

Options are the settings of `loramux serve`, those of `RaySettings` as `--ray-*`, and `--address`: of a Ray cluster,
`auto` for the one that this machine belongs to; without it a cluster of this machine alone is started, and ended.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from server.config import ServeSettings, Settings, SettingsError

if TYPE_CHECKING:
    from deploy.ray_serve.settings import RaySettings

APPLICATION = "loramux"
OBJECT_STORE_BYTES = 80 * 2**20
"""Least that Ray takes; nothing of ours is an object of its store."""
DONE, FAILED, WRONG_USAGE = 0, 1, 2


def main(options: Sequence[str]) -> int:
    """The exit code."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        given = read_options(options)
        address = given.pop("address", None)
        from deploy.ray_serve.settings import read_settings

        settings, spread = read_settings(given)
    except (SettingsError, ValueError) as error:
        print(f"loramux: {error}", file=sys.stderr)
        return WRONG_USAGE
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        print("loramux: this command needs ray: run `pip install 'loramux[ray]'`", file=sys.stderr)
        return FAILED
    from server.serve import BindError

    try:
        with free_port(settings.serve) as port:
            return _serve(settings, spread, address, port)
    except BindError as error:
        print(f"loramux: {error}", file=sys.stderr)
        return FAILED


def _serve(settings: Settings, spread: "RaySettings", address: str | None, port: int) -> int:
    """Until a signal; the exit code."""
    import ray
    from ray import serve

    from deploy.ray_serve.application import build

    stop = threading.Event()
    start_ray(ray, address)
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has just put a handler of its own there, which aborts
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": settings.serve.host, "port": port, "location": "EveryNode"})
        serve.run(build(settings, spread), name=APPLICATION, route_prefix="/")
        print(f"loramux {version('loramux')} serves on http://{settings.serve.host}:{port}/v1", flush=True)
        stop.wait()
        serve.delete(APPLICATION)  # returns when all replicas have been drained
        return DONE
    except RuntimeError as error:
        print(f"loramux: {reason(serve.status(), str(error))}", file=sys.stderr)
        serve.delete(APPLICATION)
        return FAILED
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()


@contextmanager
def free_port(settings: ServeSettings) -> Iterator[int]:
    """The port that is set, or a free one, which is held until the block ends.

    Nobody listens there meanwhile but Serve, which shares ports. Ray opens hundreds of connections before, and one of
    them could get a port for its end that is not held.
    """
    if settings.port:
        yield settings.port
        return
    from server.frontends.parent import reserve

    with reserve(settings) as held:
        yield held.getsockname()[1]


def read_options(options: Sequence[str]) -> dict[str, Any]:
    """`--some-name value`, `--some-name=value` and `--some-flag` by name; what is repeated is a list.

    Raises ValueError.
    """
    given: dict[str, Any] = {}
    rest = list(options)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise ValueError(f"{name}: expected --NAME VALUE")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        key = name.removeprefix("--").replace("-", "_")
        before = given.get(key)
        given[key] = value if before is None else [*(before if isinstance(before, list) else [before]), value]
    return given


def reason(status: Any, otherwise: str) -> str:
    """Why replicas cannot start, by Serve's status: the last error of a traceback in it. One line."""
    application = status.applications.get(APPLICATION)
    messages = [each.message for each in application.deployments.values()] if application is not None else []
    errors = [
        line for message in messages for line in message.splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)
    ]
    return " ".join((errors[-1].partition(": ")[2] if errors else otherwise).split())


def start_ray(ray: Any, address: str | None) -> None:
    """Join the cluster at `address`, or start one on loopback."""
    if address is not None:
        ray.init(address=address, log_to_driver=False)
        return
    ray.init(
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
