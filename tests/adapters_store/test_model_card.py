"""The first paragraph of prose in an adapter's card."""

from pathlib import Path

import pytest

from adapters_store.model_card import read_description


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("Speaks like a pirate.", "Speaks like a pirate."),
        ("---\nbase_model: x\n---\n\n# Pirate\n\nSpeaks like\r\na pirate.\n\nMore.", "Speaks like a pirate."),
        ("# Title\nSpeaks like a pirate.\n## Use\nText", "Speaks like a pirate. Text"),
        ("<!-- a\n\ncomment --> \n\n[More Information Needed]\n\n- **by:** us\n\n| a | b |\n\nAt last.", "At last."),
        ("![badge](x)\n\n> quote\n\n```\ncode", "code"),
        ("---\nno end", "no end"),
        ("# Only a title", ""),
        ("", ""),
        ("a" * 900, "a" * 500),
    ],
)
def test_description(tmp_path: Path, card: str, expected: str) -> None:
    (tmp_path / "README.md").write_text(card, newline="")
    assert read_description(tmp_path) == expected


def test_no_card_and_not_text(tmp_path: Path) -> None:
    assert read_description(tmp_path) == ""
    (tmp_path / "README.md").write_bytes(b"\xff\xfeabc")
    assert read_description(tmp_path) == "\ufffd\ufffdabc"
