"""What prompt-level routers do in a step: they read the prompts that are undecided, and weigh rows that are decided."""

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass

from server.engine.decided_rows import DecidedBuilder, DecidedRows, with_decided
from server.engine.gate_parts import Columns
from server.engine.plan import Chunk
from server.engine.prompt_reading import StepReading, step_reading
from server.model.decoder import ForwardBatch


@dataclass(frozen=True)
class PromptRouting:
    """Who reads in a step, and whose rows have factors of their own; not both are None."""

    decided: DecidedRows | None
    reading: StepReading | None

    def act(self, batch: ForwardBatch) -> None:
        """In the forward pass of this batch, beside the token-level routers that are in it."""
        batch.observer = self.reading
        batch.router = with_decided(batch.router, self.decided)


def prompt_routing(
    chunks: List[Chunk], columns: Callable[[], Columns], builder: DecidedBuilder
) -> PromptRouting | None:
    """None for a step with which prompt-level routers have nothing to do. `columns` are asked for only if they have."""
    if all(chunk.sequence.asked.prompt_router is None for chunk in chunks):
        return None
    decided, reading = builder.build(chunks, columns), step_reading(chunks, builder.device)
    return None if decided is None and reading is None else PromptRouting(decided, reading)
