"""How a server says no."""

import httpx


def code_of(answer: httpx.Response) -> str:
    """The code in the body of an error. Raises ValueError for any other body."""
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{answer.status_code} without an error's body: {answer.text[:300]!r}") from None
