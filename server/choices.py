"""The choices of a request: what the engine is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapters_store.types import BASE
from routing.router import Route
from server.ask import Ask
from server.cache_key import cache_key
from server.choice import Choice, ChoiceServices
from server.engine.config import EngineInfo
from server.engine.sequence import Request
from server.stops import StopStrings

SEEDS = 1 << 63


@dataclass(frozen=True)
class Order:
    """A request of which all is known that the engine needs. `paths`: folders of the route's adapters by digest.

    `arrival` is when it came, by the services' clock; a seed is below 2**63.
    """

    id: str
    ask: Ask
    route: Route
    paths: Mapping[str, str]
    prompts: Sequence[tuple[int, ...]]
    arrival: float
    seed: int
    log: Mapping[str, str]

    def choices(self, services: ChoiceServices, info: EngineInfo) -> tuple[Choice, ...]:
        """`n` choices a prompt, numbered through. A prompt of several blocks is computed by its first choice alone."""
        ask, route = self.ask, self.route
        known = route.mix if route.prompt_router is None else BASE  # the engine adds what is decided there
        key = cache_key(info.model_fingerprint, known, ask.tenant.salt)
        shown = services.tokenizer.tool_form.markers if ask.tools is not None else frozenset()
        choices: list[Choice] = []
        for prompt in self.prompts:
            leader: Choice | None = None
            length = info.max_model_len - len(prompt) if ask.max_tokens is None else ask.max_tokens
            for number in range(ask.n):
                scored = ask.params.prompt_logprobs if leader is None else None
                seed = (self.seed + number) % SEEDS
                request = Request(
                    id=f"{self.id}-{len(choices)}",
                    prompt=prompt,
                    params=replace(ask.params, max_tokens=length, seed=seed, prompt_logprobs=scored),
                    mix=route.mix,
                    paths=self.paths,
                    cache_key=key,
                    tenant=ask.tenant.id,
                    weight=ask.tenant.weight,
                    gates=route.gates,
                    prompt_router=route.prompt_router,
                    timeout=ask.timeout,
                    priority=ask.priority,
                    log=self.log,
                )
                stops = StopStrings(ask.stop)
                waits = leader is not None and (len(prompt) > info.block_size or ask.params.prompt_logprobs is not None)
                choice = Choice(
                    len(choices),
                    request,
                    route,
                    stops,
                    services,
                    self.arrival,
                    leader,
                    waits,
                    ask.query.options.explain,
                    shown,
                )
                leader = leader or choice
                choices.append(choice)
        return tuple(choices)
