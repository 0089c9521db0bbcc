"""What one front end asks all others is answered once, whoever dies meanwhile."""

from collections.abc import Mapping

from server.frontends.exchange import Exchange
from server.frontends.messages import Answers, Ask, Question


class Switchboard:
    """An exchange, and what it has sent."""

    def __init__(self) -> None:
        self.questions: dict[str, int] = {}
        self.answers: list[tuple[str, list[bytes]]] = []
        self.exchange = Exchange(self._send, self._complete)

    def _send(self, front: str, message: Question | Answers) -> None:
        if isinstance(message, Question):
            self.questions[front] = message.number
        else:
            self.answers.append((front, message.answers))

    def _complete(self, _topic: str, _front: str, answers: Mapping[str, bytes]) -> list[bytes]:
        return [answers[name] for name in sorted(answers)]


def test_all_answer() -> None:
    board = Switchboard()
    board.exchange.ask("a", Ask(1, "uses", b"?", None), ["b", "c"])
    assert board.exchange.topic(board.questions["b"]) == "uses"
    board.exchange.answer(board.questions["c"], b"2")
    assert not board.answers
    board.exchange.answer(board.questions["b"], b"1")
    assert board.answers == [("a", [b"1", b"2"])]
    board.exchange.answer(board.questions["b"], b"again")
    assert len(board.answers) == 1
    assert len(board.exchange) == 0
    assert board.exchange.topic(board.questions["b"]) is None


def test_what_somebody_said_who_is_gone_counts_no_more() -> None:
    """It leases nothing any more, and what it had counted is in the sum of those that have ended."""
    board = Switchboard()
    board.exchange.ask("a", Ask(1, "uses", b"?", None), ["b", "c"])
    board.exchange.answer(board.questions["b"], b"1")
    board.exchange.gone("b")
    assert not board.answers
    board.exchange.answer(board.questions["c"], b"2")
    assert board.answers == [("a", [b"2"])]


def test_nobody_waits_for_who_is_gone_or_asks_for_them() -> None:
    board = Switchboard()
    board.exchange.ask("a", Ask(1, "idle", b"?", None), ["b", "c"])
    board.exchange.ask("b", Ask(7, "idle", b"?", None), ["a", "c"])
    board.exchange.gone("b")
    board.exchange.answer(board.questions["c"], b"late")  # of the question of "b", which nobody waits for
    assert not [answers for front, answers in board.answers if front == "a"]
    board.exchange.gone("c")
    assert ("a", []) in board.answers
    assert len(board.exchange) == 0
