"""The commands `train meteora`, `train moa` and `train milora`, of routers inside the model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli_train import DEFAULT_MODEL, DataDir, Device, Tasks, data_folder, failing

if TYPE_CHECKING:
    from routing.train.router_recipe import RouterRecipe
    from routing.train.router_training import PromptResult

app = typer.Typer()

Out = Annotated[Path, typer.Option(help="Folder that the router is written to.")]
Adapters = Annotated[Path, typer.Option(help="Folder of PEFT folders named like the tasks.")]
Joint = Annotated[bool, typer.Option("--joint", help="Train the adapters on, and write them as new ones.")]
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
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a row, and of a sample of several.")]
Seed = Annotated[int, typer.Option()]


@app.command("meteora")
def train_meteora(
    tasks: Tasks,
    adapters: Adapters,
    out: Out,
    model: Model = DEFAULT_MODEL,
    name: Name = None,
    group: Group = None,
    top_k: Annotated[int, typer.Option(min=1, help="Adapters of a token, in every linear.")] = 2,
    temperature: Annotated[float, typer.Option(help="Of the softmax over the chosen adapters.")] = 1.0,
    samples: Annotated[int | None, typer.Option(min=1, help="Training rows of a task at most [all].")] = None,
    null: Null = False,
    joint: Joint = False,
    beta: Annotated[float, typer.Option(min=0.0, help="Weight of the gates' loss.")] = 5.0,
    white: Annotated[
        bool, typer.Option("--white", help="Learn in a basis in which inputs are white; take a learning rate of 1e-2.")
    ] = False,
    reworded: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of rows with other words in the instruction; take 0.5.")
    ] = 0.0,
    packed: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of samples of several tasks.")] = 0.0,
    steps: Steps = 600,
    batch: Batch = 16,
    learning_rate: Rate = 5e-3,
    max_length: MaxLength = 512,
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Train a router that chooses adapters for every token. The last line printed is its folder."""
    from routing.train.meteora import train_meteora as run
    from routing.train.meteora_recipe import MeteoraRecipe

    recipe = MeteoraRecipe(
        top_k=top_k,
        temperature=temperature,
        null=null,
        joint=joint,
        beta=beta,
        white=white,
        reworded=reworded,
        packed=packed,
        steps=steps,
        batch_size=batch,
        learning_rate=learning_rate,
        max_length=max_length,
        seed=seed,
    )
    result = _Order(tasks, adapters, out, model, name, group, device, data_dir, samples).carry_out(run, recipe)
    metrics = result.card.training["metrics"]
    typer.echo(
        "validation rows, the gates' highest logit is the task's: "
        f"{metrics['gate_accuracy_apart']:.1%} from the first token on that differs between tasks, "
        f"where the answer is predicted {metrics['gate_accuracy_answer']:.1%}"
    )
    typer.echo(f"{len(result.card.adapters)} adapters, top {top_k}, loss {metrics['loss']:.3f}, {result.seconds:.0f} s")
    typer.echo(result.folder)


@app.command("moa")
def train_moa(
    tasks: Tasks,
    adapters: Adapters,
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
    joint: Joint = False,
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
    from routing.train.moa import train_moa as run
    from routing.train.prompt_recipe import MoaRecipe

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
    result = _Order(tasks, adapters, out, model, name, group, device, data_dir).carry_out(run, recipe)
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
    from routing.prompt_router import ADAPTERS, MODULES
    from routing.train.milora import train_milora as run
    from routing.train.prompt_recipe import MiloraRecipe

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
    result = _Order(tasks, adapters, out, model, name, group, device, data_dir).carry_out(run, recipe)
    metrics = result.card.training["metrics"]
    share = f"; layers choose the task's adapter: {metrics['accuracy']:.1%}" if "accuracy" in metrics else ""
    typer.echo(f"validation rows, loss {metrics['loss']:.3f}, entropy {metrics['entropy']:.3f} of 1{share}")
    if adapters is None:
        typer.echo(f"adapter: {result.folder / 'adapters' / result.card.adapters[0].name}")
    _say(result)


@dataclass(frozen=True)
class _Order:
    """What is trained on what. Without `adapters` none are given, and a new one is trained along."""

    tasks: Path
    adapters: Path | None
    out: Path
    model: str
    name: str | None
    group: str | None
    device: str
    data_dir: Path | None
    samples: int | None = None

    def carry_out(self, run: Callable[..., Any], recipe: "RouterRecipe") -> Any:
        """The result; whatever cannot be is one line."""
        from routing.card_file import RouterFolderError
        from routing.evaluate.groups import chosen_tasks
        from routing.train.adapter import TrainError
        from routing.train.adapter_folders import adapter_folders
        from routing.train.data import TaskDataError
        from routing.train.router_recipe import RouterRun
        from server.checkpoint import CheckpointError, locate

        with failing(CheckpointError, RouterFolderError, TaskDataError, TrainError):
            found = [replace(task, train=task.train[: self.samples]) for task in chosen_tasks(self.tasks, self.group)]
            folder = locate(self.model, data_folder(self.data_dir))
            own: dict[str, Path] = {}
            if self.adapters is not None:
                names = [task.name for task in found]
                own = adapter_folders(self.adapters, names, narrowed=self.group is not None, null=recipe.null)
                without = [name for name in names if name not in own]
                typer.echo(f"{len(own)} adapters" + (f"; without one: {', '.join(without)}" if without else ""))
            name = self.name or self.out.resolve().name
            settings = RouterRun(device=self.device, base_name=folder.resolve().name, name=name)
            return run(folder, found, own, self.out, recipe, settings)


def _say(result: "PromptResult") -> None:
    losses = result.card.training["final_losses"]
    typer.echo(f"{', '.join(f'{name} {loss:.3f}' for name, loss in losses.items())}, {result.seconds:.0f} s")
    typer.echo(result.folder)
