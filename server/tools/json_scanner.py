"""JSON that comes character by character: the beginning of an object or list, a whole one, or neither."""

from collections.abc import Callable
from enum import Enum

WHITESPACE = " \t\n\r"
_DIGITS = "0123456789"
_ESCAPED = '"\\/bfnrt'
_HEXADECIMAL = "0123456789abcdefABCDEF"
_NUMBERS = {
    "-": {"0": "0", **dict.fromkeys(_DIGITS[1:], "1")},
    "0": {".": ".", "e": "e", "E": "e"},
    "1": {**dict.fromkeys(_DIGITS, "1"), ".": ".", "e": "e", "E": "e"},
    ".": dict.fromkeys(_DIGITS, ".1"),
    ".1": {**dict.fromkeys(_DIGITS, ".1"), "e": "e", "E": "e"},
    "e": {**dict.fromkeys(_DIGITS, "e1"), "+": "e+", "-": "e+"},
    "e+": dict.fromkeys(_DIGITS, "e1"),
    "e1": dict.fromkeys(_DIGITS, "e1"),
}
"""Transitions between the parts of a number."""
_WHOLE_NUMBERS = frozenset({"0", "1", ".1", "e1"})


class Progress(Enum):
    """What the characters so far are."""

    OPEN = "open"
    DONE = "done"
    BROKEN = "broken"


class JsonScanner:
    """Recognises one JSON object or list (RFC 8259). After DONE or BROKEN it takes nothing more.

    One liberty: control characters may stand in strings as they are, since models write line breaks there.
    """

    def __init__(self) -> None:
        self.in_string = False
        self._stack: list[str] = []
        self._take: Callable[[str], bool] = self._start
        self._is_key = False
        self._rest = ""  # of a literal
        self._number = ""
        self._hexadecimals = 0

    @property
    def in_plain_text(self) -> bool:
        """Whether it is inside of a string, and not inside of an escape."""
        return self._take == self._in_text

    def feed(self, character: str) -> Progress:
        if not self._take(character):
            return Progress.BROKEN
        return Progress.OPEN if self._stack else Progress.DONE

    def _start(self, character: str) -> bool:
        return character in "{[" and self._open(character)

    def _open(self, bracket: str) -> bool:
        self._stack.append(bracket)
        self._take = self._first_key if bracket == "{" else self._first_item
        return True

    def _close(self, bracket: str) -> bool:
        if self._stack.pop() + bracket not in ("{}", "[]"):
            return False
        self._take = self._after
        return True

    def _value(self, character: str) -> bool:
        if character in WHITESPACE:
            return True
        if character in "{[":
            return self._open(character)
        if character == '"':
            return self._open_string(is_key=False)
        if character in "tfn":
            self._rest = {"t": "rue", "f": "alse", "n": "ull"}[character]
            self._take = self._literal
            return True
        self._number = "-" if character == "-" else _NUMBERS["-"].get(character, "")
        self._take = self._in_number
        return bool(self._number)

    def _first_item(self, character: str) -> bool:
        return self._close(character) if character == "]" else self._value(character)

    def _first_key(self, character: str) -> bool:
        return self._close(character) if character == "}" else self._key(character)

    def _key(self, character: str) -> bool:
        return character in WHITESPACE or (character == '"' and self._open_string(is_key=True))

    def _colon(self, character: str) -> bool:
        if character == ":":
            self._take = self._value
        return character == ":" or character in WHITESPACE

    def _after(self, character: str) -> bool:
        if character in WHITESPACE:
            return True
        if character == ",":
            self._take = self._key if self._stack[-1] == "{" else self._value
            return True
        return character in "}]" and self._close(character)

    def _open_string(self, is_key: bool) -> bool:
        self.in_string, self._is_key, self._take = True, is_key, self._in_text
        return True

    def _in_text(self, character: str) -> bool:
        if character == '"':
            self.in_string, self._take = False, self._colon if self._is_key else self._after
        elif character == "\\":
            self._take = self._escape
        return True

    def _escape(self, character: str) -> bool:
        self._hexadecimals = 4
        self._take = self._hexadecimal if character == "u" else self._in_text
        return character == "u" or character in _ESCAPED

    def _hexadecimal(self, character: str) -> bool:
        self._hexadecimals -= 1
        if not self._hexadecimals:
            self._take = self._in_text
        return character in _HEXADECIMAL

    def _literal(self, character: str) -> bool:
        if not self._rest.startswith(character):
            return False
        self._rest = self._rest[1:]
        if not self._rest:
            self._take = self._after
        return True

    def _in_number(self, character: str) -> bool:
        part = _NUMBERS[self._number].get(character)
        if part is not None:
            self._number = part
            return True
        self._take = self._after
        return self._number in _WHOLE_NUMBERS and self._after(character)
