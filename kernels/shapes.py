"""Shapes of the models that are measured, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Linear:
    """A group of linears that share an input: y [T, sum(slices)] = x [T, inputs] W^T."""

    inputs: int
    slices: tuple[int, ...]

    @property
    def outputs(self) -> int:
        return sum(self.slices)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder; `tied`: the head is the embedding."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    tied: bool
    max_length: int = 8192

    @property
    def linears(self) -> dict[str, Linear]:
        """The four groups of a layer's linears, by the name of the group."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv": Linear(self.hidden_size, (query, kv, kv)),
            "o": Linear(query, (self.hidden_size,)),
            "gate_up": Linear(self.hidden_size, (self.intermediate_size, self.intermediate_size)),
            "down": Linear(self.intermediate_size, (self.hidden_size,)),
        }

    @property
    def head(self) -> Linear:
        return Linear(self.hidden_size, (self.vocab_size,))

    @property
    def num_parameters(self) -> int:
        """Parameters, norms included, biases excluded."""
        layer = sum(linear.inputs * linear.outputs for linear in self.linears.values()) + 2 * self.hidden_size
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings + self.hidden_size


SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "8b": ModelShape(128256, 4096, 14336, 32, 32, 8, 128, 5e5, tied=False),
        "1b": ModelShape(128256, 2048, 8192, 16, 32, 8, 64, 5e5, tied=True),
        "smollm2-135m": ModelShape(49152, 576, 1536, 30, 9, 3, 64, 1e5, tied=True),
        "tiny": ModelShape(512, 64, 96, 2, 4, 2, 16, 1e4, tied=True, max_length=2048),
    }
)
"""Llama-3-8B, Llama-3.2-1B, SmolLM2-135M, and one for tests."""
