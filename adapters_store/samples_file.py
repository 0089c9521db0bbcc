"""The example inputs that lie beside an adapter's files."""

import json
from pathlib import Path
from typing import Any

from adapters_store.types import AdapterError

SAMPLES_NAME = "samples.json"
MAX_SAMPLES = 50
MAX_SAMPLE_LENGTH = 4096
MAX_SAMPLES_BYTES = 1 << 20

_EXPECTED = f"expected a JSON list of at most {MAX_SAMPLES} strings of 1 to {MAX_SAMPLE_LENGTH} characters"


def read_samples(folder: Path) -> tuple[str, ...] | None:
    """The samples in `samples.json`, None without such a file.

    Raises AdapterError `adapter_bad_config` for anything but a list of at most 50 strings, none of them blank, longer
    than 4096 characters, or with characters that a database refuses.
    """
    path = folder / SAMPLES_NAME
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SAMPLES_BYTES + 1)
    except OSError as error:
        raise _bad(f"cannot be read ({error.strerror})") from error
    if len(content) > MAX_SAMPLES_BYTES:
        raise _bad(f"has more than {MAX_SAMPLES_BYTES} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _bad("is not JSON") from error
    if not isinstance(found, list):
        raise _bad("is not a list")
    if len(found) > MAX_SAMPLES:
        raise _bad(f"has {len(found)} entries")
    for index, sample in enumerate(found):
        _check(index, sample)
    return tuple(found)


def _check(index: int, sample: Any) -> None:
    if not isinstance(sample, str):
        raise _bad(f"has an entry {index} that is no string")
    if not sample.strip() or len(sample) > MAX_SAMPLE_LENGTH:
        raise _bad(f"has an entry {index} of {len(sample)} characters{'' if sample.strip() else ', all blank'}")
    if "\0" in sample or any("\ud800" <= char <= "\udfff" for char in sample):
        raise _bad(f"has an entry {index} with a character that cannot be stored")


def _bad(what: str) -> AdapterError:
    return AdapterError("adapter_bad_config", f"{SAMPLES_NAME} {what}: {_EXPECTED}")
