"""A sentence encoder in this process: sentence-transformers, with what a trained router changes in it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routing.card_file import CHANGE_FILE, RouterFolderError, file_sha256
from routing.encoder_graphs import EncoderGraphs
from routing.router_folder import RouterCard, read_router

if TYPE_CHECKING:
    import torch

PREFIX = "Represent the sentence for similar task retrieval: "
"""LoraRetriever's instruction, put before every text, prompt or sample alike."""

CHARACTERS_PER_TOKEN = 16
"""Text beyond this many characters for each token that the encoder reads is cut before it is tokenised."""

MOST_ROWS = 64
"""Texts of one forward pass."""

MODULES = ("Transformer", "Pooling", "Normalize")


class EncoderError(Exception):
    """An encoder cannot be loaded, or a trained router is not one of this encoder; one sentence."""


class EncoderModel:
    """Embeds texts. `id` names what decides the embeddings, `width` their size, `max_tokens` what is read of a text."""

    def __init__(self, model: Any, *, prefix: str, identity: str, graphs: EncoderGraphs | None = None) -> None:
        self.id = identity
        self.graphs = graphs
        self.prefix = prefix
        self.model = model
        self.width = int(model.get_embedding_dimension())
        self.max_tokens = int(model.max_seq_length)

    @classmethod
    def load(
        cls, folder: Path, change: Path | None = None, *, device: str = "cpu", prefix: str = PREFIX
    ) -> EncoderModel:
        """Loads the encoder in `folder`, with a trained router's `change` merged into it.

        A trained router brings its own prefix. Nothing is fetched, and no code of the folder is run.

        Raises:
            EncoderError: sentence-transformers or the model is missing, the folder needs more than a transformer with
                pooling, or `change` was trained on another encoder.
        """
        identity, card = _identify(folder, change, prefix)
        prefix = prefix if card is None else card.prefix
        encoder = cls(load_sentence_transformer(folder, device), prefix=prefix, identity=identity)
        if card is not None and change is not None:
            if card.width != encoder.width:
                raise EncoderError(f"router.json: field width: expected {encoder.width}, the encoder's")
            _apply(encoder.model, card.mode, _tensors(change / CHANGE_FILE))
        return encoder

    def plain(self) -> EncoderModel:
        """The same encoder without an instruction before the texts, which shares its weights."""
        return EncoderModel(self.model, prefix="", identity=plain_id(self.id), graphs=self.graphs)

    def use_graphs(self) -> None:
        """From now on passes on a GPU are captured. The weights have to stay where they are."""
        self.graphs = EncoderGraphs(self.model)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of `texts`, (n, width) float32, L2-normalised; a text of no length is the prefix alone."""
        if not texts:
            return np.zeros((0, self.width), dtype=np.float32)
        longest = self.max_tokens * CHARACTERS_PER_TOKEN
        given = [self.prefix + readable(text[:longest]) for text in texts]
        found = self._one_pass(given) if len(given) <= MOST_ROWS else self.model.encode(given, batch_size=MOST_ROWS)
        return normalised(np.asarray(found, dtype=np.float32))

    def _one_pass(self, given: list[str]) -> np.ndarray:
        """What `encode` gives, without its checks and its sorting: 0.7 ms less for one text, 1.7 for 32."""
        import torch

        model = self.model
        if model.training:
            model.eval()
        prompt = None if model.default_prompt_name is None else model.prompts[model.default_prompt_name]
        features = model.preprocess(given, prompt=prompt)
        with torch.inference_mode():
            output = None if self.graphs is None else self.graphs.embed(features)
            if output is None:
                for name, value in features.items():
                    if isinstance(value, torch.Tensor):
                        features[name] = value.to(model.device, non_blocking=True)
                output = model(features)["sentence_embedding"]
            found: np.ndarray = output.float().cpu().numpy()
        return found


def encoder_id(folder: Path, change: Path | None = None, prefix: str = PREFIX) -> str:
    """The id that `EncoderModel.load` gives, without loading anything: 16 hex digits.

    It is a digest of the weights, the tokenizer, the modules and their pooling, the length limit, the prefix and, if
    any, the trained router's tensors.

    Raises:
        EncoderError: as `EncoderModel.load`, as far as the files show it.
    """
    return _identify(folder, change, prefix)[0]


def plain_id(encoder: str) -> str:
    """The id of the encoder with this id when no instruction stands before the texts."""
    return hashlib.sha256(f"{encoder}/plain".encode()).hexdigest()[:16]


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row that is zero or not finite becomes the first axis, so that scores stay finite."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 0)
    axis = np.eye(1, vectors.shape[1], dtype=np.float32)
    found = np.where(usable, vectors / np.where(usable, lengths, 1), axis)
    return found.astype(np.float32, copy=False)


def readable(text: str) -> str:
    """The text without lone surrogates, which JSON can carry and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def load_sentence_transformer(folder: Path, device: str) -> Any:
    """The folder's SentenceTransformer on `device`, in fp32 and in evaluation mode.

    Raises:
        EncoderError: see `EncoderModel.load`.
    """
    _files(folder)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise EncoderError("choosing adapters needs sentence-transformers: pip install 'loramux[routing]'") from error
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = SentenceTransformer(
                str(folder), device=device, local_files_only=True, model_kwargs={"use_safetensors": True}
            )
    except Exception as error:  # the library raises what its parts raise
        raise EncoderError(f"{folder}: the encoder cannot be loaded ({_one_line(error)})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.float().eval()


def add_head(model: Any, weight: torch.Tensor) -> Any:
    """Appends a linear layer without bias, `weight` (width, width), and returns it.

    The head is meant for the pooled embedding before it is normalised; after it does as well, because a linear map
    keeps the direction of a scaled input and `EncoderModel.embed` normalises last.
    """
    from sentence_transformers.sentence_transformer.modules import Dense
    from torch import nn

    width = weight.shape[0]
    head = Dense(width, width, bias=False, activation_function=nn.Identity(), init_weight=weight.clone())
    model.append(head.to(model.device))
    return head


def transformer(model: Any) -> torch.nn.Module:
    """The language model inside a SentenceTransformer, which `lora` and `full` change."""
    inner: torch.nn.Module = getattr(model[0], "model", None) or model[0].auto_model
    return inner


def _identify(folder: Path, change: Path | None, prefix: str) -> tuple[str, RouterCard | None]:
    """The id, and the card of the trained router."""
    if change is None:
        return _base_id(folder, prefix), None
    try:
        card = read_router(change)
    except RouterFolderError as error:
        raise EncoderError(str(error)) from error
    base = _base_id(folder, card.prefix)
    if base != card.base_id:
        raise EncoderError(
            f"router.json: field base: the router was trained on {card.base_name} ({card.base_id}), "
            f"expected {folder.name} ({base})"
        )
    return hashlib.sha256(f"{base}/{card.mode}/{card.sha256}".encode()).hexdigest()[:16], card


def _base_id(folder: Path, prefix: str) -> str:
    described = json.dumps([_files(folder), prefix], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _files(folder: Path) -> dict[str, Any]:
    """What decides the embeddings, by file. Raises EncoderError for a folder that is no encoder of plain modules."""
    if not (folder / "modules.json").is_file():
        raise EncoderError(f"{folder}: expected a sentence-transformers folder with a modules.json")
    found: dict[str, Any] = {}
    for module in _json(folder / "modules.json", list):
        kind = str(module.get("type", "")) if isinstance(module, dict) else ""
        name = kind.rpartition(".")[2]
        if name not in MODULES or not kind.startswith("sentence_transformers."):
            raise EncoderError(f"{folder / 'modules.json'}: module {kind[:80]!r}: expected {', '.join(MODULES)}")
        at = folder / str(module.get("path", ""))
        if name == "Transformer":
            weights = sorted(at.glob("*.safetensors"))
            if not weights:
                raise EncoderError(f"{at}: expected weights as a safetensors file")
            found["weights"] = [file_sha256(path) for path in weights]
            found["tokenizer"] = [file_sha256(path) for path in (at / "tokenizer.json",) if path.is_file()]
            found["max_tokens"] = _token_limit(at)
        else:
            config = at / "config.json"
            found[name] = _json(config, dict) if config.is_file() else {}
    if "weights" not in found:
        raise EncoderError(f"{folder / 'modules.json'}: expected a module Transformer")
    return found


def transformer_files(folder: Path) -> tuple[Path, int | None]:
    """Where the transformer and its tokenizer lie, and how many tokens it reads, if the files say.

    Raises EncoderError for a folder without such a module.
    """
    for module in _json(folder / "modules.json", list):
        if isinstance(module, dict) and str(module.get("type", "")).endswith("Transformer"):
            at = folder / str(module.get("path", ""))
            limit = _token_limit(at)
            return at, int(limit) if isinstance(limit, int | float) and 0 < limit < 1 << 31 else None
    raise EncoderError(f"{folder / 'modules.json'}: expected a module Transformer")


def _token_limit(at: Path) -> Any:
    """Older folders keep the limit beside the weights, newer ones with the tokenizer."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        limit = _json(at / name, dict).get(key) if (at / name).is_file() else None
        if limit is not None:
            return limit
    return None


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path}: expected a JSON file ({_one_line(error)})") from error
    if not isinstance(value, kind):
        raise EncoderError(f"{path}: expected a JSON {'object' if kind is dict else 'array'}")
    return value


def _tensors(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: Mapping[str, torch.Tensor] = load_file(path)
    return found


def _apply(model: Any, mode: str, change: Mapping[str, torch.Tensor]) -> None:
    import torch

    if mode == "head":
        add_head(model, change["head"])
        return
    weights = dict(transformer(model).named_parameters())
    with torch.no_grad():
        for name, tensor in change.items():
            if mode == "lora":
                module, _, factor = name.rpartition(".")
                if factor == "lora_B":
                    continue
                target, added = f"{module}.weight", change[f"{module}.lora_B"] @ tensor
            else:
                target, added = name, tensor
            weight = weights.get(target)
            if weight is None or weight.shape != added.shape:
                expected = "an unknown name" if weight is None else f"shape {tuple(weight.shape)}"
                raise EncoderError(f"{CHANGE_FILE}: tensor {name[:200]}: the encoder has {expected} there")
            weight.copy_(added.to(weight) + (weight if mode == "lora" else 0))


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= 300 else line[:297] + "..."
