"""The commands `train moa` and `train milora`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli_train import DEFAULT_MODEL, DataDir, Device, Tasks, data_folder, failing

if TYPE_CHECKING:
    from routing.train.router_recipe import RouterRun
    from routing.train.router_training import PromptResult

app = typer.Typer()

Out = Annotated[Path, typer.Option(help="Folder that the router is written to.")]
Model = Annotated[str, typer.Option(help="Model folder, pulled model or hub id.")]
Name = Annotated[str | None, typer.Option(help="What the router calls itself [the folder's name].")]
Group = Annotated[str | None, typer.Option(help="Only tasks of this group, as eval routing --group.")]
Pooling = Annotated[str, typer.Option(metavar="attention|mean|last|max", help="Of the prompt's hidden states.")]
Activation = Annotated[str, typer.Option(metavar="rational|none", help="Between pooling and the router's matrix.")]
Norm = Annotated[str, typer.Option(metavar="rms|none", help="Of hidden states before pooling.")]
Null = Annotated[bool, typer.Option("--null", help="Tasks without an adapter teach the router to use none.")]
Steps = Annotated[int, typer.Option(min=1)]
Batch = Annotated[int, typer.Option(min=1, help="Rows of a step.")]
Rate = Annotated[float, typer.Option(min=0.0)]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a row.")]
Seed = Annotated[int, typer.Option()]


@app.command("moa")
def train_moa(
    tasks: Tasks,
    adapters: Annotated[Path, typer.Option(help="Folder of PEFT folders named like the tasks.")],
    out: Out,
    model: Model = DEFAULT_MODEL,
    name: Name = None,
    group: Group = None,
    decision: Annotated[str, typer.Option(metavar="vote|last|layer", help="How routers decide.")] = "vote",
    depth: Annotated[int | None, typer.Option(min=1, help="Only the routers of so many layers count.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Adapters of a prompt.")] = 1,
    pooling: Pooling = "mean",
    activation: Activation = "none",
    norm: Norm = "rms",
    null: Null = False,
    joint: Annotated[bool, typer.Option("--joint", help="Train the adapters on, and write them as new ones.")] = False,
    eta: Annotated[float, typer.Option(min=0.0, help="Weight of the routers' loss.")] = 1.0,
    steps: Steps = 300,
    batch: Batch = 32,
    learning_rate: Rate = 2e-3,
    max_length: MaxLength = 512,
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Train a router that chooses an adapter for each prompt. The last line printed is its folder."""
    from routing.card_file import RouterFolderError
    from routing.evaluate.groups import chosen_tasks
    from routing.train.adapter import TrainError
    from routing.train.adapter_folders import adapter_folders
    from routing.train.data import TaskDataError
    from routing.train.moa import train_moa as run
    from routing.train.prompt_recipe import MoaRecipe
    from server.checkpoint import CheckpointError, locate

    recipe = MoaRecipe(
        decision=decision,
        depth=depth,
        top_k=top_k,
        pooling=pooling,
        activation=activation,
        norm=norm,
        null=null,
        joint=joint,
        eta=eta,
        steps=steps,
        batch_size=batch,
        router_rate=learning_rate,
        max_length=max_length,
        seed=seed,
    )
    with failing(CheckpointError, RouterFolderError, TaskDataError, TrainError):
        found = chosen_tasks(tasks, group)
        folder = locate(model, data_folder(data_dir))
        own = adapter_folders(adapters, [task.name for task in found], narrowed=group is not None, null=null)
        result = run(folder, found, own, out, recipe, _settings(device, folder, name, out))
    metrics = result.card.training["metrics"]
    by_layer = metrics["accuracy_by_layer"]
    typer.echo(
        f"validation rows, the task's adapter is chosen: {metrics['accuracy']:.1%}; "
        f"by the first layer's router {by_layer[0]:.1%}, by the last one {by_layer[-1]:.1%}"
    )
    _say(result)


@app.command("milora")
def train_milora(
    tasks: Tasks,
    out: Out,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of PEFT folders named like the tasks [a new adapter's linears].")
    ] = None,
    model: Model = DEFAULT_MODEL,
    name: Name = None,
    group: Group = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Of a layer [3 of 7 linears, or 1 adapter].")] = None,
    pooling: Pooling = "attention",
    activation: Activation = "rational",
    norm: Norm = "rms",
    null: Null = False,
    rank: Annotated[int, typer.Option(min=1, help="Of the new adapter.")] = 8,
    alpha: Annotated[int, typer.Option(min=1, help="Of the new adapter.")] = 16,
    balance: Annotated[float, typer.Option(min=0.0, help="Weight of the load balance.")] = 1e-2,
    eta: Annotated[float, typer.Option(min=0.0, help="Weight of the task's adapter as a label.")] = 1.0,
    coefficients: Annotated[str, typer.Option(metavar="dev|train|fixed", help="Of the activation: learn on.")] = "dev",
    steps: Steps = 300,
    batch: Batch = 32,
    learning_rate: Rate = 2e-3,
    max_length: MaxLength = 512,
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Train an adapter with routers that choose its linears, or such routers over adapters.

    The last line printed is the router's folder; a new adapter lies below it.
    """
    from routing.card_file import RouterFolderError
    from routing.evaluate.groups import chosen_tasks
    from routing.prompt_router import ADAPTERS, MODULES
    from routing.train.adapter import TrainError
    from routing.train.adapter_folders import adapter_folders
    from routing.train.data import TaskDataError
    from routing.train.milora import train_milora as run
    from routing.train.prompt_recipe import MiloraRecipe
    from server.checkpoint import CheckpointError, locate

    recipe = MiloraRecipe(
        experts=MODULES if adapters is None else ADAPTERS,
        top_k=top_k if top_k is not None else 3 if adapters is None else 1,
        pooling=pooling,
        activation=activation,
        norm=norm,
        null=null,
        rank=rank,
        alpha=alpha,
        balance=balance,
        eta=eta,
        coefficients=coefficients,
        steps=steps,
        batch_size=batch,
        router_rate=learning_rate,
        adapter_rate=learning_rate,
        max_length=max_length,
        seed=seed,
    )
    with failing(CheckpointError, RouterFolderError, TaskDataError, TrainError):
        found = chosen_tasks(tasks, group)
        folder = locate(model, data_folder(data_dir))
        names = [task.name for task in found]
        own = {} if adapters is None else adapter_folders(adapters, names, narrowed=group is not None, null=null)
        result = run(folder, found, own, out, recipe, _settings(device, folder, name, out))
    metrics = result.card.training["metrics"]
    share = f"; layers choose the task's adapter: {metrics['accuracy']:.1%}" if "accuracy" in metrics else ""
    typer.echo(f"validation rows, loss {metrics['loss']:.3f}, entropy {metrics['entropy']:.3f} of 1{share}")
    if adapters is None:
        typer.echo(f"adapter: {result.folder / 'adapters' / result.card.adapters[0].name}")
    _say(result)


def _settings(device: str, model: Path, name: str | None, out: Path) -> "RouterRun":
    from routing.train.router_recipe import RouterRun

    return RouterRun(device=device, base_name=model.resolve().name, name=name or out.resolve().name)


def _say(result: "PromptResult") -> None:
    losses = result.card.training["final_losses"]
    typer.echo(f"{', '.join(f'{name} {loss:.3f}' for name, loss in losses.items())}, {result.seconds:.0f} s")
    typer.echo(result.folder)
