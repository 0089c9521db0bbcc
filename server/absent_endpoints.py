"""Endpoints of others that are not here: what to say to clients that ask for them."""

INSTEAD = {
    "responses": "use /v1/chat/completions",
    "messages": "use /v1/chat/completions, OpenAI's form of it",
    "conversations": "use /v1/chat/completions with the messages so far",
    "assistants": "use /v1/chat/completions",
    "threads": "use /v1/chat/completions",
    "edits": "use /v1/completions",
    "engines": "use /v1/models",
    "audio": "this server reads and writes text",
    "realtime": "this server reads and writes text",
    "images": "this server reads and writes text",
    "videos": "this server reads and writes text",
    "moderations": "no model here moderates",
    "rerank": "use /v1/embeddings",
    "score": "use /v1/embeddings",
    "batches": "send the requests themselves: all of them share forward passes",
    "fine_tuning": "train with `loramux train`, register the adapter with /admin/v1/adapters",
    "files": "adapters are registered with /admin/v1/adapters",
    "uploads": "adapters are registered with /admin/v1/adapters",
    "vector_stores": "this server stores no documents",
    "evals": "this server runs no evaluations",
    "containers": "this server runs no code",
}
"""By the path's first part behind /v1."""
OF_OTHERS = {
    "generate": "use /v1/completions, with `adapter_id` beside `prompt`",
    "generate_stream": "use /v1/completions with `stream`, and `adapter_id` beside `prompt`",
    "info": "use /v1/models",
    "ping": "use /health",
    "rerank": "use /v1/embeddings",
    "score": "use /v1/embeddings",
    "classify": "no model here classifies",
    "pooling": "use /v1/embeddings",
    "invocations": "use /v1/chat/completions",
    "api": "use /v1/chat/completions",
}
"""By the path's first part: LoRAX's, vLLM's and Ollama's."""
WITHOUT_VERSION = frozenset({"chat", "completions", "embeddings", "models"})


def no_endpoint(path: str) -> str:
    """What to say of a path that no route has."""
    first, _, rest = path.strip("/").partition("/")
    message = "there is no such endpoint here; GET /docs lists all"
    if first in WITHOUT_VERSION:
        message = "there is no such endpoint here: the base URL of OpenAI's API ends with /v1"
    elif first == "v1" and rest.startswith("v1/"):
        message = "there is no such endpoint here: /v1 stands in the path twice"
    elif first == "v1" and (name := rest.partition("/")[0]) in INSTEAD:
        message = f"this server has no /v1/{name}: {INSTEAD[name]}"
    elif first in OF_OTHERS:
        message = f"this server has no /{first}: {OF_OTHERS[first]}"
    elif path.endswith("/") and path.strip("/") not in ("", "v1"):
        message = "there is no such endpoint here: the path ends with a slash"
    return message
