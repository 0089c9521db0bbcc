"""One call, `{"name": ..., "arguments": {...}}`, in a text that comes in pieces."""

import json
import re
from collections.abc import Callable, Collection

from server.tools.json_scanner import WHITESPACE, JsonScanner, Progress

ARGUMENT_KEYS = ("arguments", "parameters")
KEYS = frozenset({"name", "type", "id", *ARGUMENT_KEYS})
"""An object that begins with another key is no call: it need not be read to its end to know that."""
LONGEST_SCALAR = 64
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
"""What stands in strings as it is."""


class CallScanner:
    """Reads the object of a call to one of `names`. Its keys may have any order, and others are passed over.

    It is a call, `is_certain`, once its name is known and its arguments begin as an object does: from there on `take`
    gives them out as they come, while the text may still break off or break. BROKEN before means that it is no call.
    Arguments that are missing or null count as none; an object in a string counts as the object. Line breaks and the
    like inside of the arguments' strings are escaped, as JSON wants them.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.name: str | None = None
        self.has_all_arguments = False
        self._names = names
        self._take: Callable[[str], bool] = self._start
        self._key: str | None = None
        self._is_done = False
        self._text: list[str] = []  # of a key, string or scalar
        self._is_key = False
        self._is_escaped = False
        self._container = JsonScanner()
        self._is_arguments = False  # the container
        self._arguments: list[str] = []
        self._have_begun = False

    @property
    def is_certain(self) -> bool:
        return self.name is not None and self._have_begun

    @property
    def is_whole(self) -> bool:
        """Whether name and arguments are complete."""
        return self.name is not None and self.has_all_arguments

    def take(self) -> str:
        """What is known of the arguments, and was not taken yet."""
        if not self.is_certain:
            return ""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def feed(self, text: str) -> tuple[int, Progress]:
        """How many characters belong to the call, and what it is with them. The one that breaks it does not."""
        position = 0
        while position < len(text):
            in_plain_text = self._take == self._in_container and self._container.in_plain_text
            plain = _PLAIN.match(text, position) if in_plain_text else None
            if plain is not None:
                self._keep(plain[0])
                position = plain.end()
                continue
            if not self._take(text[position]):
                return position, Progress.BROKEN
            position += 1
            if self._is_done:
                return position, Progress.DONE
        return position, Progress.OPEN

    def _start(self, character: str) -> bool:
        self._take = self._first_key
        return character == "{"

    def _first_key(self, character: str) -> bool:
        return self._end(character) if character == "}" else self._next_key(character)

    def _next_key(self, character: str) -> bool:
        if character == '"':
            self._open_string(is_key=True)
        return character == '"' or character in WHITESPACE

    def _colon(self, character: str) -> bool:
        if character == ":":
            self._take = self._value
        return character == ":" or character in WHITESPACE

    def _value(self, character: str) -> bool:
        if character in WHITESPACE:
            return True
        if character == '"':
            self._open_string(is_key=False)
            return True
        if character in "{[":
            self._is_arguments = self._key in ARGUMENT_KEYS and not self.has_all_arguments
            self._container, self._take = JsonScanner(), self._in_container
            return self._in_container(character) and not (self._is_arguments and character == "[")
        self._text, self._take = [character], self._in_scalar
        return True

    def _open_string(self, is_key: bool) -> None:
        self._text, self._is_key, self._is_escaped, self._take = ['"'], is_key, False, self._in_string

    def _in_string(self, character: str) -> bool:
        self._text.append(character)
        if self._is_escaped or character != '"':
            self._is_escaped = character == "\\" and not self._is_escaped
            return True
        try:
            value = json.loads("".join(self._text), strict=False)
        except ValueError:
            return False
        if self._is_key:
            self._key, self._take = value, self._colon
            return value in KEYS or self.name is not None or self.has_all_arguments
        self._take = self._after
        return self._member(value)

    def _in_scalar(self, character: str) -> bool:
        if character not in WHITESPACE and character not in ",}":
            self._text.append(character)
            return len(self._text) <= LONGEST_SCALAR
        try:
            value = json.loads("".join(self._text))
        except ValueError:
            return False
        self._take = self._after
        return self._member(value) and self._after(character)

    def _in_container(self, character: str) -> bool:
        was_in_string = self._container.in_string
        progress = self._container.feed(character)
        if progress is Progress.BROKEN:
            return False
        is_raw = was_in_string and character < " "
        self._keep(json.dumps(character)[1:-1] if is_raw else character)
        if progress is Progress.DONE:
            self._take = self._after
            if not self._is_arguments:
                return self._member([])
            self.has_all_arguments = True
        return True

    def _keep(self, text: str) -> None:
        """A part of a container. What belongs behind the first brace of arguments makes them certain."""
        if self._is_arguments:
            self._have_begun = self._have_begun or (bool(self._arguments) and text not in WHITESPACE)
            self._arguments.append(text)

    def _after(self, character: str) -> bool:
        if character == ",":
            self._take = self._next_key
        return character == "," or character in WHITESPACE or (character == "}" and self._end(character))

    def _member(self, value: object) -> bool:
        """Whether a call may have this value under the key that is read. What is not asked for may be anything."""
        if self._key == "name" and self.name is None:
            self.name = value if isinstance(value, str) and value in self._names else None
            return self.name is not None
        if self._key in ARGUMENT_KEYS and not self.has_all_arguments:
            return value is None or (isinstance(value, str) and self._unpack(value))
        return True

    def _unpack(self, text: str) -> bool:
        """Arguments in a string."""
        try:
            value = json.loads(text or "{}", strict=False)
        except (ValueError, RecursionError):
            return False
        # Written anew, in ASCII: a string can bring halves of surrogate pairs, which no answer could carry.
        self._arguments, self._have_begun, self.has_all_arguments = [json.dumps(value)], True, True
        return isinstance(value, dict)

    def _end(self, _: str) -> bool:
        self._is_done = True
        if not self.has_all_arguments:
            self._arguments, self._have_begun, self.has_all_arguments = ["{}"], True, True
        return self.name is not None
