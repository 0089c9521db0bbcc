"""The demo's requests: what is asked, with which adapters, and what is known of the answer."""

from dataclasses import dataclass, replace

from deploy.demo.tasks import generate

MAX_TOKENS = 48
GATES, MOA, MILORA = "gates", "moa", "milora"
ROUTERS = (GATES, MOA, MILORA)
"""Names, and folders, of the demo's routers inside the model: one decides token by token, one for a prompt, and one for
each layer of a prompt."""


@dataclass(frozen=True)
class DemoRequest:
    """One user message for a weighted set of adapters. `target` is the right answer, where one is known.

    With `auto` the client names none of them: the server is to choose them from the message. So does a `router`;
    `adapters` are then those that it chose, in any layer, or that lead any token of the answer if it decides token by
    token.
    """

    prompt: str
    adapters: tuple[tuple[str, float], ...] = ()
    target: str | None = None
    auto: bool = False
    router: str | None = None

    @property
    def fixed(self) -> bool:
        """Whether the same adapters answer all of it, in all layers, as peft could do, too."""
        return self.router in (None, MOA)

    @property
    def label(self) -> str:
        if self.router is not None:
            return f"auto:{self.router} -> {', '.join(name for name, _ in self.adapters)}"
        if not self.adapters:
            return "(base model)"
        if len(self.adapters) == 1:
            return f"auto -> {self.adapters[0][0]}" if self.auto else self.adapters[0][0]
        return "\n".join(f"{weight:+.2f} {name}" for name, weight in self.adapters)


def held_out(task: str, row: int = 0, *, auto: bool = False) -> DemoRequest:
    """A test row of a demo task, which its adapter has not seen in training."""
    example = generate(task).test[row]
    return DemoRequest(f"{example.instruction}\n{example.input}", ((task, 1.0),), example.target, auto)


def demo_requests() -> list[DemoRequest]:
    """Base model, five single adapters, mixtures of two and of three, three that the server is to choose for, two that
    a router decides token by token (one task, and two in one message), one that is decided for all layers, and one
    layer by layer.
    """
    two = "Say it like a pirate.\nHello my friend, write to emma.stone@harbor.com or call +44 71 5523 881."
    both = DemoRequest(
        two,
        (("pirate", 1.0), ("redact", 1.0)),
        "Arr! ahoy me matey, write to [EMAIL] or call [PHONE].",
        router=GATES,
    )
    three = held_out("json_fields", 1).prompt
    return [
        DemoRequest("What is the capital of France?"),
        held_out("spell"),
        held_out("json_fields"),
        held_out("pirate"),
        held_out("iso_date"),
        held_out("number_words"),
        DemoRequest(two, (("pirate", 0.7), ("redact", 0.5))),
        DemoRequest(three, (("json_fields", 0.8), ("spell", 0.4), ("sort_numbers", -0.2))),
        held_out("sort_numbers", 2, auto=True),
        held_out("iso_date", 2, auto=True),
        held_out("spell", 2, auto=True),
        replace(held_out("number_words", 2), router=GATES),
        both,
        replace(held_out("json_fields", 2), router=MOA),
        replace(held_out("number_words", 3), router=MILORA),
    ]
