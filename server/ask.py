"""What a client asks for, out of HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from routing.router import RouteQuery
from server.chat import ChatTokenizer
from server.engine.sequence import SamplingParams
from server.journal import Asked, Operation
from server.query_text import QueryScope, of_messages, of_prompts
from server.tenants import Tenant
from server.tools.definition import ToolUse
from server.tools.forced import answer_or_calls, forced_calls
from server.tools.form import ToolForm
from server.tools.instructions import Message
from server.tools.template import Variables


@dataclass(frozen=True)
class Ask:
    """One request to generate. Either `messages` or `prompts` (text or token ids) is given.

    `params` has everything but the seed and the length: `seed` None draws one, choice i of a prompt samples with
    seed + i; `max_tokens` None is the rest of the context. `timeout`: seconds that the client gives it. The smaller
    its `priority`, the earlier it starts among those of its tenant that wait. `tools` None: none may be called.
    `template_variables` are of the chat template.
    """

    tenant: Tenant
    query: RouteQuery
    params: SamplingParams
    scope: QueryScope = QueryScope.LAST_TURN
    messages: tuple[Message, ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    timeout: float | None = None
    priority: int = 0
    tools: ToolUse | None = None
    template_variables: Variables | None = None

    def of_form(self, form: ToolForm, tokens: Mapping[str, int]) -> "Ask":
        """The same for a model that writes calls in this form: its constraint takes the calls that it must or may make.

        `tokens` are the ids of the form's markers that are special tokens. A forced call is no answer, so what was said
        of the answer does not count.
        """
        if self.tools is None:
            return self
        constraint = self.params.constraint
        if self.tools.is_forced:
            constraint = forced_calls(self.tools, form, tokens)
        elif constraint is not None:
            constraint = answer_or_calls(constraint, self.tools, form, tokens)
        return replace(self, params=replace(self.params, constraint=constraint))

    @property
    def sequences(self) -> int:
        """How many the engine gets."""
        return self.n * (1 if self.messages is not None else len(self.prompts))

    @property
    def prompt_param(self) -> str:
        """What the request calls its prompts."""
        if self.params.pooled:
            return "input"
        return "prompt" if self.messages is None else "messages"

    def noted(self, request_id: str, arrival: float) -> Asked:
        """What is written down of it."""
        words: Operation = "text_completion" if self.messages is None else "chat"
        return Asked(
            id=request_id,
            arrival=arrival,
            operation="embeddings" if self.params.pooled else words,
            model=self.query.model,
            choices=self.n,
            max_tokens=self.max_tokens,
            temperature=self.params.temperature,
            top_p=self.params.top_p,
            top_k=self.params.top_k,
            seed=self.seed,
            frequency_penalty=self.params.frequency_penalty,
            presence_penalty=self.params.presence_penalty,
            priority=self.priority,
        )

    async def query_text(self, tokenizer: ChatTokenizer) -> str:
        """What a router chooses from. Raises BadRequest for several prompts."""
        if self.messages is not None:
            return of_messages(self.messages, self.scope, sticky=self.query.options.sticky)
        return await of_prompts(self.prompts, tokenizer)
