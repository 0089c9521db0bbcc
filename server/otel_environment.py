"""What OpenTelemetry's standard variables say about traces, as far as it is not the SDK itself that reads them."""

from collections.abc import Mapping
from urllib.parse import urlsplit

TRACES_PATH = "/v1/traces"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def otlp_endpoint(environment: Mapping[str, str]) -> str | None:
    """Where spans are sent, None for nowhere: the variables for traces come before those for all signals.

    Raises ValueError for what this server cannot do.
    """
    signal, base = (environment.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT", "").strip() for name in ("TRACES_", ""))
    if not (signal or base) or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if exporter == "none":
        return None
    if exporter != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER is {exporter!r}, expected otlp or none")
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ValueError(f"the OTLP protocol is {protocol!r}: traces are sent by http/protobuf, usually to port 4318")
    # The specification takes the signal's own address as it is, and adds the path to the common one.
    return signal if signal else base.rstrip("/") + TRACES_PATH


def traces_url(endpoint: str) -> str:
    """The address to send to: one without a path gets the usual one. Raises ValueError for what is no address."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an address such as http://collector:4318")
    return endpoint.rstrip("/") + TRACES_PATH if parts.path in ("", "/") else endpoint
