from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from routing.train.adapter import AdapterRecipe, load_model
from routing.train.batches import Example
from routing.train.fused_norm import FusedNorm, fuse_norms
from routing.train.grouped_lora import GroupedLora, lora_starts
from routing.train.grouped_loss import grouped_batch, losses_and_gradients

RECIPE = AdapterRecipe(rank=5, alpha=7)


def test_each_row_passes_the_factors_of_its_task(chat_model: Path) -> None:
    model, _ = load_model(chat_model, RECIPE, "cpu")
    causal = model.get_base_model()
    starts = lora_starts(model)
    ids = torch.randint(0, 250, (6, 7))
    base = AutoModelForCausalLM.from_pretrained(chat_model)(ids).logits
    lora = GroupedLora(causal, starts, 3)
    for task in range(3):
        for factor in lora.state(task).values():  # views; what pads the ranks stays zero
            factor.normal_(std=0.2)
    torch.testing.assert_close(causal(ids).logits, base)  # used by no task yet
    lora.use(3)
    together = causal(ids).logits
    states = [{key: value.clone() for key, value in lora.state(task).items()} for task in range(3)]
    assert states[0].keys() == {
        f"base_model.model.{start.name}.lora_{side}.weight" for start in starts for side in ("A", "B")
    }
    lora.use(2)
    torch.testing.assert_close(causal(ids[:4]).logits, together[:4])
    reference, _ = load_model(chat_model, RECIPE, "cpu")
    for task, state in enumerate(states):
        named = {key.replace(".weight", ".default.weight"): value for key, value in state.items()}
        assert not reference.load_state_dict(named, strict=False).unexpected_keys
        torch.testing.assert_close(
            reference(ids[2 * task : 2 * task + 2]).logits, together[2 * task : 2 * task + 2], rtol=1e-4, atol=1e-5
        )


def test_factors_start_as_those_of_peft(chat_model: Path) -> None:
    model, _ = load_model(chat_model, RECIPE, "cpu")
    fresh = {name: weight.clone() for name, weight in model.named_parameters() if "lora_" in name}
    starts = lora_starts(model)
    causal = model.get_base_model()
    first = GroupedLora(causal, starts, 2)
    with torch.no_grad():
        first.values.zero_()
    second = GroupedLora(causal, starts, 3)  # a group after another begins anew
    for task in range(3):
        for key, value in second.state(task).items():
            assert torch.equal(value, fresh[key.replace(".weight", ".default.weight")])


def test_losses_do_not_depend_on_how_many_tokens_the_head_takes_at_once(chat_model: Path) -> None:
    model, _ = load_model(chat_model, RECIPE, "cpu")
    causal = model.get_base_model()
    lora = GroupedLora(causal, lora_starts(model), 2)
    with torch.no_grad():
        lora.values.normal_(std=0.1)
    lora.use(2)
    rows = [[Example((1, 2, 3, 4), 2), Example((5, 6), 1)], [Example((7, 8, 9), 1), Example((1, 1, 2, 3, 5, 8), 5)]]
    batch = grouped_batch(rows, 258, torch.device("cpu"))
    losses, gradients = losses_and_gradients(causal, batch, lora.weights)
    for task, own in enumerate(rows):
        lora.use(2)
        total = torch.zeros(())
        for example in own:  # each row alone, unpadded, twice: once for each task's factors
            ids = torch.tensor([example.ids, example.ids])
            logits = causal(ids).logits[task, -1 - example.answer_length : -1]
            each = torch.nn.functional.cross_entropy(logits, ids[0, -example.answer_length :], reduction="sum")
            total = total + each / sum(row.answer_length for row in own)
        torch.testing.assert_close(losses[task], total.detach())
        alone = torch.autograd.grad(total, lora.weights)
        for found, expected in zip(gradients, alone, strict=True):
            torch.testing.assert_close(found[task], expected[task], rtol=1e-4, atol=1e-6)
    for tokens in (1, 4):
        parts, found = losses_and_gradients(causal, batch, lora.weights, head_tokens=tokens)
        torch.testing.assert_close(parts, losses)
        torch.testing.assert_close(found, gradients)


def test_fused_norms_answer_as_the_models_own(chat_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    ids = torch.randint(0, 250, (2, 9))
    expected = model(ids).logits
    fuse_norms(model)
    assert sum(isinstance(module, FusedNorm) for module in model.modules()) == 5
    torch.testing.assert_close(model(ids).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model.norm(torch.ones(1, 32)).dtype == torch.bfloat16
