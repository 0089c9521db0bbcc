"""What a client may say about how a router chooses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterOptions:
    """None leaves a value to the router's own default.

    `top_k` adapters at most; a `temperature` weighs them by softmax(score / temperature) instead of evenly;
    `score_mass`, in (0, 1], takes no more of them than hold that share of the softmax; below `min_score` nothing is
    chosen. `candidates` narrows the choice to these names. `sticky` keeps a decision that was made for the same text.
    """

    top_k: int | None = None
    temperature: float | None = None
    score_mass: float | None = None
    min_score: float | None = None
    candidates: tuple[str, ...] | None = None
    sticky: bool = False
    explain: bool = False
