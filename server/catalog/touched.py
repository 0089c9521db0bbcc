"""Which linears an adapter touches, by the names that its file has for them."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from adapters_store.peft_format import WEIGHTS_NAME

_MODULE = re.compile(r"base_model\.model\.model\.(layers\.(\d+)\.\w+\.\w+)\.lora_A(?:\.\w+)?\.weight")


def modules_touched(folder: Path) -> tuple[str, ...]:
    """Names such as `layers.0.self_attn.q_proj`, in the model's order; none of a file that cannot be read."""
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError):
        return ()  # whoever reads the adapter says what is wrong with it
    found = {match[1]: int(match[2]) for match in map(_MODULE.fullmatch, names) if match}
    return tuple(sorted(found, key=lambda module: (found[module], module)))
