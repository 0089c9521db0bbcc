"""What the decoder needs to know of a model, read from its config.json."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters_store.types import LinearShape

Number = TypeVar("Number", int, float)

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_KINDS = ("default", "linear", "llama3")


class ModelError(ValueError):
    """A model folder that cannot be served. The message is one sentence."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear or llama3; the last three fields belong to llama3."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """One Llama-like decoder. Families differ in nothing but these fields.

    sliding_windows: per layer, the number of last tokens that attention sees, None for all of them.
    eos_token_ids: tokens that end an answer, generation_config.json's before config.json's.
    dtype: what the checkpoint says its weights are, by torch's name.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def from_folder(cls, path: str | Path) -> "ModelConfig":
        """Read config.json, and generation_config.json if it exists. Raises ModelError."""
        folder = Path(path)
        if not folder.is_dir():
            raise ModelError(f"The model folder {folder} does not exist.")
        raw = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        if generation.is_file():
            eos = _read_json(generation).get("eos_token_id")
            if eos is not None:
                raw = {**raw, "eos_token_id": eos}
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """From the contents of a config.json. Raises ModelError naming the field that is unsupported or wrong."""
        family = _family(raw)
        _refuse_unsupported(raw)
        fields = _Fields(raw)
        hidden_size = fields.number("hidden_size", int)
        num_layers = fields.number("num_hidden_layers", int)
        num_heads = fields.number("num_attention_heads", int)
        num_kv_heads = fields.number(
            "num_key_value_heads", int, 8 if family == "mistral" else num_heads, null=num_heads
        )
        if num_heads % num_kv_heads:
            raise ModelError(
                f"num_attention_heads in config.json is {num_heads}; expected a multiple of "
                f"num_key_value_heads, {num_kv_heads}."
            )
        default_head_dim = hidden_size // num_heads
        head_dim = fields.number("head_dim", int, 128 if family == "qwen3" else default_head_dim, null=default_head_dim)
        if head_dim % 2:
            raise ModelError(f"head_dim in config.json is {head_dim}; rotary embeddings need an even number.")
        attention_bias = family in ("llama", "qwen3") and fields.flag("attention_bias")
        return cls(
            family=family,
            vocab_size=fields.number("vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=fields.number("intermediate_size", int),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.number("max_position_embeddings", int, 2048 if family == "llama" else 32768),
            norm_eps=fields.number("rms_norm_eps", float, 1e-6),
            rope=_rope(raw),
            sliding_windows=_sliding_windows(family, fields, num_layers),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=family == "llama" and fields.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            eos_token_ids=_eos(raw),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        )

    @property
    def linear_shape(self) -> LinearShape:
        """Sizes of the seven linears that adapters act on."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inputs = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), self.hidden_size)
        outputs = {"q_proj": query, "k_proj": kv, "v_proj": kv, "o_proj": self.hidden_size}
        outputs |= {
            "gate_proj": self.intermediate_size,
            "up_proj": self.intermediate_size,
            "down_proj": self.hidden_size,
        }
        return LinearShape(self.num_layers, inputs | {"o_proj": query, "down_proj": self.intermediate_size}, outputs)

    def fingerprint(self) -> str:
        """sha256 of the architecture; weights do not count."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class _Fields:
    """Typed reads of config.json, with errors that name the field."""

    def __init__(self, raw: dict[str, Any], where: str = "config.json") -> None:
        self.raw = raw
        self.where = where

    def number(
        self, name: str, kind: type[Number], default: Number | None = None, null: Number | None = None
    ) -> Number:
        """A positive number; `default` where the key is missing, `null` where it is null; required without them."""
        value = self.raw.get(name, default)
        if value is None and name in self.raw and null is not None:
            return null
        if value is None:
            raise ModelError(f"{self.where} lacks {name}, a positive {_NAMES[kind]}.")
        accepted = (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, accepted) or not 0 < value < math.inf:
            raise ModelError(f"{name} in {self.where} is {value!r}; expected a positive {_NAMES[kind]}.")
        return kind(value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name) or False
        if not isinstance(value, bool):
            raise ModelError(f"{name} in {self.where} is {value!r}; expected true or false.")
        return value


_NAMES: dict[type, str] = {int: "integer", float: "number"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} is not a model folder: it has no {path.name}.") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds a JSON {type(raw).__name__}; expected an object.")
    return raw


def _family(raw: dict[str, Any]) -> str:
    names = raw.get("architectures") or []
    found = names[0] if isinstance(names, list) and names else raw.get("model_type")
    family = FAMILIES.get(found) if isinstance(found, str) else None
    if family is None and not names and found in FAMILIES.values():
        family = str(found)
    if family is None:
        raise ModelError(f"The architecture {found!r} is not supported; supported are {', '.join(FAMILIES)}.")
    return family


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    if raw.get("quantization_config"):
        raise ModelError("config.json has a quantization_config; only unquantised weights are supported.")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"hidden_act in config.json is {activation!r}; only 'silu' is supported.")


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """Both spellings: `rope_parameters` with everything in it, or `rope_scaling` beside `rope_theta`."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    found = raw.get(name) or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise ModelError(f"{name} in config.json is {found!r}; expected one flat object for all layers.")
    parameters = {"rope_theta": raw.get("rope_theta") or 10000.0, **found}
    partial = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"partial_rotary_factor in config.json is {partial!r}; only 1.0 is supported.")
    fields = _Fields(parameters, f"{name} of config.json")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = fields.number("rope_theta", float)
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", fields.number("factor", float))
    if kind == "llama3":
        low, high = fields.number("low_freq_factor", float), fields.number("high_freq_factor", float)
        if low >= high:
            raise ModelError(
                f"high_freq_factor in {fields.where} is {high}; expected more than low_freq_factor, {low}."
            )
        original = fields.number("original_max_position_embeddings", int)
        return RopeConfig(theta, "llama3", fields.number("factor", float), low, high, original)
    raise ModelError(f"The rope type {kind!r} in config.json is not supported; supported are {', '.join(ROPE_KINDS)}.")


def _sliding_windows(family: str, fields: _Fields, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: one window for all layers. Qwen: only with use_sliding_window, in the layers that layer_types names."""
    full: tuple[int | None, ...] = (None,) * num_layers
    if family == "llama" or (family != "mistral" and not fields.flag("use_sliding_window")):
        return full
    if fields.raw.get("sliding_window", 4096) is None:
        return full
    window = fields.number("sliding_window", int, 4096)
    if family == "mistral":
        return (window,) * num_layers
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        first = fields.raw.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise ModelError(f"max_window_layers in config.json is {first!r}; expected an integer.")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"layer_types in config.json is {kinds!r}; expected {num_layers} times full_attention or sliding_attention."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _eos(raw: dict[str, Any]) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ModelError(f"eos_token_id is {eos!r}; expected a token id or a list of them.")
    return tuple(ids)
