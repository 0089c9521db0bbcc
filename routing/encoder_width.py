"""The size of an encoder's embeddings, from its folder's files alone."""

import json
from pathlib import Path
from typing import Any

from routing.encoder_model import EncoderError


def encoder_width(folder: Path) -> int:
    """Numbers in one embedding of the sentence-transformers folder, without loading it.

    It is the pooling's: its input's width for each of its modes. Trained changes keep it.

    Raises:
        EncoderError: the folder does not say.
    """
    width, modes = 0, 1
    try:
        for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
            kind = str(module["type"]).rpartition(".")[2]
            if kind == "Pooling":
                config = json.loads((folder / module["path"] / "config.json").read_text(encoding="utf-8"))
                width, modes = _pooled(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{folder}: expected the files of a sentence-transformers folder ({error})") from error
    if width < 1:
        raise EncoderError(f"{folder}: expected a module Pooling that says its embedding's dimension")
    return width * modes


def _pooled(config: dict[str, Any]) -> tuple[int, int]:
    width = int(config.get("embedding_dimension") or config.get("word_embedding_dimension") or 0)
    modes = config.get("pooling_mode")
    if isinstance(modes, list):
        return width, len(modes)
    flags = [value for name, value in config.items() if name.startswith("pooling_mode_")]
    return width, 1 if modes else max(1, sum(value is True for value in flags))
