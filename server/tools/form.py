"""How models write calls in their text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolForm:
    """A way to write calls: `opening`, one JSON object a call, `closing`.

    `key` is what its objects call the arguments. With `is_bare` an answer that begins with such an object is a call
    without any opening. Between calls that share one opening `separators` may stand. With `has_one_call` models of this
    form make one call at a time.
    """

    name: str
    opening: str
    closing: str = ""
    key: str = "arguments"
    separators: str = ""
    is_bare: bool = False
    has_one_call: bool = False

    @property
    def markers(self) -> frozenset[str]:
        """Tokens that have to be seen in the text, special or not."""
        return frozenset({self.opening, self.closing} - {""})

    @property
    def beginning(self) -> str:
        """What a text begins with that is calls and nothing else."""
        return "" if self.is_bare else f"{self.opening}\n"

    @property
    def between(self) -> str:
        """What stands from the object of one call to that of the next."""
        return f"\n{self.closing}\n{self.opening}\n" if self.closing else f"{self.separators[:1]} "

    def write(self, name: str, arguments: object) -> str:
        """One call as a model would write it."""
        call = json.dumps({"name": name, self.key: arguments}, ensure_ascii=False)
        return f"{self.beginning}{call}\n{self.closing}" if self.closing else f"{self.beginning}{call}"


HERMES = ToolForm(name="hermes", opening="<tool_call>", closing="</tool_call>", separators=",;")
"""Hermes 2 and 3, Qwen2.5, Qwen3, and models that were never taught any form."""
LLAMA = ToolForm(
    name="llama3_json", opening="<|python_tag|>", key="parameters", separators=";", is_bare=True, has_one_call=True
)
"""Llama 3.1 and later. Their template takes one call in an answer."""
FORMS: Mapping[str, ToolForm] = {form.name: form for form in (HERMES, LLAMA)}
