"""What a request must be for an engine to take it."""

from adapters_store.types import Mix
from server.engine.config import RequestError
from server.engine.sequence import Request


def check_tokens(request: Request, vocabulary: int, longest: int) -> None:
    """Raises RequestError unless all token ids are below `vocabulary`, and prompt and answer fit into `longest`."""
    if not request.prompt:
        raise RequestError("the prompt is empty, expected at least one token", param="prompt")
    if not all(0 <= token < vocabulary for token in request.prompt):
        raise RequestError(f"the prompt has token ids outside 0..{vocabulary - 1}", param="prompt")
    for param, ids in (
        ("logit_bias", request.params.logit_bias),
        ("stop_token_ids", request.params.stop_token_ids),
    ):
        if not all(0 <= token < vocabulary for token in ids):
            raise RequestError(f"{param} has token ids outside 0..{vocabulary - 1}", param=param)
    if request.params.max_tokens < 0:
        raise RequestError(f"max_tokens is {request.params.max_tokens}, expected at least 0", param="max_tokens")
    if len(request.prompt) + request.params.max_tokens > longest:
        raise RequestError(
            f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.params.max_tokens}, together"
            f" more than the context of {longest} tokens",
            param="prompt",
            code="context_length_exceeded",
        )


def check_prompt_router(request: Request, has_routers: bool, most_layered: int) -> None:
    """Raise RequestError for a prompt-level router that this engine cannot serve as the request wants it.

    most_layered: tokens of a prompt that is decided layer by layer.
    """
    use = request.prompt_router
    if use is None:
        return
    if not has_routers:
        raise RequestError("this engine has no prompt-level routers", param="lora.router")
    if request.gates is not None:
        raise RequestError("a request has one router", param="lora.router")
    rows = {row for row in use.rows if row is not None}
    if use.top_k < 1 or not rows or request.mix != Mix(tuple((row, 1.0) for row in sorted(rows))):
        raise RequestError("expected a mix of the router's adapters, each with weight 1", param="lora.adapters")
    if use.layered and len(request.prompt) > most_layered:
        raise RequestError(
            f"the prompt has {len(request.prompt)} tokens, but a router that decides layer by layer reads at most"
            f" {most_layered}",
            param="prompt",
            code="prompt_too_long",
        )
