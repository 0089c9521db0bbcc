"""Lines of the log, of all our processes alike: as text or as JSON, with what is known of the request, without secrets.

2026-11-29 20:44:33,123 INFO server.access: [6f1c...] POST /v1/completions 200 tenant=acme adapters=sql ...
{"time": "2026-11-29T20:44:33.123Z", "level": "info", "logger": "server.access", "process": "front", ...}
"""

import json
import logging
import re
import sys
import time
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Protocol

TEXT, JSON = "text", "json"
FIELDS = "fields"
"""The name under which `extra` brings a line more than its message: `logger.info("...", extra={FIELDS: {...}})`."""
TELLING = ("httpx", "httpcore", "urllib3", "botocore")
"""Libraries that say at the level of information which addresses they ask, signatures and all."""
HIDDEN = "***"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[\w.,:;+@/#%*~<>()\[\]-]+", re.ASCII)
_PATTERNS = (
    ("://", re.compile(r"(?<=://)[^/\s\"'@]+(?=@)")),  # a user and a password before a host
    ("?", re.compile(r"(?<=\?)[^\s\"'<>?]*=[^\s\"'<>]*")),  # what a signed address is signed with
    ("earer ", re.compile(r"(?i:(?<=bearer ))[^\s\"']+")),
    ("lm-", re.compile(r"lm-[a-z0-9]{12}-[A-Za-z0-9_-]{43}")),  # a stored key, see key_ring.py
    ("hf_", re.compile(r"hf_[A-Za-z0-9]{16,}")),
)
"""What looks like a secret, and what is in every such text: to look for that first takes a twentieth of the time."""


class Described(Protocol):
    """What lines are about."""

    def fields(self) -> Mapping[str, object]:
        """What is known of it by now: `request_id` first."""


CURRENT: ContextVar[Described | None] = ContextVar("loramux_request", default=None)
"""The request of the task that runs, and of all tasks and threads that it starts."""


def configure(log_format: str, process: str, secrets: Collection[str] = (), level: int = logging.INFO) -> None:
    """From now on all lines of this process, of libraries too, go to its stderr in this form.

    `secrets`: what must not be in them, beside what looks like one. `process` is this one's name in JSON.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(log_format, process, secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in TELLING:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    sys.excepthook = _log_last_words


def level_of(name: str) -> int:
    """The level of a name such as `info`."""
    return logging.getLevelNamesMapping()[name.upper()]


def formatter(log_format: str, process: str, secrets: Collection[str] = ()) -> logging.Formatter:
    """`text` or `json`."""
    redaction = Redaction(secrets)
    return JsonLines(process, redaction) if log_format == JSON else TextLines(redaction)


def _log_last_words(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What nothing caught ends the process, and is a line like others."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    else:
        logging.getLogger(__name__).critical("the process ends", exc_info=(kind, error, traceback))


class Redaction:
    """Puts `***` for keys, passwords and signatures. Of an address the whole query goes: each store signs otherwise.

    For text as it is, before a form of the log escapes it: in what is escaped a secret may begin and end elsewhere.
    """

    def __init__(self, secrets: Collection[str] = ()) -> None:
        known = {form for secret in secrets if secret for form in (secret, json.dumps(secret)[1:-1])}
        self._known = sorted(known, key=len, reverse=True)  # one may be a part of another

    def __call__(self, text: str) -> str:
        for secret in self._known:
            text = text.replace(secret, HIDDEN)
        for mark, pattern in _PATTERNS:
            if mark in text:
                text = pattern.sub(HIDDEN, text)
        return text


class TextLines(logging.Formatter):
    """One line, with the request's id in brackets and its other fields behind the message; then tracebacks as they are.

    Whatever a client put into a name or a path, it begins no line of its own.
    """

    def __init__(self, redaction: Redaction) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._redaction = redaction

    def format(self, record: logging.LogRecord) -> str:
        return self._redaction(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        request, trace = fields.pop("request_id", None), fields.pop("trace_id", None)
        named = "" if request is None else f"[{request}] " if trace is None else f"[{request} trace {trace}] "
        more = "".join(f" {name}={_shown(value)}" for name, value in fields.items())
        return super().formatMessage(_with_message(record, f"{named}{_escaped(record.message)}{more}"))


class JsonLines(logging.Formatter):
    """One JSON object a line; `exception` is a traceback."""

    def __init__(self, process: str, redaction: Redaction) -> None:
        super().__init__()
        self._process = process
        self._redaction = redaction

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in _fields(record).items() if name not in line}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        told = json.dumps(line, default=str)
        # Whatever looks like a secret does so here too, and hardly any line has one: 20 us less than part by part.
        if self._redaction(told) == told:
            return told
        return json.dumps({name: self._without_secrets(value) for name, value in line.items()})

    def _without_secrets(self, value: object) -> object:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, list | tuple):
            return [self._without_secrets(each) for each in value]
        return self._redaction(str(value))


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Of the request that runs, and of the line itself; what is not known is left out."""
    current = CURRENT.get()
    known = {} if current is None else dict(current.fields())
    known |= getattr(record, FIELDS, {})
    return {name: value for name, value in known.items() if value is not None}


def _with_message(record: logging.LogRecord, message: str) -> logging.LogRecord:
    changed = logging.makeLogRecord(record.__dict__)
    changed.message = message
    return changed


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
