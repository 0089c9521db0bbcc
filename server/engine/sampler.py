"""Logits -> one token a row, with its log-probabilities.

A row's random number depends only on the request's seed and the index of the token in its output, so the same request
draws the same numbers whatever shares the batch, and again after preemption.
"""

from collections import Counter
from collections.abc import Sequence as Rows

import torch

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


@torch.inference_mode()
def sample(
    logits: torch.Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int]
) -> tuple[list[int | None], list[TokenLogprobs | None]]:
    """Choose the next token of every row; None for a row that is not finite, as huge weights can make it.

    logits: (rows, vocabulary) float32, changed in place. Log-probabilities are those of the unmodified distribution;
    rows whose parameters do not ask for them get None.
    """
    asked = [row for row, sequence in enumerate(sequences) if sequence.request.params.logprobs is not None]
    raw = torch.log_softmax(logits[asked], dim=-1) if asked else None
    for row, sequence in enumerate(sequences):
        _adjust(logits[row], sequence, eos_token_ids)
    highest, tokens = logits.max(dim=-1)  # NaN counts as the highest
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.request.params.greedy]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [sequences[row] for row in drawn])
    finite = highest.isfinite().tolist()
    chosen = [token if is_finite else None for token, is_finite in zip(tokens.tolist(), finite, strict=True)]
    logprobs: list[TokenLogprobs | None] = [None] * len(sequences)
    if raw is not None:
        for index, row in enumerate(asked):
            token = chosen[row]
            if token is not None:
                logprobs[row] = _logprobs(raw[index], token, sequences[row].request.params.logprobs or 0)
    return chosen, logprobs


def _adjust(logits: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
    """Penalties, biases and the ban on ending too early, in place on one row.

    Repetition (Keskar et al., 2019) counts prompt and output; presence and frequency count the output, as OpenAI's do.
    """
    params = sequence.request.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sequence.tokens, device=logits.device)  # repeated ids all write the same value
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.num_output:
        counts = Counter(sequence.tokens[sequence.num_prompt :])
        penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
        ids = torch.tensor(list(counts), device=logits.device)
        logits[ids] -= torch.tensor(penalties, dtype=logits.dtype, device=logits.device)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if sequence.num_output < params.min_tokens:
        logits[sorted(stop_ids(params, eos_token_ids))] = -torch.inf


def stop_ids(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Tokens that end the request."""
    return params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_token_ids


def _draw(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Inverse-transform sampling: one uniform number a row against the cumulated probabilities."""
    params = [sequence.request.params for sequence in sequences]
    temperature = torch.tensor([p.temperature for p in params], dtype=logits.dtype, device=logits.device)
    temperature.clamp_(min=torch.finfo(logits.dtype).tiny)
    # relative to the largest, which becomes 0, nothing overflows however small the temperature
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    cut = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1.0 or p.min_p]
    if cut:
        logits[cut] = _truncate(logits[cut], [params[row] for row in cut])
    # float64: over 150,000 tokens float32 sums lose more than the probability of many tokens
    cumulated = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    numbers = [uniform(s.request.params.seed, s.num_output) for s in sequences]
    targets = torch.tensor(numbers, dtype=torch.float64, device=logits.device) * cumulated[:, -1]
    drawn = torch.searchsorted(cumulated, targets[:, None], right=True).squeeze(1)
    return drawn.clamp_(max=logits.shape[-1] - 1)  # a row of NaN would give an id outside the vocabulary


def _truncate(logits: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    """Remove the tokens that top-k, top-p (Holtzman et al., 2020) or min-p (Nguyen et al., 2024) exclude.

    Top-p keeps the smallest set of most likely tokens, among those that top-k kept, whose probability reaches p.
    """
    device, vocabulary = logits.device, logits.shape[-1]
    top_k = torch.tensor([min(p.top_k or vocabulary, vocabulary) for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([p.min_p for p in params], dtype=logits.dtype, device=device)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=device)
    ordered = ordered.masked_fill(rank >= top_k[:, None], -torch.inf)
    probabilities = torch.softmax(ordered.double(), dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    unlikely = (before >= top_p[:, None]) | (ordered - ordered[:, :1] < min_p.log()[:, None])
    unlikely[:, 0] = False
    ordered = ordered.masked_fill(unlikely, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _logprobs(logprobs: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(logprob=float(logprobs[token]), top=top)
