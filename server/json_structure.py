"""How much structure a JSON text has, counted before it is parsed.

A parser needs time and memory by the number of values, not of bytes: 14 MB of empty objects took it 2.6 s, their
repeated keys 5.6 s, while the same amount of text takes 0.1 s. Nothing here looks at single characters in Python.
"""

CHUNK = 1 << 20
"""Bytes between two chances for other threads."""
MOST_CONTAINERS = 100_000
"""Objects and lists. A chat of so many tokens as the longest contexts have needs fewer."""
MOST_STRINGS = 200_000
MOST_VALUES = 1 << 19
"""Entries of objects and lists. The largest need is token ids: of one prompt in the longest contexts, or some."""


class TooComplex(ValueError):
    """More structure than a request can need, in one sentence."""


def check_structure(text: bytes) -> None:
    """Raises TooComplex beyond the bounds above. What is not JSON is counted as far as a parser would read it."""
    if text.count(b'"') <= MOST_STRINGS and text.count(b",") <= MOST_VALUES and _containers(text) <= MOST_CONTAINERS:
        return  # whatever of it stands in strings
    containers = quotes = entries = 0
    is_inside, rest = False, b""
    for start in range(0, len(text), CHUNK):
        # Without escaped quotes the strings are every second part. Pairs of backslashes go first: they escape nothing.
        part = (rest + text[start : start + CHUNK]).replace(b"\\\\", b"")
        rest = b"\\" if part.endswith(b"\\") else b""
        part = part.removesuffix(b"\\").replace(b'\\"', b"")
        count = part.count(b'"')
        quotes += count
        if quotes > 2 * MOST_STRINGS:
            raise TooComplex(f"the body has more than {MOST_STRINGS} strings")
        outside = b"".join(part.split(b'"')[is_inside::2])
        is_inside ^= count % 2 == 1
        containers += _containers(outside)
        if containers > MOST_CONTAINERS:
            raise TooComplex(f"the body has more than {MOST_CONTAINERS} objects and lists")
        entries += outside.count(b",")
        if entries > MOST_VALUES:
            raise TooComplex(f"the body has more than {MOST_VALUES} values")


def _containers(text: bytes) -> int:
    return text.count(b"{") + text.count(b"[")
