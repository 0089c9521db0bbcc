"""The description of an adapter in its README."""

import re
from pathlib import Path

CARD_NAME = "README.md"
MAX_CARD_BYTES = 1 << 16
MAX_DESCRIPTION = 500

_FRONT_MATTER = re.compile(r"\A---\s*\n.*?\n---\s*(?:\n|\Z)", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_NOT_PROSE = ("#", "-", "*", "|", "!", "[!", "<", "`", ">", "[More Information Needed]")


def read_description(folder: Path) -> str:
    """The first paragraph of prose in the card, on one line, at most 500 characters; empty if there is none."""
    path = folder / CARD_NAME
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        text = file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    text = _COMMENT.sub("", _FRONT_MATTER.sub("", text))
    for paragraph in re.split(r"\n\s*\n", text):
        prose = [line.strip() for line in paragraph.splitlines() if line.strip() and not _is_markup(line.strip())]
        if prose:
            return " ".join(prose)[:MAX_DESCRIPTION]
    return ""


def _is_markup(line: str) -> bool:
    return line.startswith(_NOT_PROSE)
