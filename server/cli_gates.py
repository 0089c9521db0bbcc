"""The commands `train extend`, for token-level routers, and `eval gates`, for all that are inside the model."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli_session import examples
from server.cli_train import DEFAULT_MODEL, DataDir, Device, Tasks, data_folder, failing

train = typer.Typer()
evaluate = typer.Typer()

Adapters = Annotated[Path, typer.Option(help="Folder of PEFT folders named like the tasks.")]
Model = Annotated[str, typer.Option(help="Model folder, pulled model or hub id.")]


@train.command(
    "extend",
    epilog=examples(
        "loramux train extend --router gates --add sql --tasks TASKS --adapters ADAPTERS --out gates-with-sql"
    ),
)
def extend(
    router: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the trained router.")],
    add: Annotated[str, typer.Option(metavar="NAME", help="The adapter's folder, and that of its task.")],
    tasks: Tasks,
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="Folder that the new router is written to.")],
    model: Model = DEFAULT_MODEL,
    samples: Annotated[int, typer.Option(min=1, help="Training rows of the new task.")] = 20,
    others: Annotated[int, typer.Option(min=1, help="Training rows of each other task.")] = 8,
    name: Annotated[str | None, typer.Option(help="What the router calls itself [as before].")] = None,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Let an adapter join a MeteoRA router, or fit its row anew. The last line printed is the new router's folder."""
    from routing.card_file import RouterFolderError
    from routing.train.adapter import TrainError
    from routing.train.data import TaskDataError, read_tasks
    from routing.train.extend import adapters_in, extend_router
    from routing.train.joined_row import ExtendRecipe
    from server.checkpoint import CheckpointError, locate

    with failing(CheckpointError, RouterFolderError, TaskDataError, TrainError):
        found, own = read_tasks(tasks), adapters_in(adapters)
        folder = locate(model, data_folder(data_dir))
        recipe = ExtendRecipe(samples=samples, others=others, device=device)
        result = extend_router(router, add, folder, found, own, out, recipe, name)
    metrics = result.card.training["added"][-1]["metrics"]
    typer.echo(
        f"validation rows, where the answer is predicted: {add} is chosen for its own {metrics['new_answer']:.1%}, "
        f"the others for theirs {metrics['others_answer']:.1%} (before {metrics['others_before_answer']:.1%})"
    )
    typer.echo(f"{len(result.card.adapters)} adapters, {result.seconds:.0f} s")
    typer.echo(result.folder)


@evaluate.command("gates")
def gates(
    tasks: Tasks,
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="Folder for answers, tables and plots; a run in it goes on.")],
    router: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=FOLDER", help="A MeteoRA router; repeatable.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    group: Annotated[str | None, typer.Option(help="Tasks of this group of the manifest.")] = None,
    curve: Annotated[
        list[str] | None, typer.Option(metavar="ROWS=FOLDER", help="A router of so many rows a task; repeatable.")
    ] = None,
    prompt_router: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=FOLDER", help="A MoA or MiLoRA router; repeatable.")
    ] = None,
    modules: Annotated[
        list[int] | None, typer.Option(min=1, help="Linears of a layer that MiLoRA uses, too; repeatable.")
    ] = None,
    joint: Annotated[Path | None, typer.Option(help="PEFT folder of one adapter trained on all tasks.")] = None,
    swapped: Annotated[
        list[str] | None, typer.Option(metavar="TASK=FOLDER", help="Another adapter of a task; repeatable.")
    ] = None,
    new: Annotated[list[str] | None, typer.Option(help="Report this task apart from the others; repeatable.")] = None,
    merge: Annotated[
        list[str] | None, typer.Option(metavar="METHOD[:sum][:DENSITY]", help="Only these merges; repeatable.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Test rows of a task [all].")] = None,
    composite_rows: Annotated[int | None, typer.Option(min=0, help="Composite prompts of a size [all].")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Of composite prompts; repeatable.")] = None,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Of the targets, too.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda")] = "auto",
    data_dir: DataDir = None,
) -> None:
    """Measure routers inside the model beside adapters and merges. The last line printed is the page of tables."""
    from routing.evaluate.gate_plan import GateEvaluation
    from routing.evaluate.gates import FAILURES, curve_of, labelled
    from routing.evaluate.gates import evaluate as run
    from server.checkpoint import CheckpointError, locate

    with failing(CheckpointError, *FAILURES):
        asked = GateEvaluation(
            model=str(locate(model, data_folder(data_dir))),
            tasks=str(tasks),
            adapters=str(adapters),
            routers=labelled(router or (), "router"),
            group=group,
            curve=curve_of(curve or ()),
            prompt_routers=labelled(prompt_router or (), "prompt router"),
            modules=tuple(modules or ()),
            joint=None if joint is None else str(joint),
            swapped=labelled(swapped or (), "swapped"),
            new=tuple(new or ()),
            merges=GateEvaluation.merges if merge is None else tuple(merge),
            rows=rows,
            composite_rows=composite_rows,
            temperatures=GateEvaluation.temperatures if temperature is None else tuple(temperature),
            perplexity=perplexity,
            device=device,
            batch=batch,
            seed=seed,
        )
        run(asked, out, lambda text: typer.echo(text, err=True))
    typer.echo(out / "gates.md")
