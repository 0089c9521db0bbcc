"""The commands about a running server: `adapters`, `routers`, `explain`, `tenants`, `keys`, `usage`, `state`."""

import math
import time
from typing import Annotated

import typer

from server import cli_routers
from server.cli_adapters import adapters
from server.cli_session import HERE, AsJson, Key, Url, examples, fail, given, print_json, printer, reaching

Id = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's id.")]


def _limit(text: str) -> float:
    """A number above 0; infinity from `unlimited`."""
    if text == "unlimited":
        return math.inf
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise typer.BadParameter(f"{text!r}: expected a number or unlimited")
    return number


def _bytes(text: str) -> float:
    """Bytes from a size such as `20GiB`; infinity from `unlimited`."""
    from server.config import parse_size

    if text == "unlimited":
        return math.inf
    try:
        size = parse_size(text)
    except ValueError:
        size = None
    if not isinstance(size, int):
        raise typer.BadParameter(f"{text!r}: expected a size such as 20GiB, or unlimited")
    return float(size)


def _share(text: str) -> float:
    """A tenant's weight."""
    from server.accounts import LARGEST_SHARE, LEAST_SHARE

    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not LEAST_SHARE <= number <= LARGEST_SHARE:
        fail(f"--weight {text}: expected a number from {LEAST_SHARE} to {LARGEST_SHARE:g}", code=2)
    return number


Weight = Annotated[
    float | None, typer.Option(parser=_share, metavar="N", help="Share of the engine beside other busy tenants [1].")
]
RequestRate = Annotated[float | None, typer.Option(parser=_limit, metavar="N|unlimited", help="Of all endpoints.")]
TokenRate = Annotated[float | None, typer.Option(parser=_limit, metavar="N|unlimited", help="Prompt and output.")]
Concurrency = Annotated[float | None, typer.Option(parser=_limit, metavar="N|unlimited", help="Sequences at a time.")]
Adapters = Annotated[float | None, typer.Option(parser=_limit, metavar="N|unlimited", help="Names of its own.")]
Bytes = Annotated[float | None, typer.Option(parser=_bytes, metavar="SIZE|unlimited", help="Of its adapters.")]
Router = Annotated[str | None, typer.Option(help="What `model: auto` means for it.")]

app = typer.Typer()
tenants = typer.Typer(
    no_args_is_help=True,
    help="Tenants of a running server, with the admin key.",
    epilog=examples("loramux tenants add acme --requests-per-second 50", "loramux tenants list"),
)
keys = typer.Typer(
    no_args_is_help=True,
    help="Tenants' keys, with the admin key.",
    epilog=examples("loramux keys add acme --label ci", "loramux keys list acme"),
)
app.add_typer(adapters, name="adapters")
app.add_typer(cli_routers.app)
app.add_typer(tenants, name="tenants")
app.add_typer(keys, name="keys")


@tenants.command(
    "add", epilog=examples("loramux tenants add acme --weight 2 --tokens-per-minute 100000 --max-bytes 20GiB")
)
def add_tenant(
    tenant: Id,
    weight: Weight = None,
    requests_per_second: RequestRate = None,
    tokens_per_minute: TokenRate = None,
    concurrency: Concurrency = None,
    max_adapters: Adapters = None,
    max_bytes: Bytes = None,
    default_router: Router = None,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Create a tenant; a quota that is not given is unlimited."""
    quotas = _quotas(requests_per_second, tokens_per_minute, concurrency, max_adapters, max_bytes)
    with reaching(url, key) as client:
        body = given(id=tenant, weight=weight, quotas=quotas or None, default_router=default_router)
        row = client.call("POST", "tenants", body=body).body
    _print_tenant(row, as_json)


@tenants.command("list", epilog=examples("loramux tenants list --json"))
def list_tenants(url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """List tenants."""
    with reaching(url, key) as client:
        found = client.pages("tenants", {})
    if as_json:
        print_json(found)
        return
    from server.admin_views import print_tenants

    print_tenants(printer(), found["data"], time.time())


@tenants.command("show", epilog=examples("loramux tenants show acme"))
def show_tenant(tenant: Id, url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """Show a tenant's weight and quotas."""
    with reaching(url, key) as client:
        row = client.get(_path(tenant))
    _print_tenant(row, as_json)


@tenants.command("set", epilog=examples("loramux tenants set acme --weight 3 --concurrency unlimited"))
def set_tenant(
    tenant: Id,
    weight: Weight = None,
    requests_per_second: RequestRate = None,
    tokens_per_minute: TokenRate = None,
    concurrency: Concurrency = None,
    max_adapters: Adapters = None,
    max_bytes: Bytes = None,
    default_router: Router = None,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Change a tenant's weight and quotas; what is not given stays."""
    quotas = _quotas(requests_per_second, tokens_per_minute, concurrency, max_adapters, max_bytes)
    with reaching(url, key) as client:
        from server.admin_client import UsageError

        body = given(weight=weight, quotas=quotas or None, default_router=default_router)
        if not body:
            raise UsageError("nothing to change: expected an option such as --weight 2")
        row = client.call("PATCH", _path(tenant), body=body).body
    _print_tenant(row, as_json)


@tenants.command("rm", epilog=examples("loramux tenants rm acme"))
def remove_tenant(tenant: Id, url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """Delete a tenant that has no adapters, and its keys."""
    with reaching(url, key) as client:
        answer = client.call("DELETE", _path(tenant)).body
    if as_json:
        print_json(answer)
        return
    printer().line(f"{tenant}: deleted")


@keys.command("add", epilog=examples("loramux keys add acme --label ci"))
def add_key(
    tenant: Id,
    label: Annotated[str | None, typer.Option(help="To tell keys apart.")] = None,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make a key for a tenant. It is shown this once."""
    with reaching(url, key) as client:
        answer = client.call("POST", f"{_path(tenant)}/keys", body=given(label=label)).body
    if as_json:
        print_json(answer)
        return
    # The key alone on standard output, so that it can be piped to where it is kept.
    typer.echo(answer["key"])
    typer.echo(
        f"Keep it: it is not shown again. {tenant} sends it as `Authorization: Bearer ...`;"
        f" `loramux keys revoke {tenant} {answer['id']}` ends it.",
        err=True,
    )


@keys.command("list", epilog=examples("loramux keys list acme"))
def list_keys(tenant: Id, url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """List a tenant's keys, revoked ones too, without their secrets."""
    with reaching(url, key) as client:
        found = client.get(f"{_path(tenant)}/keys")
    if as_json:
        print_json(found)
        return
    from server.admin_views import print_keys

    print_keys(printer(), found["data"], time.time())


@keys.command("revoke", epilog=examples("loramux keys revoke acme 5f0c2ab9d1e4"))
def revoke_key(
    tenant: Id,
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="The key's id.")],
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """End a key; requests with it are refused within a second."""
    with reaching(url, key) as client:
        from server.admin_client import name_in_path

        answer = client.call("DELETE", f"{_path(tenant)}/keys/{name_in_path(key_id)}").body
    if as_json:
        print_json(answer)
        return
    printer().line(f"{key_id}: revoked")


@app.command(epilog=examples("loramux usage --since 2026-01-01 --tenant acme"))
def usage(
    tenant: Annotated[str | None, typer.Option(help="Whose, with the admin key; all by default.")] = None,
    since: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="First day, in UTC.")] = None,
    until: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="Last day, in UTC.")] = None,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Requests and tokens by day, tenant and adapters."""
    with reaching(url, key) as client:
        found = client.pages("usage", {"tenant": tenant, "since": since, "until": until})
    if as_json:
        print_json(found)
        return
    from server.admin_views import print_usage

    print_usage(printer(), found["data"])


@app.command(epilog=examples("loramux state", "watch loramux state"))
def state(url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """What a running server is doing, with the admin key."""
    with reaching(url, key) as client:
        found = client.get("state")
    if as_json:
        print_json(found)
        return
    from server.admin_views import print_state

    print_state(printer(), found)


def _path(tenant: str) -> str:
    from server.admin_client import name_in_path

    return f"tenants/{name_in_path(tenant)}"


def _quotas(
    requests_per_second: float | None,
    tokens_per_minute: float | None,
    concurrency: float | None,
    max_adapters: float | None,
    max_bytes: float | None,
) -> dict[str, object]:
    """The quotas that were given, None for an unlimited one. Whole numbers are integers, as the server wants them."""
    limits = {
        "requests_per_second": requests_per_second,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
        "adapters": max_adapters,
        "bytes": max_bytes,
    }
    return {
        name: None if limit == math.inf else int(limit) if limit.is_integer() else limit
        for name, limit in limits.items()
        if limit is not None
    }


def _print_tenant(row: dict[str, object], as_json: bool) -> None:
    if as_json:
        print_json(row)
        return
    from server.admin_views import print_tenant

    print_tenant(printer(), row, time.time())
