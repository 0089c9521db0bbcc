"""Prompts as token ids, and what is refused before any work is done for it."""

from server.ask import Ask
from server.chat import ChatTokenizer, num_characters
from server.engine.config import EngineInfo
from server.errors import BadRequest


class PromptReader:
    """Reads what one request asks for. At most `most_scores` log-probabilities of prompt tokens make an answer."""

    def __init__(self, ask: Ask, tokenizer: ChatTokenizer, info: EngineInfo, most_scores: int) -> None:
        self._ask = ask
        self._tokenizer = tokenizer
        self._info = info
        self._most_scores = most_scores

    async def read(self) -> tuple[tuple[int, ...], ...]:
        """All prompts of the request. Raises BadRequest, also for token ids beside them that do not exist."""
        self._check_token_ids()
        ask, tokenizer = self._ask, self._tokenizer
        prompts: list[tuple[int, ...]] = []
        if ask.messages is not None:
            if len(ask.messages) > self._info.max_model_len:
                raise self._too_long(f"there are {len(ask.messages)} messages")
            self._check_characters(num_characters(ask.messages, ask.tools))
            tokens = await tokenizer.encode_chat(ask.messages, tools=ask.tools, variables=ask.template_variables)
            prompts.append(tuple(tokens))
        for prompt in ask.prompts:
            if isinstance(prompt, str):
                self._check_characters(len(prompt))
                prompt = tuple(await tokenizer.encode(prompt))
            prompts.append(prompt)
        for prompt in prompts:
            self._check_prompt(prompt)
        self._check_scores(ask.n * sum(map(len, prompts)))
        return tuple(prompts)

    def _check_token_ids(self) -> None:
        params = self._ask.params
        for param, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if not all(0 <= token < self._info.vocab_size for token in tokens):
                raise BadRequest(f"{param}: expected token ids from 0 to {self._info.vocab_size - 1}", param=param)

    def _check_prompt(self, prompt: tuple[int, ...]) -> None:
        param, wanted = self._ask.prompt_param, self._ask.max_tokens
        if not prompt:
            raise BadRequest(f"{param}: expected at least one token", param=param)
        if len(prompt) + (1 if wanted is None else wanted) > self._info.max_model_len:
            asked = ", which leaves no room for an answer" if wanted is None else f" and max_tokens is {wanted}"
            raise self._too_long(f"the prompt has {len(prompt)} tokens{asked}")
        if not all(0 <= token < self._info.vocab_size for token in prompt):
            raise BadRequest(f"{param}: expected token ids from 0 to {self._info.vocab_size - 1}", param=param)

    def _check_scores(self, num_tokens: int) -> None:
        """One answer has to hold them all: they are refused before they are computed."""
        most, limit = self._ask.params.prompt_logprobs, self._most_scores
        if most is not None and num_tokens * (1 + most) > limit:
            raise BadRequest(
                f"{self._ask.prompt_param}: {num_tokens} tokens with {1 + most} log-probabilities each are more than"
                f" the {limit} of one answer",
                param=self._ask.prompt_param,
                code="too_many_logprobs",
            )

    def _check_characters(self, length: int) -> None:
        """Text that no tokenisation can make fit is not tokenised: 16 MB of it cost tens of seconds."""
        if length > self._info.max_model_len * self._tokenizer.max_token_characters:
            raise self._too_long(f"the prompt has {length} characters")

    def _too_long(self, what: str) -> BadRequest:
        param = self._ask.prompt_param
        message = f"{param}: {what}; the context is {self._info.max_model_len} tokens"
        return BadRequest(message, param=param, code="context_length_exceeded")
