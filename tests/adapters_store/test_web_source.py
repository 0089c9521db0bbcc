"""Sources behind https://: hosts, redirects and addresses that a policy lets through, over TLS on loopback."""

import ipaddress
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.source_policy import SourcePolicy
from adapters_store.sources import fetch
from adapters_store.types import AdapterError
from adapters_store.web_source import is_public
from tests.adapters_store.fetched import ADAPTER, CONFIG, WEIGHTS, contents, refused, zipped
from tests.adapters_store.web_site import Site, serving

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("weights.example", "mirror.example").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def site(server_context: ssl.SSLContext) -> Iterator[Site]:
    """`weights.example` and `mirror.example`, over TLS."""
    with serving(server_context) as site:
        yield site


@pytest.fixture
def web(site: Site, client_context: ssl.SSLContext) -> SourcePolicy:
    return SourcePolicy(
        https_hosts=frozenset({f"weights.example:{site.port}", f"mirror.example:{site.port}"}),
        networks=LOOPBACK,
        ssl_context=client_context,
        resolve=lambda _host, _port: ["127.0.0.1"],
        timeout=60.0,
    )


def test_a_folder_over_https(site: Site, web: SourcePolicy, tmp_path: Path) -> None:
    site.add("/adapters/sql")
    folder = fetch(f"https://weights.example:{site.port}/adapters/sql/", tmp_path / "into", web)
    assert contents(folder) == ADAPTER
    assert site.asked[0] == (f"weights.example:{site.port}", f"/adapters/sql/{CONFIG}")


def test_an_archive_over_https_keeps_its_query(site: Site, web: SourcePolicy, tmp_path: Path) -> None:
    site.answers["/a%20b.zip?signature=x%2By&n=1"] = (200, {}, zipped())
    source = f"https://weights.example:{site.port}/a%20b.zip?signature=x%2By&n=1"
    assert contents(fetch(source, tmp_path / "into", web)) == ADAPTER


def test_redirects(site: Site, web: SourcePolicy, tmp_path: Path) -> None:
    site.answers["/b.zip"] = (200, {}, zipped())
    port = site.port
    moves = {
        "/relative.zip": "b.zip",
        "/mirror.zip": f"https://mirror.example:{port}/b.zip",
        "/elsewhere.zip": "https://evil.example/b.zip",
        "/plain.zip": f"http://weights.example:{port}/b.zip",
        "/inside.zip": "https://169.254.169.254/latest",
        "/file.zip": "file:///etc/passwd",
        "/loop.zip": "/loop.zip",
    }
    site.answers |= {path: (302, {"Location": to}, b"") for path, to in moves.items()}
    found = {}
    for path in moves:
        try:
            fetch(f"https://weights.example:{port}{path}", tmp_path / path[1:], web)
            found[path[1:-4]] = "fetched"
        except AdapterError as error:
            found[path[1:-4]] = error.code
    assert found == {
        "relative": "fetched",
        "mirror": "fetched",
        "elsewhere": "source_not_allowed",
        "plain": "bad_source",
        "inside": "source_not_allowed",
        "file": "bad_source",
        "loop": "source_unavailable",
    }
    assert site.asked.count((f"weights.example:{port}", "/loop.zip")) == 4


@pytest.mark.parametrize(
    "host", ["evil.example", "weights.example", "weights.example.", "x.weights.example", "127.0.0.1"]
)
def test_hosts_that_are_not_listed(host: str, web: SourcePolicy, site: Site, tmp_path: Path) -> None:
    assert refused(f"https://{host}/sql", tmp_path / "into", web).code == "source_not_allowed"
    assert site.asked == []


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["fe80::1%1"]]
)
def test_private_addresses(addresses: list[str], site: Site, web: SourcePolicy, tmp_path: Path) -> None:
    policy = replace(web, networks=(), resolve=lambda _host, _port: addresses)
    error = refused(f"https://weights.example:{site.port}/sql", tmp_path / "into", policy)
    assert error.code == "adapter_unsafe"
    assert site.asked == []
    assert not any(address in error.message for address in addresses)


def test_a_name_is_resolved_once_a_connection(site: Site, web: SourcePolicy, tmp_path: Path) -> None:
    """A second look could give another address than the one that was checked."""
    site.answers["/b.zip"] = (200, {}, zipped())
    asked: list[str] = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    fetch(f"https://weights.example:{site.port}/b.zip", tmp_path / "into", replace(web, resolve=resolve))
    assert asked == ["weights.example"]


def test_the_certificate_must_be_the_hosts(site: Site, web: SourcePolicy, tmp_path: Path) -> None:
    source = f"https://weights.example:{site.port}/b.zip"
    assert refused(source, tmp_path / "into", replace(web, ssl_context=None)).code == "source_unavailable"
    other = replace(web, https_hosts=frozenset({f"other.example:{site.port}"}))
    assert refused(source.replace("weights", "other"), tmp_path / "into", other).code == "source_unavailable"
    assert site.asked == []


@pytest.mark.parametrize(
    ("answer", "code", "status"),
    [
        ((500, {}, b""), "source_unavailable", 503),
        ((429, {}, b""), "source_unavailable", 503),
        ((403, {}, b"secret"), "source_refused", 422),
        ((404, {}, b""), "adapter_incomplete", 422),
        ((200, {"Content-Encoding": "gzip"}, b"x"), "source_refused", 422),
        ((200, {"Content-Length": "9999", "Connection": "close"}, b"short"), "source_unavailable", 503),
        ((200, {"Content-Length": ""}, b"no length"), "source_unavailable", 503),
        ((200, {}, bytes(2 << 20)), "adapter_too_large", 413),
    ],
)
def test_bad_answers(
    answer: tuple[int, dict[str, str], bytes], code: str, status: int, site: Site, web: SourcePolicy, tmp_path: Path
) -> None:
    site.answers["/b.zip"] = answer
    is_endless = answer[1].get("Content-Length") == ""
    policy = replace(web, max_bytes=1 << 20, timeout=0.5 if is_endless else web.timeout)
    if code == "adapter_too_large":
        site.answers |= {f"/b/{CONFIG}": (200, {}, b"{}"), f"/b/{WEIGHTS}": answer}
    source = f"https://weights.example:{site.port}/b" + ".zip" * (code != "adapter_too_large")
    error = refused(source, tmp_path / "into", policy)
    assert (error.code, error.status) == (code, status)
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@given(st.ip_addresses(v=4))
def test_an_address_is_as_public_as_what_it_carries(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for carrier in ("::ffff:0:0", "64:ff9b::"):
        assert is_public(ipaddress.IPv6Address(int(ipaddress.IPv6Address(carrier)) + number)) == is_public(address)
