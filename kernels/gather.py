"""Where the tokens of one step read and write their keys and values in the paged cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GROUP_COST = 256
"""Cost of one more attention call for decoding rows, in gathered tokens.

On a CPU a call takes about 60 us, a token of 3 x 64 fp32 keys and values 0.3 us.
"""


@dataclass(frozen=True)
class KeyPlan:
    """Which keys and values the queries of N sequences read, M each, and the memory that they are gathered into.

    index: int64[N * kv heads * M], rows of a cache seen as [blocks * block_size * kv heads, D].
    keys, values: [N, kv heads, M, D], filled anew by every layer: new memory in each would cost more than the copy
    itself (8 sequences of 200 tokens, 3 x 64: 190 us instead of 90).
    mask: what is added to the scores (0 or -inf), [N, 1, 1, M] or [queries, M]; None where no key is hidden by it.
    causal: the M keys are those of the M queries themselves, and each query sees the ones up to its own.
    rows: int64[N], the query rows, None for all of them.
    """

    index: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    causal: bool = False
    rows: Tensor | None = None

    def gather(self, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Fill `keys` and `values` from the caches of a layer."""
        for cache, buffer in ((k_cache, self.keys), (v_cache, self.values)):
            size = cache.shape[-1]
            torch.index_select(cache.view(-1, size), 0, self.index, out=buffer.view(-1, size))
        return self.keys, self.values


@dataclass
class AttentionMeta:
    """Attention layout of one step of T tokens in S sequences; the first `num_decodes` sequences have one token each.

    slots: int64[T], the cache slot of each new token (block id * block_size + offset).
    block_tables: int64[S, max_blocks], padded with 0.
    query_lens, kv_lens: by sequence; kv_lens include the new tokens.
    What all layers share (rows to gather, masks, buffers) is made once for each window and kept here. The caches of all
    layers must have one shape and the dtype of the queries.
    """

    slots: Tensor
    block_tables: Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    block_size: int
    num_decodes: int
    _decodes: dict[int | None, tuple[KeyPlan, ...]] = field(default_factory=dict, init=False, repr=False)
    _prefills: dict[tuple[int, int | None], KeyPlan] = field(default_factory=dict, init=False, repr=False)

    @property
    def longest(self) -> int:
        """The largest kv length."""
        return max(self.kv_lens)

    def decode_plans(self, cache: Tensor, window: int | None) -> tuple[KeyPlan, ...]:
        """Plans for all decoding sequences, in few groups of similar length."""
        plans = self._decodes.get(window)
        if plans is None:
            lens = self.kv_lens[: self.num_decodes]
            counts = lens if window is None else tuple(min(length, window) for length in lens)
            plans = tuple(self._plan_decodes(cache, rows, counts) for rows in _similar(counts))
            self._decodes[window] = plans
        return plans

    def prefill_plan(self, cache: Tensor, sequence: int, window: int | None) -> KeyPlan:
        """Plan for one sequence."""
        plan = self._prefills.get((sequence, window))
        if plan is None:
            plan = self._prefills[sequence, window] = self._plan_prefill(cache, sequence, window)
        return plan

    def _plan_decodes(self, cache: Tensor, rows: list[int], counts: Sequence[int]) -> KeyPlan:
        """Sequence `rows[i]` reads its last `counts[rows[i]]` tokens."""
        device = self.slots.device
        own = [counts[row] for row in rows]
        count = torch.tensor(own, device=device)[:, None]
        first = torch.tensor([self.kv_lens[row] for row in rows], device=device)[:, None] - count
        offset = torch.arange(max(own), device=device)
        visible = offset < count
        sequence = torch.tensor(rows, device=device)
        # Padding repeats the sequence's own first key: NaN of a neighbour or of stale memory would pass as 0 * NaN.
        return self._plan(
            cache,
            sequence[:, None],
            first + offset * visible,
            mask=None if min(own) == max(own) else _additive(visible, cache.dtype)[:, None, None],
            rows=None if len(rows) == self.num_decodes else sequence,
        )

    def _plan_prefill(self, cache: Tensor, sequence: int, window: int | None) -> KeyPlan:
        device = self.slots.device
        query_len, kv_len = self.query_lens[sequence], self.kv_lens[sequence]
        past = kv_len - query_len
        first = 0 if window is None else max(0, past + 1 - window)
        position = torch.arange(first, kv_len, device=device)
        mask = None
        causal = query_len > 1 and past == 0 and (window is None or window >= kv_len)
        if query_len > 1 and not causal:
            query = torch.arange(past, kv_len, device=device)[:, None]
            visible = position <= query
            if window is not None:
                visible &= position > query - window
            mask = _additive(visible, cache.dtype)
        return self._plan(cache, torch.tensor([[sequence]], device=device), position[None], mask, causal)

    def _plan(
        self,
        cache: Tensor,
        sequence: Tensor,
        position: Tensor,
        mask: Tensor | None,
        causal: bool = False,
        rows: Tensor | None = None,
    ) -> KeyPlan:
        """Sequences [N, 1] that read the tokens at `position` [N, M]."""
        slots = self.block_tables[sequence, position // self.block_size] * self.block_size + position % self.block_size
        heads, size = cache.shape[2:]
        index = slots[:, None] * heads + torch.arange(heads, device=slots.device)[:, None]
        keys, values = cache.new_empty(2, *index.shape, size).unbind()
        return KeyPlan(index.flatten(), keys, values, mask, causal, rows)


def _similar(counts: Sequence[int]) -> list[list[int]]:
    """All rows in order where padding to the longest is cheap, else groups of similar counts, by best single cuts."""
    if len(counts) * (max(counts, default=0) - min(counts, default=0)) <= GROUP_COST:
        return [list(range(len(counts)))] if counts else []
    groups, pending = [], [sorted(range(len(counts)), key=lambda row: -counts[row])]
    while pending:
        rows = pending.pop()
        longest = counts[rows[0]]
        saved, cut = max(((len(rows) - i) * (longest - counts[rows[i]]), i) for i in range(len(rows)))
        if saved > GROUP_COST:
            pending += [rows[cut:], rows[:cut]]
        else:
            groups.append(sorted(rows))
    return groups


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def build_attention(
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_size: int,
    device: torch.device,
) -> AttentionMeta:
    """Layout from plain lists: block table, query length and kv length (with the new tokens) of each sequence.

    Decoding sequences (query length 1) must come first. A table may be longer than its sequence needs.
    Raises ValueError when a length is impossible or a table is too short for its kv length.
    """
    needed = [-(-kv_len // block_size) for kv_len in kv_lens]
    for table, query_len, kv_len, blocks in zip(block_tables, query_lens, kv_lens, needed, strict=True):
        if not 1 <= query_len <= kv_len or len(table) < blocks:
            raise ValueError(
                f"{query_len} new of {kv_len} tokens do not fit a table of {len(table)} blocks of {block_size}"
            )
    width = max(needed, default=0)
    tables = torch.tensor(
        [[*table[:blocks], *[0] * (width - blocks)] for table, blocks in zip(block_tables, needed, strict=True)],
        dtype=torch.int64,
    )
    lens = torch.tensor([tuple(query_lens), tuple(kv_lens)])
    sequence = torch.repeat_interleave(lens[0])
    position = torch.arange(len(sequence)) + (lens[1] - lens[0].cumsum(0))[sequence]
    slots = tables[sequence, position // block_size] * block_size + position % block_size
    num_decodes = next((i for i, length in enumerate(query_lens) if length > 1), len(query_lens))
    return AttentionMeta(
        slots.to(device), tables.to(device), tuple(query_lens), tuple(kv_lens), block_size, num_decodes
    )
