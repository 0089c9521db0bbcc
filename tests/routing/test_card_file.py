"""Cards of routers: what JSON allows and no server should take."""

import json
from pathlib import Path

import pytest

from routing.card_file import MAX_CARD_BYTES, MAX_DEPTH, RouterFolderError, read_fields


def nested(levels: int) -> object:
    return [nested(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r'{"name": "\ud800"}', "surrogates not allowed"),
        (json.dumps({"training": nested(MAX_DEPTH)}), "nested more than 20 levels"),
        ("[" * 5000 + "]" * 5000, "expected a JSON object"),
        (json.dumps({"name": "\u00e9" * (MAX_CARD_BYTES // 3)}, ensure_ascii=False), "of ASCII"),
        ('{"a": NaN}', "NaN is no JSON number"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "router.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RouterFolderError, match=words):
        read_fields(path)


def test_what_is_not_too_deep(tmp_path: Path) -> None:
    card = {"training": nested(MAX_DEPTH - 1), "name": "\u00fc"}
    (tmp_path / "router.json").write_text(json.dumps(card, ensure_ascii=False), encoding="utf-8")
    assert read_fields(tmp_path / "router.json") == card
