"""`loramux routers` and `loramux explain`: who chooses adapters from the prompt, and what would be chosen."""

import time
from pathlib import Path
from typing import Annotated

import typer

from server.cli_session import (
    HERE,
    AsJson,
    Key,
    Url,
    call_patiently,
    examples,
    given,
    print_json,
    printer,
    reaching,
    upload,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The router's name.")]

app = typer.Typer()
routers = typer.Typer(
    no_args_is_help=True,
    help="Routers of a running server, with the admin key.",
    epilog=examples("loramux routers add support ./support-router", "loramux routers list"),
)
app.add_typer(routers, name="routers")


@routers.command(
    epilog=examples(
        "loramux routers add support ./support-router",
        "loramux routers add support ./support-router.tar.gz --replace",
        "loramux routers add support file:///routers/support",
    )
)
def add(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|SOURCE",
            help="What `loramux train retriever` or `meteora` wrote, or its .zip or .tar.gz, to upload;"
            " or a source for the server.",
        ),
    ],
    replace: Annotated[bool, typer.Option("--replace", help="If the name exists, put this one in its place.")] = False,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Register a trained router. It is served at once."""
    with reaching(url, key) as client:
        from server.admin_client import is_source, router_to_upload

        fields = given(name=name, replace=replace or None)
        if is_source(source):
            body = fields | {"source": source}
            reply = call_patiently(
                lambda: client.call("POST", "routers", body=body, patient=True), "the server fetches and checks it"
            )
        else:
            reply = upload(client, "routers", router_to_upload(Path(source)), fields)
    if as_json:
        print_json(reply.body)
        return
    from server.router_views import print_router

    out = printer()
    out.line(f"registered {name}", style="green")
    print_router(out, reply.body, time.time())


@routers.command("list", epilog=examples("loramux routers list --json"))
def list_routers(url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """List routers: the built-in one and trained ones."""
    with reaching(url, key) as client:
        found = client.get("routers")
    if as_json:
        print_json(found)
        return
    from server.router_views import print_routers

    print_routers(printer(), found["data"], time.time())


@routers.command(epilog=examples("loramux routers show support"))
def show(name: Name, url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """Show a router and how it was trained."""
    with reaching(url, key) as client:
        router = client.get(_path(name))
    if as_json:
        print_json(router)
        return
    from server.router_views import print_router

    print_router(printer(), router, time.time())


@routers.command(epilog=examples("loramux routers rm support"))
def rm(name: Name, url: Url = HERE, key: Key = None, as_json: AsJson = False) -> None:
    """Delete a trained router; tenants whose default it was get the server's."""
    with reaching(url, key) as client:
        answer = client.call("DELETE", _path(name)).body
    if as_json:
        print_json(answer)
        return
    printer().line(f"{name}: deleted")


@routers.command(epilog=examples("loramux routers default support", "loramux routers default support --tenant acme"))
def default(
    name: Name,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Whose; `default` by default.")] = None,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make a router what the model `auto` means for a tenant."""
    with reaching(url, key) as client:
        row = client.call("POST", f"{_path(name)}/default", query={"tenant": tenant}).body
    if as_json:
        print_json(row)
        return
    printer().line(f"{row['id']}: auto means {row['default_router']}")


@app.command(
    epilog=examples(
        'loramux explain "List all customers of Berlin"',
        'loramux explain "Ahoy" --tenant acme --router support --top-k 1 --candidate pirate --candidate sql',
    )
)
def explain(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What a user would write.")],
    tenant: Annotated[str | None, typer.Option("--tenant", help="As which tenant, with the admin key.")] = None,
    router: Annotated[str | None, typer.Option(help="Which router decides; by default the tenant's.")] = None,
    top_k: Annotated[int | None, typer.Option(help="How many adapters at most; by default the router's.")] = None,
    candidates: Annotated[
        list[str] | None, typer.Option("--candidate", metavar="NAME", help="Only these may be chosen; repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many candidates are shown.")] = 20,
    tokens: Annotated[
        int, typer.Option(min=0, help="If the router is inside the model: generate so many, and show who did what.")
    ] = 48,
    url: Url = HERE,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show which adapters the model `auto` would use for a prompt, and why.

    Only for a router inside the model an answer is generated, as the key's own tenant.
    """
    with reaching(url, key) as client:
        body = given(prompt=prompt, tenant=tenant, router=router, top_k=top_k, candidates=candidates or None)
        answer = client.call("POST", "route", body=body).body
        if answer["adapters"] and "scores" not in answer and tenant is None and tokens:
            answer = client.tokens(answer["router"], prompt, tokens, given(top_k=top_k, candidates=candidates or None))
    if as_json:
        print_json(answer)
        return
    from server.explanation_view import print_explanation

    print_explanation(printer(), answer, limit)


def _path(name: str) -> str:
    from server.admin_client import name_in_path

    return f"routers/{name_in_path(name)}"
