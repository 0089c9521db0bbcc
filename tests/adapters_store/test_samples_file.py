"""samples.json, read strictly."""

import json
from pathlib import Path

import pytest

from adapters_store.samples_file import read_samples
from adapters_store.types import AdapterError


def test_samples(tmp_path: Path) -> None:
    assert read_samples(tmp_path) is None
    path = tmp_path / "samples.json"
    path.write_text('["ein", "zwei\\n", "\\u00e4"]')
    assert read_samples(tmp_path) == ("ein", "zwei\n", "ä")
    path.write_text("[]")
    assert read_samples(tmp_path) == ()
    path.write_text(json.dumps(["x" * 4096] * 50))
    assert read_samples(tmp_path) == ("x" * 4096,) * 50


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is not JSON"),
        (b"one\ntwo", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"samples": []}', "is not a list"),
        (b'"text"', "is not a list"),
        (b"null", "is not a list"),
        (json.dumps(["x"] * 51).encode(), "has 51 entries"),
        (b'["x", 1]', "has an entry 1 that is no string"),
        (b'[["x"]]', "has an entry 0 that is no string"),
        (b'["x", " \\n"]', "has an entry 1 of 2 characters, all blank"),
        (json.dumps(["x" * 4097]).encode(), "has an entry 0 of 4097 characters"),
        (b'["a\\u0000b"]', "has an entry 0 with a character that cannot be stored"),
        (b'["\\ud800"]', "has an entry 0 with a character that cannot be stored"),
        (b" " * (1 << 20) + b"[]", "has more than 1048576 bytes"),
    ],
    ids=range(15),
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "samples.json").write_bytes(content)
    with pytest.raises(AdapterError) as refused:
        read_samples(tmp_path)
    assert (refused.value.code, refused.value.status) == ("adapter_bad_config", 422)
    expected = "expected a JSON list of at most 50 strings of 1 to 4096 characters"
    assert refused.value.message == f"samples.json {what}: {expected}"
