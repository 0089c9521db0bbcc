"""Logits -> one token a row, with its log-probabilities.

A row's random number depends only on the request's seed and the index of the token in its output, so the same request
draws the same numbers whatever shares the batch, and again after preemption. Nothing here waits for the device until
the result is fetched.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import reference
from kernels.ops import Ops
from kernels.reference import forbid
from server.engine.masks import upload_masks
from server.engine.matching import rows_of
from server.engine.sequence import SamplingParams, Sequence, TokenLogprobs

_MASK64 = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of output token `index`: 32 bits of SplitMix64 (Steele et al., 2014) over both."""

    def mix(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        return state ^ (state >> 31)

    return (mix(mix(seed & _MASK64) ^ index) >> 32) / 2**32


@dataclass(frozen=True)
class Sampled:
    """Tokens int64[R] on the device, -1 for a row that is not finite, and the log-probabilities of some of the rows.

    `asked` are those rows; `top`: values and ids of their most likely tokens, [len(asked), widest]; `chosen`:
    fp32[len(asked)]; `counts` how many of the top each of them wants.
    """

    tokens: torch.Tensor
    asked: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    top: tuple[torch.Tensor, torch.Tensor] | None = None
    chosen: torch.Tensor | None = None

    def to_host(self) -> "Sampled":
        """Start the copies; their contents may be read when the stream has reached this point."""
        top = self.top and (_to_host(self.top[0]), _to_host(self.top[1]))
        chosen = None if self.chosen is None else _to_host(self.chosen)
        return Sampled(_to_host(self.tokens), self.asked, self.counts, top, chosen)

    def read(self) -> tuple[list[int | None], list[TokenLogprobs | None]]:
        """By row: the token, None if it is not finite, and its log-probabilities if they were asked for."""
        tokens = [token if token >= 0 else None for token in self.tokens.tolist()]
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if self.top is not None and self.chosen is not None:
            values, ids = self.top
            found = zip(self.asked, self.counts, self.chosen.tolist(), ids.tolist(), values.tolist(), strict=True)
            for row, count, chosen, row_ids, row_values in found:
                if tokens[row] is not None:
                    logprobs[row] = TokenLogprobs(chosen, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        return tokens, logprobs


@torch.inference_mode()
def sample(
    logits: torch.Tensor,
    sequences: Rows[Sequence],
    eos_token_ids: frozenset[int],
    greedy: torch.Tensor | None = None,
    indices: Rows[int] | None = None,
    ops: Ops = reference,
) -> Sampled:
    """Choose the next token of every row; -1 for a row that is not finite, as huge weights can make it.

    logits: (rows, vocabulary); greedy: int64[rows], the most likely token of each row, -1 where the row is not finite,
    if that is known already. indices: of each row's token within its output, if it is not the next one to be sampled.
    Log-probabilities are those of the unmodified distribution, in float32. A row whose mask is pending is not masked.
    """
    tokens = ops.greedy(logits) if greedy is None else greedy
    indices = [sequence.num_sampled for sequence in sequences] if indices is None else indices
    special = [row for row, sequence in enumerate(sequences) if _masked(sequence) or _changed(sequence, indices[row])]
    if not special:
        return Sampled(tokens)
    chosen, numbers = [sequences[row] for row in special], [indices[row] for row in special]
    own = _rows(logits, special)
    changed = [row for row, sequence in enumerate(chosen) if _changed(sequence, numbers[row])]
    if changed:
        own = own.to(torch.float32, copy=True)
    asked = [i for i, sequence in enumerate(chosen) if sequence.request.params.logprobs is not None]
    raw = torch.log_softmax(_rows(own, asked), dim=-1) if asked else None
    for row in changed:
        _adjust(own[row], chosen[row], numbers[row], eos_token_ids)
    masks = _masks(chosen, numbers, eos_token_ids, logits.device) if any(map(_masked, chosen)) else None
    own_tokens = ops.greedy(own, masks)
    drawn = [i for i, sequence in enumerate(chosen) if not sequence.request.params.greedy]
    if drawn:
        rows = upload(drawn, torch.int64, logits.device)
        allowed = _rows(own, drawn) if masks is None else forbid(_rows(own, drawn), _rows(masks, drawn))
        found = _draw(allowed, [chosen[i].request.params for i in drawn], [numbers[i] for i in drawn])
        finite = own_tokens.index_select(0, rows) >= 0
        own_tokens.index_copy_(0, rows, torch.where(finite, found, -1))
    every = len(special) == len(sequences)
    tokens = own_tokens if every else tokens.index_copy(0, upload(special, torch.int64, logits.device), own_tokens)
    if raw is None:
        return Sampled(tokens)
    counts = tuple(chosen[i].request.params.logprobs or 0 for i in asked)
    values, ids = raw.topk(min(max(counts), raw.shape[-1]))
    picked = raw.gather(1, _rows(own_tokens, asked).clamp(min=0)[:, None])[:, 0]
    return Sampled(tokens, tuple(special[i] for i in asked), counts, (values, ids), picked)


def upload(values: Iterable[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`values` as a tensor on `device`, from pinned memory: a plain copy to a GPU would wait for its stream."""
    return torch.tensor(list(values), dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", non_blocking=True)  # into pinned memory, when it comes from a GPU


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits if len(rows) == len(logits) else logits.index_select(0, upload(rows, torch.int64, logits.device))


def _masked(sequence: Sequence) -> bool:
    return sequence.matching is not None and not sequence.matching.pending


def _changed(sequence: Sequence, index: int) -> bool:
    """Whether more is asked for than the most likely of the row's tokens that may come."""
    params = sequence.request.params
    adjusted = params.needs_host_token or params.logit_bias or (sequence.matching is None and index < params.min_tokens)
    return not params.greedy or params.logprobs is not None or bool(adjusted)


def _adjust(logits: torch.Tensor, sequence: Sequence, index: int, eos_token_ids: frozenset[int]) -> None:
    """Penalties, biases and the ban on ending too early, in place on one row.

    Repetition (Keskar et al., 2019) counts prompt and output; presence and frequency count the output, as OpenAI's do.
    """
    params = sequence.request.params
    if params.repetition_penalty != 1.0:
        seen = upload(sequence.tokens, torch.int64, logits.device)  # repeated ids all write the same value
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.num_output:
        counts = Counter(sequence.tokens[sequence.num_prompt :])
        penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
        logits[upload(counts, torch.int64, logits.device)] -= upload(penalties, logits.dtype, logits.device)
    if params.logit_bias:
        ids = upload(params.logit_bias, torch.int64, logits.device)
        logits[ids] += upload(params.logit_bias.values(), logits.dtype, logits.device)
    if index < params.min_tokens and sequence.matching is None:
        banned = upload(sorted(stop_ids(params, eos_token_ids)), torch.int64, logits.device)
        logits.index_fill_(0, banned, -torch.inf)


def _masks(
    sequences: Rows[Sequence], indices: Rows[int], eos_token_ids: frozenset[int], device: torch.device
) -> torch.Tensor:
    """int32[rows, words], see `Matching`: what grammars allow, and of rows without one all.

    `min_tokens` forbids the end here too, unless the grammar allows nothing else.
    """
    free = [
        sequence.matching
        for sequence, index in zip(sequences, indices, strict=True)
        if sequence.matching is not None and _masked(sequence) and index >= sequence.request.params.min_tokens
    ]
    if len(free) == len(sequences) and (rows := rows_of(free)) is not None:
        return rows.to(device, non_blocking=True)  # 64 rows are a megabyte, which other cores have just written
    masks: list[NDArray[np.uint32] | None] = []
    for sequence, index in zip(sequences, indices, strict=True):
        matching, params = sequence.matching, sequence.request.params
        if matching is None or matching.pending:
            masks.append(None)
        elif index < params.min_tokens:
            masks.append(matching.mask_without(stop_ids(params, eos_token_ids)))
        else:
            masks.append(matching.mask)
    every = np.full_like(next(mask for mask in masks if mask is not None), 0xFFFFFFFF)
    return upload_masks([every if mask is None else mask for mask in masks], device)


def stop_ids(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Tokens that end the request. After a constrained output there is nothing but the end, so that is not ignored."""
    ignores = params.ignore_eos and params.constraint is None
    return params.stop_token_ids if ignores else params.stop_token_ids | eos_token_ids


def _draw(logits: torch.Tensor, params: Rows[SamplingParams], indices: Rows[int]) -> torch.Tensor:
    """Inverse-transform sampling: one uniform number a row against the cumulated probabilities."""
    temperature = upload([p.temperature for p in params], logits.dtype, logits.device)
    temperature.clamp_(min=torch.finfo(logits.dtype).tiny)
    # relative to the largest, which becomes 0, nothing overflows however small the temperature
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    cut = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1.0 or p.min_p]
    if len(cut) == len(params):
        logits = _truncate(logits, params)
    elif cut:
        rows = upload(cut, torch.int64, logits.device)
        logits.index_copy_(0, rows, _truncate(logits.index_select(0, rows), [params[row] for row in cut]))
    # float64: over 150,000 tokens float32 sums lose more than the probability of many tokens
    cumulated = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    numbers = [uniform(p.seed, index) for p, index in zip(params, indices, strict=True)]
    targets = upload(numbers, torch.float64, logits.device) * cumulated[:, -1]
    drawn = torch.searchsorted(cumulated, targets[:, None], right=True).squeeze(1)
    return drawn.clamp_(max=logits.shape[-1] - 1)  # a row of NaN would give an id outside the vocabulary


def _truncate(logits: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    """Remove the tokens that top-k, top-p (Holtzman et al., 2020) or min-p (Nguyen et al., 2024) exclude.

    Top-p keeps the smallest set of most likely tokens, among those that top-k kept, whose probability reaches p.
    """
    device, vocabulary = logits.device, logits.shape[-1]
    top_k = upload([min(p.top_k or vocabulary, vocabulary) for p in params], torch.int64, device)
    top_p = upload([p.top_p for p in params], torch.float64, device)
    min_p = upload([p.min_p for p in params], logits.dtype, device)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=device)
    ordered = ordered.masked_fill(rank >= top_k[:, None], -torch.inf)
    probabilities = torch.softmax(ordered.double(), dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    unlikely = (before >= top_p[:, None]) | (ordered - ordered[:, :1] < min_p.log()[:, None])
    unlikely[:, 0] = False
    ordered = ordered.masked_fill(unlikely, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)
