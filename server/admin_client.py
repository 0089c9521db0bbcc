"""A client of the administration's HTTP interface, for the command line."""

import io
import ipaddress
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

Json = dict[str, Any]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
SAMPLES_NAME = "samples.json"
ROUTER_CARD_NAME = "router.json"
ROUTER_WEIGHTS_NAME = "router.safetensors"
ARCHIVES = (".zip", ".tar.gz", ".tgz")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MOST_CARD_BYTES = 1 << 16
_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 60.0
_PAGE = 1000


class AdminError(RuntimeError):
    """What was asked for did not happen. The message is one line for whoever typed the command."""


class UsageError(AdminError):
    """The command was given something that it cannot mean."""


@dataclass(frozen=True)
class Reply:
    """A successful answer."""

    status: int
    body: Json


class AdminClient:
    """Calls `<url>/admin/v1` with `key`, the admin's or a tenant's. Every method raises AdminError."""

    def __init__(self, url: str, key: str | None, transport: httpx.BaseTransport | None = None) -> None:
        self.url = _base(url)
        if key and not (key.isascii() and key.isprintable()):
            raise UsageError("--key: expected printable ASCII characters")
        self._http = httpx.Client(
            base_url=f"{self.url}/admin/v1/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=not _is_here(self.url),  # a proxy has nothing to do with this machine's own address
            transport=transport,
        )

    def __enter__(self) -> "AdminClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, query: Mapping[str, object] | None = None) -> Json:
        return self.call("GET", path, query=query).body

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        body: Mapping[str, object] | None = None,
        patient: bool = False,
    ) -> Reply:
        """One call; what is None in `query` is left out. With `patient` the answer may take any time."""
        options: dict[str, Any] = {"params": _given(query or {}), "json": body}
        return self._send(method, path, patient, options)

    def tokens(self, router: str, prompt: str, count: int, options: Mapping[str, object]) -> Json:
        """The `lora` object of an answer of `count` tokens, explained, by a router inside the model."""
        messages = [{"role": "user", "content": prompt}]
        body = {"model": f"auto:{router}", "messages": messages, "max_tokens": count, "temperature": 0}
        body["lora"] = {"explain": True, **options}
        answer: Json = self.call("POST", f"{self.url}/v1/chat/completions", body=body).body["lora"]
        return answer

    def events(self, path: str, body: Mapping[str, object]) -> Generator[Json, None, None]:
        """The objects of a stream of server-sent events. Closing the iteration closes the connection."""
        options: dict[str, Any] = {"json": body, "timeout": httpx.Timeout(None, connect=_CONNECT_SECONDS)}
        with self._reaching(), self._http.stream("POST", path, **options) as response:
            if not response.is_success:
                response.read()
                raise AdminError(self._refusal(response))
            is_done = False
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                is_done = is_done or data == "[DONE]"
                if line.startswith("data:") and not is_done:
                    yield self._event(data)
            if not is_done:
                raise AdminError(f"{self.url} ended its answer before it was complete")

    def _event(self, data: str) -> Json:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise AdminError(f"{self.url} answered with events that are no JSON objects: is a loramux server there?")
        if "error" in event:
            error = event["error"]
            raise AdminError(f"{error['message']} ({error['code']})" if error.get("code") else str(error["message"]))
        return event

    def pages(self, path: str, query: Mapping[str, object]) -> Json:
        """The whole list, as one page."""
        found: list[Json] = []
        cursor: str | None = None
        while True:
            page = self.get(path, {**query, "limit": _PAGE, "cursor": cursor})
            found += page.get("data", [])
            if page.get("next") in (None, cursor):
                return {"data": found, "next": None}
            cursor = page["next"]

    def upload(
        self, path: str, files: Mapping[str, Path], fields: Mapping[str, object], report: Callable[[int], None]
    ) -> Reply:
        """POST the files as multipart/form-data, read from the disk while they are sent.

        `fields` go along as form fields: text as it is, all else as JSON. `report` gets the bytes of every part read.
        """
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        opened: dict[str, _Reported] = {}
        try:
            for field, file in files.items():
                opened[field] = _Reported(file, report)
            parts = {field: (files[field].name, file) for field, file in opened.items()}
            return self._send("POST", path, True, {"data": form, "files": parts})
        except OSError as error:
            raise AdminError(f"cannot read {error.filename or 'the files'}: {error.strerror or error}") from error
        finally:
            for each in opened.values():
                each.close()

    def _send(self, method: str, path: str, patient: bool, options: dict[str, Any]) -> Reply:
        if patient:
            options |= {"timeout": httpx.Timeout(None, connect=_CONNECT_SECONDS)}
        with self._reaching():
            response = self._http.request(method, path, **options)
        if not response.is_success:
            raise AdminError(self._refusal(response))
        try:
            body = response.json() if response.content else {}
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise AdminError(self._stranger(response))
        return Reply(response.status_code, body)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or "no answer"
            raise AdminError(
                f"no server at {self.url} ({reason}): start one with `loramux serve --model FOLDER`,"
                " or say with --url or LORAMUX_URL where it is"
            ) from error
        except httpx.TimeoutException as error:
            raise AdminError(f"{self.url} did not answer within {_ANSWER_SECONDS:.0f} seconds") from error
        except httpx.TransportError as error:
            raise AdminError(f"the connection to {self.url} broke: {str(error) or type(error).__name__}") from error

    def _refusal(self, response: httpx.Response) -> str:
        try:
            error = response.json()["error"]
            message, code = str(error["message"]), error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            return self._stranger(response)
        line = f"{message} ({code})" if code else message
        if response.status_code == 401:
            line += "; give the admin key, or a tenant's for its own adapters, with --key or LORAMUX_ADMIN_KEY"
        elif code == "forbidden":
            line += "; give the admin key with --key or LORAMUX_ADMIN_KEY"
        elif response.status_code == 503 and (seconds := response.headers.get("retry-after")):
            line += f"; try again in {seconds} s"
        return line

    def _stranger(self, response: httpx.Response) -> str:
        path = response.request.url.path
        return f"{self.url} answered {path} with {response.status_code} and no JSON: is a loramux server there?"


class _Reported(io.FileIO):
    """A file that tells how much of it has been read."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path)
        self._report = report

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size) or b""
        self._report(len(data))
        return data


def name_in_path(name: str) -> str:
    """`name` as a part of a path. Raises UsageError for what can be no name and would mean another path."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name: expected letters, digits, '.', '_' and '-', a letter or digit first")
    return name


def is_source(given: str) -> bool:
    """Whether this is for the server to fetch: `hf://`, `s3://`, `https://`, `file://`."""
    return "://" in given


def files_to_upload(path: Path) -> dict[str, Path]:
    """The form's files for a PEFT folder or an archive of one. Raises AdminError that says what is missing."""
    files = _config_and_weights(path, CONFIG_NAME, WEIGHTS_NAME, "one PEFT adapter")
    card = path / CARD_NAME
    if "config" in files and card.is_file() and card.stat().st_size <= _MOST_CARD_BYTES:
        files["card"] = card
    return files


def router_to_upload(path: Path) -> dict[str, Path]:
    """The form's files for a trained router's folder or an archive of one. Raises AdminError."""
    return _config_and_weights(path, ROUTER_CARD_NAME, ROUTER_WEIGHTS_NAME, "a trained router")


def _config_and_weights(path: Path, config: str, weights: str, what: str) -> dict[str, Path]:
    """The archive at `path`, or the two files of the folder there."""
    if path.is_file():
        if not path.name.endswith(ARCHIVES):
            raise UsageError(f"{path} is no folder: expected a folder, a source with ://, or {', '.join(ARCHIVES)}")
        return {"archive": path}
    if not path.is_dir():
        problem = "is no folder" if path.exists() else "does not exist"
        raise UsageError(f"{path} {problem}: expected the folder of {what}, or a source such as hf://org/repo")
    missing = [name for name in (config, weights) if not (path / name).is_file()]
    if missing:
        raise AdminError(f"{path} has no {' and no '.join(missing)}: expected the folder of {what}")
    return {"config": path / config, "weights": path / weights}


def _base(url: str) -> str:
    """`url` without the path of the OpenAI interface, which is what people have at hand."""
    bare = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parsed = httpx.URL(bare)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise UsageError(f"--url {url}: expected an address such as http://127.0.0.1:8000")
    return bare


def _is_here(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _given(query: Mapping[str, object]) -> dict[str, str]:
    """Without what is None; booleans as JSON writes them."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in query.items()
        if value is not None
    }
