"""What registrations may read, from the settings."""

from adapters_store.source_policy import SourcePolicy
from server.catalog.records import Policies
from server.config import Settings


def policies(settings: Settings) -> Policies:
    """The administrator's as set, the tenants' without the server's own rights."""
    sources = settings.sources
    return Policies.of(
        SourcePolicy(
            file_roots=tuple(root.expanduser().absolute() for root in settings.serve.adapter_root),
            https_hosts=frozenset(host.lower() for host in sources.https_hosts),
            s3_buckets=frozenset(sources.s3_buckets),
            s3_endpoint=sources.s3_endpoint,
            s3_region=sources.s3_region,
            hub_endpoint=sources.hub_endpoint or None,
            hub_token=sources.hub_token.get_secret_value() if sources.hub_token is not None else None,
            max_bytes=sources.max_adapter_bytes,
            timeout=sources.timeout,
        )
    )
