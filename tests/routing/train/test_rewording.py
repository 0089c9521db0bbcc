"""Instructions that are worded otherwise: which rows, which words, and that gates learn from them."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from meteora_world import toy_task, write_adapter
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from routing.train.adapter import TrainError
from routing.train.batches import encode
from routing.train.data import TaskRow
from routing.train.meteora import train_meteora
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.rewording import VERSIONS, Versions, reworded, vocabulary
from routing.train.router_recipe import RouterRun

WORDS = ("one", "two", "three")
RUN = RouterRun(progress=False, evaluation_rows=0, checkpoint_every=1, base_name="tiny", name="toy")


def row(instruction: str, text: str = "input") -> TaskRow:
    return TaskRow("task", "toy", instruction, text, "target", 0)


@pytest.fixture(scope="module")
def tokenizer(chat_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model)


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6), st.integers(0, 99))
def test_only_words_of_the_instruction_change_and_none_is_added(instruction: Sequence[str], seed: int) -> None:
    own = row(" ".join(instruction))
    made = reworded(own, WORDS, random.Random(seed))
    assert made == reworded(own, WORDS, random.Random(seed))
    assert replace(made, instruction=own.instruction) == own
    assert len(made.instruction.split()) <= len(instruction)
    rest = iter(instruction)
    assert all(word in rest for word in made.instruction.split() if word not in WORDS), "in another order"


def test_anything_from_no_word_to_all_is_left_out_or_another() -> None:
    chance = random.Random(0)
    found = {reworded(row("say it"), WORDS, chance).prompt for _ in range(400)}
    assert {"input", "say it\ninput", "it\ninput", "one two\ninput", "say three\ninput"} <= found
    left_out = {reworded(row("say it now"), (), chance).instruction for _ in range(200)}
    assert left_out == {"", "say", "it", "now", "say it", "say now", "it now", "say it now"}


def test_a_row_without_input_stays_as_it_is() -> None:
    alone = row("what is 2 + 2?", "")
    assert all(reworded(alone, WORDS, random.Random(seed)) is alone for seed in range(20))


def test_the_vocabulary_is_the_tokens_that_are_words(tokenizer: PreTrainedTokenizerBase) -> None:
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    made.train_from_iterator(["the tree, the 42 trees, für a café"] * 9, BpeTrainer(show_progress=False))
    words = vocabulary(PreTrainedTokenizerFast(tokenizer_object=made))
    assert words == sorted(set(words))
    assert {"the", "tree", "trees", "für", "café"} <= set(words)
    assert all(word.isalpha() and len(word) > 1 for word in words)
    assert vocabulary(tokenizer) == [], "its tokens are single bytes"


def test_a_share_of_the_versions_is_reworded_each_for_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row("say it in a few words", "abc" * number) for number in range(1, 9)]
    own = encode(tokenizer, rows, 1000)
    found = Versions(tokenizer, rows, own, WORDS, 0.5, 1000, 3)
    assert len(found) == len(list(found)) == VERSIONS * len(rows)
    changed = [example != own[number // VERSIONS] for number, example in enumerate(found)]
    assert 0.3 < sum(changed) / len(changed) < 0.6
    assert len({found[number] for number in range(VERSIONS)}) > 1 + sum(changed[:VERSIONS]) // 2
    for example, text in zip(found, (each.input for each in rows for _ in range(VERSIONS)), strict=True):
        assert f"{text}<" in tokenizer.decode(example.ids)
        assert tokenizer.decode(example.ids[-example.answer_length :]).startswith("target")


def test_versions_are_a_function_of_seed_and_place(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row("say it in a few words", text) for text in "ab"]
    own = encode(tokenizer, rows, 1000)
    found = Versions(tokenizer, rows, own, WORDS, 1.0, 1000, 3)
    assert [found[5], found[-1], *found[2:4]] == [list(found)[place] for place in (5, len(found) - 1, 2, 3)]
    assert list(found) != list(Versions(tokenizer, rows, own, WORDS, 1.0, 1000, 4))
    assert list(Versions(tokenizer, rows, own, WORDS, 0.0, 1000, 3)) == [each for each in own for _ in range(VERSIONS)]
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_version_that_is_too_long_stays_as_its_row_is(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row("say it in words", "abc" * number) for number in range(1, 5)]
    own = encode(tokenizer, rows, 1000)
    longest = max(len(example.ids) for example in own)
    free, found = (Versions(tokenizer, rows, own, ["internationally"], 1.0, most, 0) for most in (1000, longest))
    assert max(len(example.ids) for example in free) > longest >= max(len(example.ids) for example in found)
    for number, (example, other) in enumerate(zip(found, free, strict=True)):
        assert example == (other if len(other.ids) <= longest else own[number // VERSIONS])


def test_gates_learn_from_them(chat_model: Path, tmp_path: Path) -> None:
    tasks = [toy_task("ab", "ab"), toy_task("xyz", "xyz")]
    adapters = {task.name: tmp_path / task.name for task in tasks}
    for task in tasks:
        write_adapter(tmp_path / task.name, chat_model, {"q_proj": 2, "down_proj": 3}, seed=len(task.name))

    def losses(name: str, **own: Any) -> Any:
        recipe = MeteoraRecipe(steps=2, batch_size=2, warmup_steps=0, max_length=80, **own)
        result = train_meteora(chat_model, tasks, adapters, tmp_path / name, recipe, RUN)
        assert result.card.training["recipe"]["reworded"] == recipe.reworded
        return result.losses

    assert losses("plain") != losses("reworded", reworded=1.0)
    with pytest.raises(TrainError, match=r"reworded 1\.5: expected a share from 0 to 1"):
        losses("wrong", reworded=1.5)
