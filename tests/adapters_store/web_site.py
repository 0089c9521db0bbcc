"""A real web server on a loopback port, with or without TLS."""

import http.server
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.adapters_store.fetched import ADAPTER


@dataclass
class Site:
    """What a web server answers by path: (status, headers, body); and what it has been asked."""

    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0

    def add(self, folder: str, files: Mapping[str, bytes] = ADAPTER) -> None:
        self.answers |= {f"{folder}/{name}": (200, {}, body) for name, body in files.items()}


@contextmanager
def serving(context: ssl.SSLContext | None) -> Iterator[Site]:
    """A site that is there until the block ends; over TLS if there is a context."""
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else the body waits 40 ms for the acknowledgement of the headers

        def do_GET(self) -> None:
            site.asked.append((self.headers["Host"], self.path))
            status, headers, body = site.answers.get(self.path, (404, {}, b"not here"))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_args: object) -> None:
            """A client that goes away or distrusts the certificate is what these tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    site.port = server.server_port
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
