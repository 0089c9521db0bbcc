from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from routing.train.batches import IGNORED, batch_rows, collate, encode
from routing.train.data import TaskDataError, TaskRow

ROWS = (TaskRow("t", "c", "Say.", "ab", "AB", 0), TaskRow("t", "c", "Say.", "abcd", "ABCD", 0))


def test_only_the_answer_and_the_end_of_turn_count(chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    examples = encode(tokenizer, ROWS, max_length=64)
    assert tokenizer.decode(examples[0].ids) == "<s>user\nSay.\nab</s><s>assistant\nAB</s>"
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))
    assert batch.ids.shape == batch.mask.shape == batch.labels.shape
    for index, row in enumerate(ROWS):
        counted = batch.labels[index][batch.labels[index] != IGNORED]
        assert tokenizer.decode(counted) == f"{row.target}</s>"
        assert int(batch.mask[index].sum()) == len(examples[index].ids)
    assert batch.ids[0, -4:].tolist() == [tokenizer.pad_token_id] * 4


def test_row_that_is_too_long_is_named(chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    longest = len(encode(tokenizer, ROWS, 64)[1].ids)
    assert len(encode(tokenizer, ROWS, longest)) == 2
    with pytest.raises(TaskDataError, match=f"task t, row 2: {longest} tokens, expected at most {longest - 1}"):
        encode(tokenizer, ROWS, longest - 1)


@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_epoch_visits_every_row_once(count: int, batch_size: int, epochs: int, seed: int) -> None:
    steps = -(-count * epochs // batch_size)
    batches = [batch_rows(count, batch_size, step, seed) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    visited = [row for batch in batches for row in batch]
    for epoch in range(epochs):
        assert sorted(visited[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_order_depends_on_seed_and_epoch() -> None:
    first, other_seed, next_epoch = batch_rows(30, 30, 0, 0), batch_rows(30, 30, 0, 1), batch_rows(30, 30, 1, 0)
    assert first == batch_rows(30, 30, 0, 0)
    assert first != other_seed
    assert first != next_epoch
