"""The outputs of requests that end without a token."""

from server.engine.config import RequestError
from server.engine.sequence import NOT_FINITE, FinishReason, Output, Timings


def ended(request_id: str, reason: FinishReason, timings: Timings | None = None) -> Output:
    """Somebody or something ended it."""
    return Output(request_id, finish_reason=reason, timings=timings)


def not_finite(request_id: str) -> Output:
    """Its logits overflowed."""
    return Output(request_id, finish_reason=FinishReason.ERROR, error=NOT_FINITE)


def failed(request_id: str, error: RequestError) -> Output:
    """It cannot be served after all."""
    return Output(
        request_id,
        finish_reason=FinishReason.ERROR,
        error=str(error),
        error_param=error.param,
        error_code=error.code,
    )
