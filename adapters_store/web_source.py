"""An adapter behind https://, read only from allowed hosts and public addresses."""

import ipaddress
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore

from adapters_store.source_policy import SourcePolicy, source_not_allowed, source_unavailable
from adapters_store.types import AdapterError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_REDIRECTS = 3
_ABSENT = (404, 410)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class WebFolder:
    """https:// of an allowed host; redirects and every address of each host are checked alike."""

    def __init__(self, source: str, policy: SourcePolicy) -> None:
        self._policy = policy
        self._url = source
        self._check(source)
        self._ssl_context = policy.ssl_context or ssl.create_default_context()

    @contextmanager
    def open(self, name: str) -> Iterator[Iterator[bytes] | None]:
        """The content of one file of the folder, None if there is none; the empty name is the source itself."""
        parts = urlsplit(self._url)
        url = parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl() if name else self._url
        network = _CheckedNetwork(self._policy)
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), self._policy.timeout)
        try:
            with httpcore.ConnectionPool(self._ssl_context, network_backend=network) as pool:
                for _ in range(_MAX_REDIRECTS + 1):
                    address, headers = self._request(url)
                    with pool.stream("GET", address, headers=headers, extensions={"timeout": timeouts}) as response:
                        location = self._judge(response)
                        if location is None:
                            yield None if response.status in _ABSENT else response.iter_stream()
                            return
                    url = urljoin(url, location)
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise source_unavailable("source cannot be read: its host does not answer as expected") from error
        raise source_unavailable(f"source redirects too often: expected at most {_MAX_REDIRECTS} times")

    def _request(self, url: str) -> tuple[httpcore.URL, list[tuple[bytes | str, bytes | str]]]:
        """What to ask of the host that was checked, taken from the very parts that were."""
        parts = self._check(url)
        target = quote(parts.path, safe="/%:@!$&'()*+,;=~") or "/"
        if parts.query:
            target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?")
        address = httpcore.URL(
            scheme=b"https", host=str(parts.hostname).encode(), port=parts.port or 443, target=target.encode()
        )
        return address, [("Host", parts.netloc), ("Accept-Encoding", "identity"), ("User-Agent", "loramux")]

    def _check(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or 443
        except ValueError:
            host, port, parts = "", 0, urlsplit("")
        if not host.isascii() or not host or parts.scheme != "https" or "@" in parts.netloc or not url.isprintable():
            message = "source, or a redirect of it, is not understood: expected https://host/path"
            raise AdapterError("bad_source", message, 400)
        if (host if port == 443 else f"{host}:{port}") not in self._policy.https_hosts:
            message = "source, or a redirect of it, names a host from which the server may not read"
            raise source_not_allowed(message, "one of the setting sources.https_hosts")
        return parts

    def _judge(self, response: httpcore.Response) -> str | None:
        """Where the response redirects to, None if it does not. Raises unless it is a plain file or absent."""
        headers = {name.lower(): value for name, value in response.headers}
        if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
            return headers[b"location"].decode("latin-1")
        if response.status in _ABSENT:
            return None
        if response.status == 429 or response.status >= 500:
            raise source_unavailable(f"source cannot be read: its host answers {response.status}")
        if response.status != 200 or headers.get(b"content-encoding", b"identity") != b"identity":
            raise AdapterError("source_refused", f"source cannot be read: its host answers {response.status}")
        return None


class _CheckedNetwork(httpcore.NetworkBackend):
    """Resolves a name once, refuses it if any of its addresses is private, and connects to what was checked."""

    def __init__(self, policy: SourcePolicy) -> None:
        self._policy = policy
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            addresses = [ipaddress.ip_address(address) for address in self._policy.resolve(host, port)]
        except (OSError, ValueError) as error:
            raise httpcore.ConnectError("the name cannot be resolved") from error
        for address in addresses:
            if not is_public(address) and not any(address in network for network in self._policy.networks):
                raise AdapterError("adapter_unsafe", "source names a host with a private address: expected public ones")
        failure: Exception = httpcore.ConnectError("the name has no address")
        for address in addresses:
            try:
                return self._backend.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


def is_public(address: Address) -> bool:
    """Whether the address, and any IPv4 address that it carries, belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        carried = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            carried.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = [each for each in carried if each is not None]
        if inner:
            return all(map(is_public, inner))
    return address.is_global and not address.is_multicast and not address.is_reserved
