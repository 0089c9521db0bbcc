"""The form of lines, what they say of the request, and what they never say."""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.logs import CURRENT, FIELDS, HIDDEN, Redaction, configure, formatter

KEY = "lm-0a1b2c3d4e5f-" + "A" * 43


class Known:
    """A request."""

    def fields(self) -> Mapping[str, object]:
        return {"request_id": "r1", "trace_id": "t1", "tenant": "acme", "adapters": ["a:0.5", "b:0.5"], "router": None}


def record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("server.x", logging.INFO, __file__, 1, message, args, None)
    made.__dict__[FIELDS] = fields
    return made


def text_of(line: logging.LogRecord, *secrets: str) -> str:
    return formatter("text", "front", secrets).format(line)


def json_of(line: logging.LogRecord, *secrets: str) -> dict[str, object]:
    told = formatter("json", "engine", secrets).format(line)
    assert "\n" not in told
    read: dict[str, object] = json.loads(told)
    return read


def test_lines_say_whose_they_are() -> None:
    token = CURRENT.set(Known())
    try:
        line = record("adapter %r", "sql", status=200, why="it is late")
        more = 'tenant=acme adapters=a:0.5,b:0.5 status=200 why="it is late"'
        assert text_of(line).endswith(f"INFO server.x: [r1 trace t1] adapter 'sql' {more}")
        told = json_of(line)
    finally:
        CURRENT.reset(token)
    assert told.pop("time") is not None
    assert told == {
        "level": "info",
        "logger": "server.x",
        "process": "engine",
        "message": "adapter 'sql'",
        "request_id": "r1",
        "trace_id": "t1",
        "tenant": "acme",
        "adapters": ["a:0.5", "b:0.5"],
        "status": 200,
        "why": "it is late",
    }
    assert text_of(record("outside")).endswith("INFO server.x: outside")
    assert "request_id" not in json_of(record("outside"))


def test_tracebacks() -> None:
    line = record("it failed")
    try:
        raise ValueError(f"https://key:word@host/x?X-Amz-Signature=abc {KEY}")
    except ValueError:
        line.exc_info = sys.exc_info()
    for told in (text_of(line), str(json_of(line)["exception"])):
        assert "Traceback" in told
        assert "https://***@host/x?***" in told
        assert KEY not in told


PARTS = (
    "?",
    "a=b",
    '"',
    "\\",
    "\n",
    "://",
    "u:p",
    "@",
    "Bearer ",
    "bearer",
    KEY,
    "hf_" + "a" * 16,
    "\x85",
    "é",
    " ",
    "'",
    "<",
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PARTS), max_size=12).map("".join))


@given(TEXTS, TEXTS)
def test_nobody_begins_a_line_of_their_own(message: str, value: str) -> None:
    told = text_of(record("%s", message, field=value))
    assert len(told.splitlines()) == 1
    assert KEY not in told
    read = json_of(record("%s", message, field=value, fields=[value]))
    assert read["message"] == Redaction()(message)
    assert (read["field"], read["fields"]) == (Redaction()(value), [Redaction()(value)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"key {KEY}, wrong", f"key {HIDDEN}, wrong"),
        ("Authorization: Bearer abc.def-g", f"Authorization: Bearer {HIDDEN}"),
        ("postgresql://user:pa55@db:5432/x", f"postgresql://{HIDDEN}@db:5432/x"),
        ("https://b.s3.aws.com/k?X-Amz-Signature=ff&x=1 is gone", f"https://b.s3.aws.com/k?{HIDDEN} is gone"),
        ("GET 'https://h/x?sig=a%2Fb'", f"GET 'https://h/x?{HIDDEN}'"),
        ("hf_abcdefghijklmnopqrst", HIDDEN),
        (f"line\n{KEY}", rf"line\n{HIDDEN}"),
        ('GET /x?a=b","level":"fine', f'GET /x?{HIDDEN}","level":"fine'),
        ('Bearer abc","x', f'Bearer {HIDDEN}","x'),
        ("is this right? a=b", "is this right? a=b"),
        ("http://host/path, user@host", "http://host/path, user@host"),
        ('my "quoted" key', HIDDEN),
        ("short and short-longer", f"{HIDDEN} and {HIDDEN}"),
    ],
)
def test_secrets(text: str, expected: str) -> None:
    secrets = ('my "quoted" key', "short", "short-longer", "")
    assert text_of(record("%s", text), *secrets).endswith(f"INFO server.x: {expected}")
    expected = expected.replace(r"\n", "\n")
    assert json_of(record("%s", text), *secrets)["message"] == expected
    assert json_of(record("x", field=text), *secrets)["field"] == expected
    assert json_of(record("x", field=[text]), *secrets)["field"] == [expected]


def test_the_process_and_its_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", "front", ["hush-hush"])
    logging.getLogger("server.x").info("the key is hush-hush")
    logging.getLogger("httpx").info("GET https://host/?signature=1")
    logging.getLogger("anything").debug("detail")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == f"the key is {HIDDEN}"


def test_last_words_have_the_same_form() -> None:
    script = "from server.logs import configure; configure('json', 'engine'); raise ValueError('boom')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: boom")
