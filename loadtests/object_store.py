"""An S3 server on a loopback port, by moto in a process of its own, that fails or hesitates when it is told to."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any
from urllib.request import Request, urlopen

FINE, FAILING, SLOW = "fine", "failing", "slow"
"""What it can be. Failing: 500 for whatever is asked; slow: each answer takes two seconds longer."""
SLOW_SECONDS = 2.0
ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We encountered an error.</Message></Error>"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


class ObjectStore:
    """The process, from `with` to its end. `url` is its endpoint; any credentials will do."""

    def __enter__(self) -> "ObjectStore":
        """Raises RuntimeError if it does not start."""
        command = (sys.executable, "-P", "-m", "loadtests.object_store")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            self._process.communicate()
            raise RuntimeError("the object store did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # the end of its input is its end

    def make_bucket(self, name: str) -> None:
        """Raises HTTPError."""
        with urlopen(Request(f"{self.url}/{name}", b"", method="PUT")) as answer:
            answer.read()

    def become(self, state: str) -> None:
        """From now on it is `FINE`, `FAILING` or `SLOW`; returns when it is."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{state}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()


class Moody:
    """A WSGI application around another one."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.state = FINE
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.state == SLOW:
            time.sleep(SLOW_SECONDS)
        if self.state == FAILING:
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)  # else the sender sees a broken connection in its place
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return (ERROR,)
        return self._app(environ, start_response)


def main() -> None:
    """Serve until the input ends; each of its lines is a state."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, kind: str, message: str, *args: Any) -> None:
            """Nothing of what is asked."""

    app = Moody(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    for line in sys.stdin:
        app.state = line.strip()
        print(app.state, flush=True)


if __name__ == "__main__":
    main()
