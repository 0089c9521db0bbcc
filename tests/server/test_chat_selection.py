"""The adapters that a conversation is to use, as they are typed."""

import pytest

from server.chat_selection import Selection, SelectionError, parse_adapters


def test_what_selections_mean() -> None:
    assert Selection("tiny").fields() == {"model": "tiny"}
    assert parse_adapters(["a"], "tiny").fields() == {"model": "a"}
    mixed = parse_adapters(["a", "b=-1e-1", "as", "selection"], "tiny")
    assert mixed.fields() == {
        "model": "tiny",
        "lora": {"adapters": [{"name": "a"}, {"name": "b", "weight": -0.1}], "composition": "selection"},
    }
    assert mixed.label == "a b=-0.1 as selection"
    assert parse_adapters(mixed.label.split(), "tiny") == mixed
    for wrong in (["a", "a=2"], ["a", "as", "glue"], ["a=nan"], ["=1"], ["a=inf"], ["a="]):
        with pytest.raises(SelectionError):
            parse_adapters(wrong, "tiny")
