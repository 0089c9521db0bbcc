"""What the registry refuses or cannot do, each with the HTTP status that fits."""


class RegistryError(Exception):
    """What the registry refuses or cannot do, in one sentence; `status` is the HTTP status that fits `code`."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status


class InvalidValue(RegistryError):
    """A field that cannot be stored."""

    def __init__(self, message: str, code: str = "invalid_value") -> None:
        super().__init__(code, message, 400)


class NotFound(RegistryError):
    """No adapter, revision, tenant, key or router (`kind`) of this name that the tenant may see."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind}_not_found", f"{kind} {name!r} does not exist", 404)
        self.name = name


class NameTaken(RegistryError):
    """A name that is in use already."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}_exists", message, 409)


class BeingDeleted(RegistryError):
    """A name that is free again when the last request that uses it has ended."""

    def __init__(self, name: str) -> None:
        message = f"adapter {name!r} is being deleted, and requests still use it: try again when they have ended"
        super().__init__("adapter_deleting", message, 409)


class OtherBaseModel(RegistryError):
    """A registry whose adapters belong to another base model."""

    def __init__(self) -> None:
        message = "the registry belongs to another base model: expected another --database-url or --data-dir"
        super().__init__("registry_other_model", message, 409)


class NotPermitted(RegistryError):
    """A change that only the administrator may make."""

    def __init__(self, name: str) -> None:
        super().__init__("forbidden", f"adapter {name!r} is public: only the admin key may change what others use", 403)


class QuotaExceeded(RegistryError):
    """A registration beyond the tenant's quota; `code` is `quota_adapters` or `quota_bytes`."""

    def __init__(self, quota: str, limit: int) -> None:
        super().__init__(f"quota_{quota}", f"the quota of {limit} {quota} is used up: delete some first", 429)


class RegistryUnavailable(RegistryError):
    """The database cannot be reached, is full or refuses writes."""

    def __init__(self, reason: str) -> None:
        super().__init__("registry_unavailable", f"the registry is unavailable: {reason}", 503)
        self.reason = reason
