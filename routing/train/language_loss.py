"""The language model's own loss, with the vocabulary head on no more hidden states than count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from routing.train.batches import IGNORED


def language_loss(causal: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that count, fp32 scalar; of ids, mask and labels (rows, longest) int64.

    Only the hidden states that predict a counted token pass the vocabulary head, a small model's costliest product.

    Args:
        causal: a causal language model of `transformers`.
        labels: the token itself where it counts, -100 elsewhere.
    """
    hidden = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    following = labels[:, 1:]
    counted = following != IGNORED
    logits = causal.get_output_embeddings()(hidden[:, :-1][counted])
    return torch.nn.functional.cross_entropy(logits.float(), following[counted])
