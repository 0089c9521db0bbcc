"""Every `code` of an error body, and what it says. A test finds those in the code that are missing here."""

from typing import NamedTuple


class ErrorCode(NamedTuple):
    status: int
    code: str
    meaning: str


ERROR_CODES = tuple(
    ErrorCode(status, code, meaning)
    for status, of_status in (
        (
            400,
            {
                "invalid_value": "A field has a value that it cannot have, or two fields exclude each other.",
                "invalid_constraint": "What an answer has to be is malformed, unsupported, too complex or impossible.",
                "invalid_type": "A field has a value of another JSON type.",
                "missing_required_parameter": "A field is missing.",
                "unsupported_parameter": "A known field that would change the answer and is not served.",
                "unsupported_value": "A value that others serve, and this model does not.",
                "unknown_parameter": "There is no such field or query parameter; in `lora` and admin calls only.",
                "duplicate_field": "A JSON object has a key twice.",
                "invalid_json": "The body is no JSON object.",
                "invalid_http": "What the connection sends is no request; it is closed.",
                "body_too_complex": "The body has more values, strings or objects than any request needs.",
                "context_length_exceeded": "Prompt and `max_tokens` do not fit into the context.",
                "prompt_too_long": "Longer than routers that decide by layer read (`serve.max_layered_tokens`).",
                "mix_too_large": "The adapters of a request do not fit into the page pool together.",
                "too_many_logprobs": "More log-probabilities of prompts than `limits.prompt_logprobs`.",
                "no_chat_template": "The model has none; /v1/completions serves it.",
                "no_router": "`auto`, and the server has no such router. 503 from calls that need one.",
                "request_quarantined": "The engine died twice while it computed this very request.",
                "output_not_finite": "The weights asked for more than numbers can hold, found by computing.",
                "invalid_name": "A name that is not allowed, or reserved.",
                "invalid_merge": "Adapters that cannot be merged so.",
                "bad_source": "A source that is not understood, or has nothing.",
                "bad_upload": "A multipart body that breaks off, or has parts that do not belong together. Also 413.",
            },
        ),
        (401, {"invalid_api_key": "No key, or a wrong one."}),
        (
            403,
            {
                "forbidden": "A key that may not do this, or another machine's page at a server without keys.",
                "source_not_allowed": "A source that the settings do not allow.",
            },
        ),
        (
            404,
            {
                "model_not_found": "No such model, adapter or revision, or not for this tenant.",
                "adapter_not_found": "The same in admin calls.",
                "revision_not_found": "The name has no such revision.",
                "router_not_found": "No such router.",
                "tenant_not_found": "No such tenant.",
                "key_not_found": "No such key.",
                "not_found": "Something else that is not there.",
                "unknown_endpoint": "No such path; the message names what is served instead.",
            },
        ),
        (405, {"method_not_allowed": "The header `Allow` has the path's methods."}),
        (408, {"request_timeout": "The request's bytes do not come (`http.request_timeout`)."}),
        (
            409,
            {
                "adapter_exists": "The name is taken: another one, or `replace`.",
                "adapter_in_use": "Requests use the adapter, and `wait=false` was given.",
                "adapter_deleting": "The name is being deleted; `Retry-After`.",
                "router_exists": "The name is taken: another one, or `replace`.",
                "tenant_exists": "The id is taken.",
                "key_exists": "A new key has the id of another one by chance: ask again.",
                "tenant_in_use": "The tenant still has adapters.",
                "pins_exhausted": "Pinned adapters would take more than half of the page pool.",
                "conflict": "Another change came in between.",
            },
        ),
        (
            413,
            {
                "body_too_large": "More than `limits.body_bytes`.",
                "adapter_too_large": "More than `sources.max_adapter_bytes`.",
                "payload_too_large": "Another part that is too large.",
            },
        ),
        (
            415,
            {
                "unsupported_media_type": "The content type is not what the call takes.",
                "not_safetensors": "Weights in another format: a pickle is never opened.",
            },
        ),
        (
            422,
            {
                "adapter_touches_no_module": "No tensor belongs to a linear of the base model.",
                "adapter_unknown_tensor": "A tensor that belongs nowhere.",
                "adapter_shape_mismatch": "A tensor of another shape than the base model's linear.",
                "adapter_not_finite": "Infinities or NaN.",
                "adapter_unsupported": "DoRA, bias, modules_to_save and the like.",
                "adapter_wrong_base": "Made for another architecture.",
                "adapter_bad_config": "adapter_config.json says what cannot be.",
                "adapter_corrupt": "A file that is cut off, or not what it says.",
                "adapter_incomplete": "A file is missing.",
                "adapter_unsafe": "Links, paths that lead elsewhere, bombs, private addresses.",
                "source_refused": "The source does not give it.",
                "router_bad_folder": "No trained router.",
                "router_wrong_encoder": "A router that was trained on another encoder.",
                "router_wrong_adapters": "A router whose adapters are not here.",
                "unprocessable": "Something else that cannot be served.",
            },
        ),
        (
            429,
            {
                "quota_requests": "Requests a second. `Retry-After` and `x-ratelimit-*`.",
                "quota_tokens": "Tokens a minute.",
                "quota_concurrency": "Sequences at once.",
                "quota_adapters": "Adapters of the tenant.",
                "quota_bytes": "Bytes of the tenant's adapters.",
                "rate_limit_exceeded": "Another limit.",
            },
        ),
        (431, {"headers_too_large": "An address with headers of more than 64 KiB; the connection is closed."}),
        (500, {"internal_error": "A bug; the log has it under the request's id."}),
        (
            503,
            {
                "draining": "The server is shutting down.",
                "queue_full": "Too many requests wait already.",
                "deadline_too_near": "So many requests wait that the first token would come after `timeout`.",
                "too_many_connections": "More than `http.max_connections`, or than the server's descriptors allow.",
                "engine_unavailable": "The engine is being restarted.",
                "engine_error": "The engine died while it answered.",
                "adapter_unavailable": "An adapter's files cannot be read at the moment.",
                "router_unavailable": "The encoder or a router's files cannot be read at the moment.",
                "constraint_unavailable": "The engine's system has no thread or process that compiles it.",
                "encoder_unavailable": "The embedding model is being restarted.",
                "registry_unavailable": "The database cannot be reached.",
                "store_unavailable": "Adapters' files cannot be read or written at the moment.",
                "blob_missing": "An adapter's files are not in the store.",
                "blob_corrupt": "An adapter's files are not what was stored; registering it again repairs them.",
                "source_unavailable": "The source cannot be reached.",
                "uploads_busy": "More registrations at once than `limits.uploads`.",
                "busy": "Too many new keys are being checked.",
                "unavailable": "Something else that is not there at the moment.",
            },
        ),
        (504, {"deadline_exceeded": "`timeout` has passed."}),
    )
    for code, meaning in of_status.items()
)
