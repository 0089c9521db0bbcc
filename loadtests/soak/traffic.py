"""Clients that ask one request after the other, and look at how each ends."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from loadtests.events import data_of
from loadtests.soak.adapter_faults import PRIVATE
from loadtests.soak.answers import PROMPTS, Answers, greedy
from loadtests.soak.key_faults import Keys, bearer
from loadtests.soak.refusal import code_of
from loadtests.soak.seen import Seen
from loadtests.soak.told import Told

Json = dict[str, Any]

REFUSED_SECONDS = (0.1, 1.0)
"""Until a client asks again that was refused: five times a second, that was half of what a busy machine served."""
FAILED_SECONDS = 1.0
"""Until a client whose request failed as none should asks again: a server that is gone fails thousands a second."""


@dataclass(frozen=True)
class Manners:
    """How a tenant's clients behave. `billed`: they read to the end, and their tokens are compared with the ledger."""

    billed: bool = False
    leaves: bool = False
    is_slow: bool = False
    limited: bool = False
    sees_private: bool = False


@dataclass(frozen=True)
class World:
    """What all clients know. `fixed` are names of adapters that nobody changes."""

    model: str
    fixed: Sequence[str]
    told: Told
    answers: Answers
    seen: Seen


@dataclass
class Expected:
    """What is known of an answer before it comes: the prompt, the name asked for, and how often it had been changed."""

    prompt: str
    name: str
    touched: int


class Client:
    """Asks until `stop` is set, with the tenant's current key; `pause` seconds after one that failed as none should."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        keys: Keys,
        manners: Manners,
        world: World,
        seed: int | str,
        pause: float = FAILED_SECONDS,
    ) -> None:
        self._http = http
        self._keys = keys
        self._manners = manners
        self._world = world
        self._seen = world.seen
        self._rng = random.Random(seed)
        self._pause = pause

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._seen.requests += 1
            with self._seen.telling("a request"):
                await self._ask()
                continue
            await asyncio.sleep(self._pause)

    async def _ask(self) -> None:
        if self._rng.random() < 0.5:
            expected = self._expected()
            await self._stream(greedy(expected.name, expected.prompt), expected)
        else:
            await self._stream(self._mixture(), None)

    def _expected(self) -> Expected:
        names = [self._world.model, *self._world.fixed]
        changing = self._world.told.certain()
        names += [name for name in changing if self._manners.sees_private or not name.startswith(PRIVATE)]
        name = self._rng.choice(names)
        return Expected(self._rng.choice(PROMPTS), name, self._world.told.touched[name])

    def _mixture(self) -> Json:
        rng = self._rng
        names = rng.sample(self._world.fixed, rng.choice((0, 1, 2, 3)))
        body: Json = {"model": self._world.model, "max_tokens": rng.randint(1, 24), "ignore_eos": True}
        body["prompt"] = [rng.randint(100, 400) for _ in range(rng.choice((3, 12, 60, 200)))]
        if names:
            body["lora"] = {"adapters": [{"name": name, "weight": rng.uniform(0.1, 1.0)} for name in names]}
        return body

    async def _stream(self, body: Json, expected: Expected | None) -> None:
        manners, rng, key = self._manners, self._rng, self._keys.current
        leaves = rng.randint(0, 12) if manners.leaves and rng.random() < 0.5 else None
        slow = 0.2 if manners.is_slow and rng.random() < 0.2 else 0.0
        body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        async with self._http.stream("POST", "/v1/completions", json=body, headers=bearer(key)) as answer:
            if answer.is_success:
                await self._read(answer, expected, leaves, slow)
                return
            await answer.aread()
        self._refused(answer, expected, key)
        await asyncio.sleep(self._rng.uniform(*REFUSED_SECONDS))

    async def _read(self, answer: httpx.Response, expected: Expected | None, leaves: int | None, slow: float) -> None:
        text, events, done = "", [], False
        try:
            async for data in data_of(answer):
                if data == "[DONE]":
                    done = True
                    continue
                with self._seen.telling(f"an event of a stream, {data[:300]!r},"):
                    events.append(json.loads(data))
                    text += "".join(choice["text"] for choice in events[-1].get("choices", ()))
                if leaves is not None and len(events) > leaves:
                    self._seen.endings["left"] += 1
                    return
                await asyncio.sleep(slow)
        finally:
            self._bill(events)
        self._ended(events, done, expected)
        if expected is not None:
            self._compare(answer, text, expected)

    def _bill(self, events: Sequence[Json]) -> None:
        """What the last event says was used, also of a stream that broke."""
        usage: Json = next((event["usage"] for event in reversed(events) if event.get("usage")), {})
        if self._manners.billed and usage.get("completion_tokens"):
            self._seen.tokens += usage["completion_tokens"]
            self._seen.prompt_tokens += usage["prompt_tokens"]

    def _ended(self, events: Sequence[Json], done: bool, expected: Expected | None) -> None:
        """One ending."""
        finishes = sum(bool(choice.get("finish_reason")) for event in events for choice in event.get("choices", ()))
        errors = [event["error"] for event in events if "error" in event]
        self._seen.endings["finished" if finishes else "error event"] += 1
        if finishes + len(errors) != 1 or (finishes and not done):
            self._seen.breaks(f"a stream had {finishes} finish reasons, {len(errors)} errors, [DONE]: {done}")
        for error in errors:
            # By design what was in flight at two crashes is not tried again; it may learn so late.
            is_quarantined = expected is not None and error.get("code") == "request_quarantined"
            if error.get("type") != "server_error" and not is_quarantined:
                self._seen.breaks(f"a stream ended with {error}")

    def _compare(self, answer: httpx.Response, text: str, expected: Expected) -> None:
        """The adapter that was meant has answered, as it does without faults."""
        route = json.loads(answer.headers.get("x-loramux-route", "null"))
        if route is None:
            return
        key = route["adapters"][0]["digest"] if route["adapters"] else self._world.model
        told = self._world.told
        if told.touched[expected.name] == expected.touched and key not in told.possible.get(expected.name, {key}):
            self._seen.breaks(f"{expected.name} was answered by {key[:12]}, which it does not mean")
        self._seen.compared += 1
        if not self._world.answers.agrees(key, expected.prompt, text):
            self._seen.breaks(f"{expected.name} ({key[:12]}) said {text!r} to {expected.prompt!r}")

    def _refused(self, answer: httpx.Response, expected: Expected | None, key: str) -> None:
        code = code_of(answer)
        self._seen.endings[f"{answer.status_code} {code}"] += 1
        says_when = "retry-after" in answer.headers
        touched = self._world.told.touched
        fine: dict[tuple[int, str], Callable[[], bool]] = {
            (401, "invalid_api_key"): lambda: key in self._keys.revoked,
            (404, "model_not_found"): lambda: expected is not None and touched[expected.name] != expected.touched,
            (400, "request_quarantined"): lambda: expected is not None,
        }
        if answer.status_code == 503 or (answer.status_code == 429 and self._manners.limited):
            is_fine = says_when
        else:
            is_fine = fine.get((answer.status_code, code), lambda: False)()
        if not is_fine:
            self._seen.breaks(f"refused with {answer.status_code}: {answer.text[:200]}")


class Stranger:
    """A tenant that looks for what is another's, and must find nothing."""

    def __init__(self, http: httpx.AsyncClient, told: Told, seen: Seen) -> None:
        self._http = http
        self._told = told
        self._seen = seen

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with self._seen.telling("a stranger's look"):
                await self._look()
            await asyncio.sleep(0.5)

    async def _look(self) -> None:
        for path in ("/v1/models", "/admin/v1/adapters"):
            answer = await self._http.get(path)
            if f'"{PRIVATE}' in answer.text:
                self._seen.breaks(f"{path} shows another tenant's adapter: {answer.text[:300]}")
        for name in list(self._told.certain(PRIVATE))[:1]:
            asked = greedy(name, PROMPTS[0]) | {"max_tokens": 1}
            for answer in (
                await self._http.post("/v1/completions", json=asked),
                await self._http.get(f"/admin/v1/adapters/{name}"),
            ):
                self._seen.endings[f"stranger {answer.status_code}"] += 1
                if answer.status_code not in (404, 503):
                    self._seen.breaks(f"another tenant's {name} answers {answer.status_code}: {answer.text[:200]}")
