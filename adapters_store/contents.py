"""What a folder holds that comes from elsewhere: an adapter as PEFT saves it, or a trained router."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from adapters_store.model_card import CARD_NAME
from adapters_store.peft_format import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from adapters_store.samples_file import SAMPLES_NAME
from adapters_store.types import AdapterError


@dataclass(frozen=True)
class Contents:
    """Names of files. `card` and `local`, what comes only from the server's own disk, may be missing.

    `pickle` is what an author without safetensors has instead of the weights.
    """

    noun: str
    config: str
    weights: str
    card: str | None = None
    pickle: str | None = None
    local: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What is taken from an archive or another machine."""
        return tuple(name for name in (self.config, self.weights, self.card) if name is not None)

    @property
    def fields(self) -> dict[str, str]:
        """Fields of a form that are files, and what they become."""
        named = {"config": self.config, "weights": self.weights, "card": self.card}
        return {field: name for field, name in named.items() if name is not None}

    def check(self, present: set[str]) -> None:
        """Raise unless these are its files: 415 for a pickle, `adapter_incomplete` for a missing one."""
        if self.weights not in present and self.pickle is not None and self.pickle in present:
            raise AdapterError("not_safetensors", f"{self.pickle} is a pickle: expected {self.weights}", 415)
        for name in (self.config, self.weights):
            if name not in present:
                message = f"{name} is missing: expected {self.config} and {self.weights}"
                raise AdapterError(f"{self.noun}_incomplete", message)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What is said of an adapter in general, said of this."""
        try:
            yield
        except AdapterError as error:
            code = error.code.replace("adapter_", f"{self.noun}_")
            if code == error.code:
                raise
            raise AdapterError(code, error.message, error.status, error.param) from error


ADAPTER = Contents("adapter", CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, PICKLE_NAME, SAMPLES_NAME)
ROUTER = Contents("router", "router.json", "router.safetensors")
