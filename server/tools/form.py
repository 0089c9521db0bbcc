"""How models write calls in their text."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolForm:
    """A way to write calls: `opening`, one JSON object a call, `closing`.

    `key` is what its objects call the arguments. With `is_bare` an answer that begins with such an object is a call
    without any opening; with `is_list` the calls are one JSON list. Between calls that share one opening `separators`
    may stand. With `has_one_call` the templates of such models take one call in an answer, and with `id_length` they
    want ids of so many letters and digits.
    """

    name: str
    opening: str
    closing: str = ""
    key: str = "arguments"
    separators: str = ""
    is_bare: bool = False
    is_list: bool = False
    has_one_call: bool = False
    id_length: int | None = None

    @property
    def markers(self) -> frozenset[str]:
        """Tokens that have to be seen in the text, special or not."""
        return frozenset({self.opening, self.closing} - {""})

    @property
    def beginning(self) -> str:
        """What a text begins with that is calls and nothing else."""
        if self.is_list:
            return f"{self.opening} ["
        return "" if self.is_bare else f"{self.opening}\n"

    @property
    def between(self) -> str:
        """What stands from the object of one call to that of the next."""
        has_tags = self.closing and not self.is_list
        return f"\n{self.closing}\n{self.opening}\n" if has_tags else f"{self.separators[:1]} "

    @property
    def end(self) -> str:
        """What stands behind the last object."""
        return self.closing if self.is_list or not self.closing else f"\n{self.closing}"

    def write(self, name: str, arguments: object) -> str:
        """One call as a model would write it."""
        return self.beginning + json.dumps({"name": name, self.key: arguments}, ensure_ascii=False) + self.end

    def call_id(self, seed: str) -> str:
        """An id for a call; other seeds give other ids."""
        digest = hashlib.sha256(seed.encode()).hexdigest()
        return f"call_{digest[:24]}" if self.id_length is None else digest[: self.id_length]


HERMES = ToolForm(name="hermes", opening="<tool_call>", closing="</tool_call>", separators=",;")
"""Hermes 2 and 3, Qwen2.5, Qwen3, and models that were never taught any form."""
LLAMA = ToolForm(
    name="llama3_json", opening="<|python_tag|>", key="parameters", separators=";", is_bare=True, has_one_call=True
)
"""Llama 3.1 and later."""
MISTRAL = ToolForm(name="mistral", opening="[TOOL_CALLS]", closing="]", separators=",", is_list=True, id_length=9)
"""Mistral 7B v0.3 and others of its time."""
FORMS: Mapping[str, ToolForm] = {form.name: form for form in (HERMES, LLAMA, MISTRAL)}
