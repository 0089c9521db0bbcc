"""Requests on their way to the queue: what they need is being read from disk, or compiled."""

from server.engine.adapters import EngineAdapters
from server.engine.config import RequestError
from server.engine.gate_bank import GateBank
from server.engine.grammar import GrammarError
from server.engine.grammar_bank import GrammarBank
from server.engine.prompt_routers import PromptRouter
from server.engine.router_bank import RouterBank
from server.engine.sequence import Sequence

Arrived = tuple[Sequence, RequestError | None]
"""A sequence that may be queued, or why it cannot be."""


class Arrivals:
    """Sequences whose adapters, or then whose grammar or router, are not there yet, or wait for a slot for its gates.

    `routers`: the prompt-level ones.
    """

    def __init__(
        self,
        adapters: EngineAdapters,
        gates: GateBank | None,
        routers: RouterBank[PromptRouter] | None,
        grammars: GrammarBank | None,
    ) -> None:
        self._adapters = adapters
        self.gates = gates
        self.routers = routers
        self.grammars = grammars
        self._reading: dict[str, Sequence] = {}
        self._completing: dict[str, Sequence] = {}  # their adapters are there
        self._deciding: set[str] = set()  # requests whose prompts a router has still to read
        self._constrained: set[str] = set()

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return (*self._reading.values(), *self._completing.values())

    def add(self, sequence: Sequence) -> bool:
        """Begin to read. True: it may be queued at once; else `poll` gives it. `leave` must be called at its end.

        Raises RequestError if it can never be served.
        """
        request = sequence.request
        if request.gates is not None and self.gates is None:
            raise RequestError("this engine has no token-level routers", param="lora.router")
        constraint = request.params.constraint
        if constraint is not None and self.grammars is None:
            raise RequestError(
                "this engine cannot constrain its output", param=constraint.param, code="unsupported_parameter"
            )
        has_adapters = not request.mix.entries or self._adapters.arrive(request)
        self._enter_routers(sequence)
        self._enter_grammar(sequence)
        if has_adapters and not _waits(sequence):
            return True
        (self._completing if has_adapters else self._reading)[request.id] = sequence
        return False

    def poll(self, *, idle: bool) -> list[Arrived]:
        """Let what is being read go on. What cannot be read stays here until it leaves. `idle`: no request is there."""
        arrived: list[Arrived] = []
        for request, error in self._adapters.poll(idle=idle):
            if error is not None:
                arrived.append((self._reading[request.id], error))
            else:
                self._completing[request.id] = self._reading.pop(request.id)
        if self.grammars is not None:
            self.grammars.poll()
        for sequence in tuple(self._completing.values()):
            try:
                if self._has_grammar(sequence) and self._has_router(sequence):
                    arrived.append((self._completing.pop(sequence.request.id), None))
            except RequestError as error:
                arrived.append((sequence, error))
        return arrived

    def leave(self, sequence: Sequence) -> bool:
        """A request has ended. Whether it had not got beyond this place."""
        request = sequence.request
        gone = self._reading.pop(request.id, None) or self._completing.pop(request.id, None)
        self._adapters.leave(request)
        if request.gates is not None and self.gates is not None:
            self.gates.leave(request.gates, seated=sequence.gates is not None)
        self.forget_router(sequence)
        return gone is not None

    def forget_router(self, sequence: Sequence) -> None:
        """The router of a sequence has decided, or its request has ended."""
        use = sequence.asked.prompt_router
        if use is not None and self.routers is not None and sequence.asked.id in self._deciding:
            self._deciding.remove(sequence.asked.id)
            self.routers.leave(use)

    def forget_grammar(self, sequence: Sequence) -> None:
        """A request has ended, wherever it is."""
        constraint = sequence.request.params.constraint
        sequence.matching = None
        if constraint is not None and self.grammars is not None and sequence.request.id in self._constrained:
            self._constrained.remove(sequence.request.id)
            self.grammars.leave(constraint)

    def wait(self, seconds: float) -> None:
        """Return when `poll` may have news, at once if nothing is under way, at the latest after this time."""
        if self.grammars is not None and self.grammars.compiling:
            self.grammars.wait(seconds)
        else:
            self._adapters.wait(seconds)

    def close(self) -> None:
        """Compile nothing more."""
        if self.grammars is not None:
            self.grammars.close()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless everyone here waits for something."""
        if len(self._reading) != self._adapters.num_arriving:
            raise RuntimeError("the arriving sequences are not the requests whose adapters are being read")
        if not all(map(_waits, self._completing.values())):
            raise RuntimeError("a sequence waits for a router or a grammar though it has none")
        for bank in (self.gates, self.routers, self.grammars):
            if bank is not None:
                bank.check_integrity()

    def _enter_routers(self, sequence: Sequence) -> None:
        request, use = sequence.request, sequence.asked.prompt_router
        if request.gates is not None and self.gates is not None:
            self.gates.enter(request.gates)
        if use is not None and sequence.undecided and self.routers is not None:
            self._deciding.add(request.id)
            self.routers.enter(use)

    def _enter_grammar(self, sequence: Sequence) -> None:
        """Once for each request, which comes here again when a router has decided."""
        request, constraint = sequence.request, sequence.request.params.constraint
        if constraint is not None and self.grammars is not None and request.id not in self._constrained:
            self._constrained.add(request.id)
            self.grammars.enter(constraint)

    def _has_grammar(self, sequence: Sequence) -> bool:
        constraint = sequence.request.params.constraint
        if constraint is None or self.grammars is None or sequence.matching is not None:
            return True
        grammar = self.grammars.get(constraint)
        if grammar is not None:
            try:
                sequence.matching = grammar.start()
            except GrammarError as error:
                message = f"{constraint.param}: {error}"
                raise RequestError(message, param=constraint.param, code="invalid_constraint") from error
        return grammar is not None

    def _has_router(self, sequence: Sequence) -> bool:
        use, prompt_use = sequence.request.gates, sequence.asked.prompt_router
        if use is not None and self.gates is not None:
            gates = self.gates.get(use.digest)
            if gates is not None and gates.num_rows != len(use.allowed):
                raise _unfit(f"the router's gates have {gates.num_rows} rows, expected {len(use.allowed)}")
            slot = None if gates is None else self.gates.take_slot(use.digest)
            if slot is None:
                return False
            sequence.gates, sequence.gate_slot = gates, slot
            return True
        if prompt_use is not None and sequence.undecided and self.routers is not None:
            router = self.routers.get(prompt_use.digest)
            if router is not None and (router.num_rows, router.layered) != (len(prompt_use.rows), prompt_use.layered):
                raise _unfit(f"the router has {router.num_rows} adapters, expected {len(prompt_use.rows)}")
            sequence.router = router
            return router is not None
        return True


def _waits(sequence: Sequence) -> bool:
    """Whether it needs more than adapters."""
    has_grammar = sequence.request.params.constraint is None or sequence.matching is not None
    return sequence.request.gates is not None or sequence.undecided or not has_grammar


def _unfit(message: str) -> RequestError:
    return RequestError(message, param="lora.router", code="router_unavailable")
