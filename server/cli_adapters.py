"""`loramux adapters`: the adapters of a running server."""

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli_session import (
    HERE,
    AsJson,
    Key,
    Owner,
    Url,
    call_patiently,
    examples,
    given,
    print_json,
    printer,
    reaching,
    upload,
)

if TYPE_CHECKING:
    from server.admin_client import Reply

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
Public = Annotated[
    bool | None,
    typer.Option("--public/--private", help="Whether all tenants may use it; private by default."),
]
Pinned = Annotated[bool | None, typer.Option("--pinned/--unpinned", help="Keep it on the device; unpinned by default.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A label to find it by; repeatable.")]
Description = Annotated[str | None, typer.Option("--description", help="What it is for.")]
Replace = Annotated[bool, typer.Option("--replace", help="If the name exists, give it a new revision.")]

adapters = typer.Typer(
    no_args_is_help=True,
    help="Adapters of a running server.",
    epilog=examples("loramux adapters add sql ./sql-adapter", "loramux adapters list --url http://gpu7:8000"),
)


@adapters.command(
    epilog=examples(
        "loramux adapters add sql ./sql-adapter",
        "loramux adapters add sql ./sql-adapter.zip --replace",
        "loramux adapters add sql hf://org/sql-lora@main --tenant acme --tag code --samples questions.txt",
    )
)
def add(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|SOURCE",
            help="A PEFT folder, .zip or .tar.gz to upload; hf://, s3://, https://, file:// for the server.",
        ),
    ],
    tenant: Owner = None,
    public: Public = None,
    pinned: Pinned = None,
    tags: Tags = None,
    description: Description = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Example inputs: one a line, or a list in a .json file [the folder's samples.json]."
        ),
    ] = None,
    replace: Replace = False,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Register an adapter."""
    with reaching(url, key) as client:
        from server.admin_client import files_to_upload, is_source

        fields = given(name=name, tenant=tenant, public=public, pinned=pinned, tags=tags or None)
        fields |= given(description=description, samples=_samples(samples, source), replace=replace or None)
        if is_source(source):
            body = fields | {"source": source}
            reply = call_patiently(
                lambda: client.call("POST", "adapters", body=body, patient=True), "the server fetches and checks it"
            )
        else:
            reply = upload(client, "adapters", files_to_upload(Path(source)), fields)
        _print_registered(reply, as_json)


@adapters.command("list", epilog=examples("loramux adapters list --tenant acme --tag code"))
def list_adapters(
    tenant: Owner = None,
    tag: Annotated[str | None, typer.Option(help="Only those with this tag.")] = None,
    residency: Annotated[str | None, typer.Option(metavar="device|host|disk", help="Only those there.")] = None,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List a tenant's own adapters."""
    with reaching(url, key) as client:
        found = client.pages("adapters", {"tenant": tenant, "tag": tag, "residency": residency})
    if as_json:
        print_json(found)
        return
    from server.admin_views import print_adapters

    print_adapters(printer(), found["data"], time.time())


@adapters.command(epilog=examples("loramux adapters show sql"))
def show(name: Name, tenant: Owner = None, url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """Show an adapter and its revisions."""
    with reaching(url, key) as client:
        adapter = client.get(_path(name), {"tenant": tenant})
    if as_json:
        print_json(adapter)
        return
    from server.admin_views import print_adapter

    print_adapter(printer(), adapter, time.time())


@adapters.command(epilog=examples("loramux adapters rm sql --wait"))
def rm(
    name: Name,
    wait: Annotated[
        bool | None,
        typer.Option(
            "--wait/--no-wait",
            help="Wait for its running requests; or refuse while there are any; else it goes after them.",
        ),
    ] = None,
    tenant: Owner = None,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter. New requests cannot use it from that moment on."""
    with reaching(url, key) as client:
        query = {"tenant": tenant, "wait": wait}
        reply = call_patiently(
            lambda: client.call("DELETE", _path(name), query=query, patient=bool(wait)), "running requests use it"
        )
    running = "hidden from new requests, deleted when its running ones have ended"
    _print_change(reply.body, as_json, f"{name}: {running if reply.status == 202 else 'deleted'}")


@adapters.command(epilog=examples("loramux adapters pin sql", "loramux adapters pin sql --off"))
def pin(
    name: Name,
    off: Annotated[bool, typer.Option("--off", help="No longer.")] = False,
    tenant: Owner = None,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Keep an adapter on the device."""
    with reaching(url, key) as client:
        reply = call_patiently(
            lambda: client.call("PATCH", _path(name), query={"tenant": tenant}, body={"pinned": not off}, patient=True),
            "the server loads it",
        )
    _print_change(reply.body, as_json, f"{name}: {'not pinned' if off else 'pinned'}")


@adapters.command(epilog=examples("loramux adapters show sql", "loramux adapters rollback sql 5f0c9a1b22de"))
def rollback(
    name: Name,
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="Of one of its revisions; the first digits do.")],
    tenant: Owner = None,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make the name mean another of its revisions."""
    with reaching(url, key) as client:
        reply = client.call("PATCH", _path(name), query={"tenant": tenant}, body={"digest": digest})
    _print_change(reply.body, as_json, f"{name}: now {reply.body.get('digest')}")


@adapters.command(epilog=examples("loramux adapters prefetch sql"))
def prefetch(name: Name, tenant: Owner = None, url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """Load an adapter before it is asked for."""
    with reaching(url, key) as client:
        path = f"{_path(name)}/prefetch"
        reply = call_patiently(
            lambda: client.call("POST", path, query={"tenant": tenant}, patient=True), "the server loads it"
        )
    _print_change(reply.body, as_json, f"{name}: on {reply.body.get('residency', 'its way')}")


@adapters.command(
    epilog=examples(
        "loramux adapters merge both sql=0.5 german=0.5 --method ties --density 0.5",
        "loramux adapters merge small sql=1 german=-0.2 --method svd --rank 8",
    )
)
def merge(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new adapter's name.")],
    entries: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER=WEIGHT...", help="What is merged, each with its weight."),
    ],
    method: Annotated[
        str, typer.Option(metavar="cat|linear|svd|ties|dare_linear|dare_ties|magnitude_prune", help="How.")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Of the result; svd alone takes one.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the entries that ties, dare and prune keep.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the entries that dare keeps.")] = None,
    tenant: Owner = None,
    public: Public = None,
    pinned: Pinned = None,
    tags: Tags = None,
    description: Description = None,
    replace: Replace = False,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make a new adapter of several; `cat` is their exact weighted sum."""
    with reaching(url, key) as client:
        body = given(name=name, method=method, rank=rank, density=density, seed=seed, tenant=tenant)
        body |= given(public=public, pinned=pinned, tags=tags or None, description=description, replace=replace or None)
        body["adapters"] = [_weighted(entry) for entry in entries]
        reply = call_patiently(lambda: client.call("POST", "merges", body=body, patient=True), "the server merges")
        _print_registered(reply, as_json)


def _path(name: str) -> str:
    from server.admin_client import name_in_path

    return f"adapters/{name_in_path(name)}"


def _samples(file: Path | None, source: str) -> list[str] | None:
    """What the file says, by default the one in the folder `source`. Raises UsageError."""
    from server.admin_client import SAMPLES_NAME, UsageError

    named = f"--samples {file}"
    if file is None:
        file = Path(source) / SAMPLES_NAME
        named = str(file)
        if not file.is_file():
            return None
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(f"{named}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{named}: expected UTF-8 text, JSON if it is called .json") from error
    if not isinstance(found, list) or not all(isinstance(sample, str) for sample in found):
        raise UsageError(f"{named}: expected a JSON list of strings")
    return found


def _weighted(entry: str) -> dict[str, object]:
    """`sql=0.5` as the server takes it. Raises UsageError."""
    from server.admin_client import UsageError

    name, _, number = entry.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise UsageError(f"{entry!r}: expected an adapter and its weight, such as sql=0.5")
    return {"name": name, "weight": weight}


def _print_registered(reply: "Reply", as_json: bool) -> None:
    if as_json:
        print_json(reply.body)
        return
    from server.admin_views import print_registered

    print_registered(printer(), reply.body)


def _print_change(answer: dict[str, Any], as_json: bool, line: str) -> None:
    if as_json:
        print_json(answer)
        return
    printer().line(line)
