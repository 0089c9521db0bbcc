"""The same answers from `transformers` and `peft`, one request at a time, to check the server's texts against."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from deploy.demo.requests import MAX_TOKENS, DemoRequest

TIE_NATS = 1e-3
"""Two tokens whose log-probabilities differ by less are a tie: rounding decides between them."""


class Reference:
    """SmolLM2 with the demo's adapters in peft, greedy, float32."""

    def __init__(self, model: Path, adapters: Path, names: Sequence[str]) -> None:
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        first, *others = names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses what transformers is about to rename
            self.model = PeftModel.from_pretrained(base, str(adapters / first), adapter_name=first)
            for name in others:
                self.model.load_adapter(str(adapters / name), adapter_name=name)

    @torch.inference_mode()
    def disagreement(self, request: DemoRequest, answer: str) -> str | None:
        """None if `answer` is the greedy answer up to ties, else what the reference says instead."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": request.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        length = prompt["input_ids"].shape[1]
        self._activate(request)
        try:
            if self._is_greedy(prompt["input_ids"], answer):
                return None
            output = self.model.generate(
                **prompt,
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        finally:
            self.model.base_model.enable_adapter_layers()
        tokens = output.sequences[0, length:].tolist()
        expected = self._decode(tokens)
        if answer == expected:
            return None
        agreed = next((i for i in range(len(tokens)) if not answer.startswith(self._decode(tokens[: i + 1]))), -1)
        best, second = torch.log_softmax(output.logits[agreed][0], dim=-1).topk(2).values.tolist()
        return None if best - second < TIE_NATS else expected

    def _is_greedy(self, prompt: torch.Tensor, answer: str) -> bool:
        """Whether the answer's tokens and the end are each the most likely one: one forward pass instead of many.

        False proves nothing, as the same text may have been written in other tokens.
        """
        tokens: list[int] = self.tokenizer(answer, add_special_tokens=False).input_ids
        if len(tokens) > MAX_TOKENS or self._decode(tokens) != answer:
            return False
        tokens = [*tokens, self.tokenizer.eos_token_id][:MAX_TOKENS]
        logits = self.model(input_ids=torch.cat((prompt, torch.tensor([tokens])), dim=1)).logits
        best: list[int] = logits[0, prompt.shape[1] - 1 : -1].argmax(dim=-1).tolist()
        return best == tokens

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _activate(self, request: DemoRequest) -> None:
        """One adapter as it is; a mixture as peft's concatenation, which equals the weighted sum of products."""
        if not request.adapters:
            self.model.base_model.disable_adapter_layers()
            return
        names, weights = (list(column) for column in zip(*request.adapters, strict=True))
        if len(names) > 1:
            mixture = "mixture_of_" + "_".join(names)
            self.model.add_weighted_adapter(names, weights, mixture, combination_type="cat")
            names = [mixture]
        self.model.set_adapter(names[0])
