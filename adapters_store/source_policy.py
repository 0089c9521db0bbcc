"""What a registration may read, and what is said when it may not or cannot."""

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.archive import ArchiveLimits
from adapters_store.contents import ROUTER
from adapters_store.model_card import CARD_NAME
from adapters_store.peft_config import MAX_CONFIG_BYTES
from adapters_store.peft_format import CONFIG_NAME, MAX_WEIGHTS_BYTES, WEIGHTS_NAME
from adapters_store.samples_file import MAX_SAMPLES_BYTES, SAMPLES_NAME
from adapters_store.types import AdapterError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAX_CARD_BYTES = 1 << 20


def resolve_host(host: str, port: int) -> list[str]:
    """Every address of a host, as the system resolves it. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True)
class SourcePolicy:
    """What a registration may read; by default nothing. Another one is made for each kind of caller.

    `file_roots`: folders below which file:// may read. `https_hosts`: `host` (port 443) or `host:port`, lower case.
    `s3_buckets`: buckets that the server's credentials may read for the caller. `hub_endpoint`: None switches hf://
    off; `hub_token` reads private repositories. `networks`: networks to which https:// may connect although they are
    not public; `ssl_context`: None trusts the system's authorities. `max_bytes` bounds the weights. `timeout`: seconds
    of silence; `deadline`: seconds for a whole source.
    """

    file_roots: tuple[Path, ...] = ()
    https_hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    s3_buckets: frozenset[str] = frozenset()
    s3_endpoint: str | None = None
    s3_region: str | None = None
    hub_endpoint: str | None = None
    hub_token: str | None = None
    max_bytes: int = MAX_WEIGHTS_BYTES
    timeout: float = 30.0
    deadline: float = 1800.0
    ssl_context: ssl.SSLContext | None = None
    resolve: Callable[[str, int], list[str]] = resolve_host
    clock: Callable[[], float] = time.monotonic

    @property
    def archive_limits(self) -> ArchiveLimits:
        return ArchiveLimits(max_bytes=self.max_bytes + (64 << 20))

    def limit_of(self, name: str) -> int:
        """Most bytes of one file of an adapter or a router, or of an archive for any other name."""
        limits = {
            CONFIG_NAME: MAX_CONFIG_BYTES,
            WEIGHTS_NAME: self.max_bytes,
            CARD_NAME: _MAX_CARD_BYTES,
            SAMPLES_NAME: MAX_SAMPLES_BYTES,
            ROUTER.config: MAX_CONFIG_BYTES,
            ROUTER.weights: self.max_bytes,
        }
        return limits.get(name, self.archive_limits.max_bytes)


def source_not_allowed(message: str, expected: str) -> AdapterError:
    """403: the policy does not let the caller read there. `expected` names the setting that would."""
    return AdapterError("source_not_allowed", f"{message}: expected {expected}", 403)


def source_unavailable(message: str) -> AdapterError:
    """503: the same source may be readable later."""
    return AdapterError("source_unavailable", message, 503)
