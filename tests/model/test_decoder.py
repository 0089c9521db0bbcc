"""Logits of every family against `transformers`, through the paged cache."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.model.decoder import Decoder
from tests.model.conftest import CPU, VARIANTS, Driver, Saved

TOKENS = [(11 * i * i + 5 * i + 3) % 90 + 3 for i in range(40)]
OTHER = [(7 * i * i + i + 17) % 90 + 3 for i in range(33)]


@pytest.mark.parametrize("variant", VARIANTS)
class TestAgainstTransformers:
    def test_prefill_in_one_go(self, saved: Callable[[str], Saved], variant: str) -> None:
        model = saved(variant)
        driver = Driver(Decoder.from_folder(model.folder, CPU, torch.float32))
        [logits] = driver.step([(driver.add(), TOKENS)])
        torch.testing.assert_close(logits, model.logits(TOKENS), atol=1e-4, rtol=1e-4)

    def test_chunks_and_decodes_of_two_sequences_in_the_same_steps(
        self, saved: Callable[[str], Saved], variant: str
    ) -> None:
        model = saved(variant)
        driver = Driver(Decoder.from_folder(model.folder, CPU, torch.float32))
        first, second = driver.add(), driver.add()
        parts = driver.step([(first, TOKENS[:7])])
        got = {first: [parts[0]], second: []}
        steps = [
            [(first, TOKENS[7:8]), (second, OTHER[:10])],
            [(first, TOKENS[8:9]), (second, OTHER[10:13])],
            [(second, OTHER[13:14]), (first, TOKENS[9:30])],
            *[[(first, [TOKENS[30 + i]]), (second, [OTHER[14 + i]])] for i in range(10)],
            [(second, OTHER[24:])],
        ]
        for step in steps:
            for (number, _), logits in zip(step, driver.step(step), strict=True):
                got[number].append(logits)
        torch.testing.assert_close(torch.cat(got[first]), model.logits(TOKENS), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat(got[second]), model.logits(OTHER), atol=1e-4, rtol=1e-4)


def test_logits_of_the_wanted_rows_only(saved: Callable[[str], Saved]) -> None:
    model = saved("llama")
    driver = Driver(Decoder.from_folder(model.folder, CPU, torch.float32))
    driver.logit_rows = torch.tensor([8, 3])
    [logits] = driver.step([(driver.add(), TOKENS[:9])])
    torch.testing.assert_close(logits, model.logits(TOKENS[:9])[[8, 3]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_may_want_no_logits(saved: Callable[[str], Saved], dtype: torch.dtype) -> None:
    driver = Driver(Decoder.from_folder(saved("llama").folder, CPU, dtype))
    row = driver.add()
    driver.logit_rows = torch.empty(0, dtype=torch.int64)
    [logits] = driver.step([(row, TOKENS[:5])])
    assert logits.shape == (0, 96)
    driver.logit_rows = None
    [after] = driver.step([(row, TOKENS[5:9])])
    if dtype is torch.float32:
        torch.testing.assert_close(after, saved("llama").logits(TOKENS[:9])[5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_bf16_stays_close_to_fp32(saved: Callable[[str], Saved], variant: str) -> None:
    model = saved(variant)
    driver = Driver(Decoder.from_folder(model.folder, CPU, torch.bfloat16))
    row = driver.add()
    [prefill] = driver.step([(row, TOKENS[:30])])
    decoded = [driver.step([(row, [token])])[0] for token in TOKENS[30:]]
    logits = torch.cat([prefill, *decoded]).float()
    exact = model.logits(TOKENS)
    assert torch.nn.functional.cosine_similarity(logits, exact, dim=-1).min() > 0.995
    theirs = model.bf16().logits(TOKENS).float()
    assert (logits - exact).norm() < 1.5 * (theirs - exact).norm()


def test_greedy_text_of_a_real_model(smollm2: Path) -> None:
    """Three prompts decoded together give what `transformers` gives for each alone."""
    model = Saved(smollm2, AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval())
    prompts = [[504, 3575, 282, 4649, 314], [1604, 253, 655, 284, 260, 3575, 28], [2178, 49152 - 60, 99]]
    driver = Driver(Decoder.from_folder(smollm2, CPU, torch.float32))
    rows = [driver.add() for _ in prompts]
    texts = [list(prompt) for prompt in prompts]
    new = prompts
    for _ in range(16):
        logits = driver.step(list(zip(rows, new, strict=True)))
        new = [[int(part[-1].argmax())] for part in logits]
        for text, tokens in zip(texts, new, strict=True):
            text.extend(tokens)
    for prompt, text in zip(prompts, texts, strict=True):
        best = model.logits(text[:-1])[len(prompt) - 1 :].topk(2)
        # A choice between two tokens whose logits are equal up to rounding may go either way.
        for token, indices, values in zip(text[len(prompt) :], best.indices, best.values, strict=True):
            assert token == indices[0] or (token == indices[1] and values[0] - values[1] < 1e-3)
