"""The commands `train` and `eval`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from server.cli_session import fail
from server.openmp import spin_briefly

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_ENCODER = "all-minilm-l6-v2"
_EXTRAS = {"peft": "train", "sentence_transformers": "routing"}

train = typer.Typer(no_args_is_help=True, help="Train adapters and routers.", callback=spin_briefly)
evaluate = typer.Typer(no_args_is_help=True, help="Measure routers.", callback=spin_briefly)

DataDir = Annotated[Path | None, typer.Option(help="Folder of models, adapters and the registry.")]
Tasks = Annotated[Path, typer.Option(help="Folder of folders with train.jsonl, valid.jsonl and test.jsonl.")]
Encoder = Annotated[str, typer.Option(help="Pulled encoder or sentence-transformers folder.")]
Device = Annotated[str, typer.Option(metavar="cpu|cuda")]
Group = Annotated[
    list[str] | None,
    typer.Option(help="A group of the manifest, or name=part,part; -part takes away. Repeatable."),
]


@train.command("adapter")
def train_adapter(
    task: Annotated[Path, typer.Option(help="Folder with train.jsonl, valid.jsonl and test.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder that the adapter is written to.")],
    model: Annotated[str, typer.Option(help="Model folder, pulled model or hub id.")] = DEFAULT_MODEL,
    rank: Annotated[int, typer.Option(min=1)] = 4,
    alpha: Annotated[int, typer.Option(min=1)] = 8,
    steps: Annotated[int, typer.Option(min=1)] = 400,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-3,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Train a LoRA adapter on a folder of task rows."""
    from routing.train.adapter import AdapterRecipe, AdapterRun, TrainError
    from routing.train.adapter import train_adapter as run
    from routing.train.data import TaskDataError
    from server.checkpoint import CheckpointError, locate

    with failing(CheckpointError, TaskDataError, TrainError):
        folder = locate(model, data_folder(data_dir))
        recipe = AdapterRecipe(rank=rank, alpha=alpha, steps=steps, learning_rate=learning_rate, seed=seed)
        result = run(folder, task, out, recipe, AdapterRun(device=device, base_name=folder.name))
    card = result.card
    typer.echo(
        f"{card.task}: exact match {card.accuracy_before:.1%} -> {card.accuracy_after:.1%} in {result.seconds:.0f} s"
    )
    typer.echo(result.folder)


@train.command("retriever")
def train_retriever(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Folder that the router is written to.")],
    encoder: Encoder = DEFAULT_ENCODER,
    name: Annotated[str | None, typer.Option(help="What the router calls itself [the folder's name].")] = None,
    group: Annotated[str | None, typer.Option(help="Only tasks of this group, as eval routing --group.")] = None,
    mode: Annotated[str, typer.Option(metavar="head|lora|full", help="What of the encoder is trained.")] = "head",
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the tasks, chosen by the seed.")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Training rows of a task at most.")] = 200,
    forms: Annotated[str, typer.Option(metavar="input|instruction+input|mixed", help="Of the texts.")] = "mixed",
    prefix: Annotated[str | None, typer.Option(help="Instruction before every text [LoraRetriever's].")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="[2000 for a head, else 1000]")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="[2e-3 for a head, 5e-4 for lora, 2e-5 for full]")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the contrastive loss.")] = 0.05,
    whitening: Annotated[float, typer.Option(help="Shrinkage of the head's start, 0 for none.")] = 0.1,
    keep: Annotated[float, typer.Option(min=0.0, help="Pull towards the untrained embeddings.")] = 0.0,
    rank: Annotated[int, typer.Option(min=1, help="Of the mode lora.")] = 8,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Train a router that chooses adapters by the prompt. The last line printed is its folder."""
    from routing.card_file import RouterFolderError
    from routing.encoder_model import PREFIX, EncoderError
    from routing.evaluate.groups import chosen_tasks
    from routing.train.data import TaskDataError
    from routing.train.retriever import RetrieverError, RetrieverRecipe, RetrieverRun
    from routing.train.retriever import train_retriever as run

    usual = {"steps": steps, "learning_rate": learning_rate}
    recipe = RetrieverRecipe.of(
        mode,
        **{field: value for field, value in usual.items() if value is not None},
        share=share,
        samples=samples,
        forms=forms,
        prefix=PREFIX if prefix is None else prefix,
        temperature=temperature,
        whitening=whitening or None,
        keep=keep,
        rank=rank,
        alpha=2 * rank,
        seed=seed,
    )
    with failing(EncoderError, RetrieverError, RouterFolderError, TaskDataError):
        found = chosen_tasks(tasks, group)
        folder = _encoder_folder(encoder, data_dir)
        result = run(
            folder,
            found,
            out,
            recipe,
            RetrieverRun(device=device, base_name=folder.name, name=name or out.resolve().name),
        )
    metrics = result.card.training.get("metrics", {})
    for form, parts in metrics.items():
        if isinstance(parts, dict):
            shown = ", ".join(f"{part} {shares['top1']:.1%} / {shares['top3']:.1%}" for part, shares in parts.items())
            typer.echo(f"validation rows, {form}, top 1 / 3: {shown}")
    typer.echo(f"{len(result.card.training['tasks'])} tasks, min_score {result.card.min_score}, {result.seconds:.0f} s")
    typer.echo(result.folder)


@evaluate.command("routing")
def eval_routing(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Folder for the tables, plots and rankings.")],
    router: Annotated[
        list[Path] | None,
        typer.Option(exists=True, file_okay=False, help="A trained router's folder; repeatable."),
    ] = None,
    encoder: Encoder = DEFAULT_ENCODER,
    group: Group = None,
    samples: Annotated[int, typer.Option(min=1, help="Training rows that make a prototype.")] = 20,
    rows: Annotated[int, typer.Option(min=1, help="Test rows of a task.")] = 50,
    curve: Annotated[list[int] | None, typer.Option(min=1, help="More numbers of samples; repeatable.")] = None,
    no_prefix: Annotated[bool, typer.Option("--no-prefix", help="The untrained encoder without prefix too.")] = False,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Measure how often a prompt's own adapter is found. The last line printed is the page of tables."""
    from routing.card_file import RouterFolderError
    from routing.encoder_model import EncoderError
    from routing.evaluate.groups import chosen_groups
    from routing.evaluate.routing import EvaluationPlan, Subject, evaluate_routing
    from routing.evaluate.routing_report import write_report
    from routing.train.data import TaskDataError, read_tasks
    from routing.train.progress import progress_bar

    plan = EvaluationPlan(samples=samples, rows=rows, curve=tuple(curve or ()), device=device)
    with failing(EncoderError, RouterFolderError, TaskDataError):
        found = read_tasks(tasks)
        folder = _encoder_folder(encoder, data_dir)
        groups = chosen_groups(tasks, {task.name for task in found}, group or ())
        subjects = [Subject("untrained", folder)]
        if no_prefix:
            subjects.append(Subject("untrained-no-prefix", folder, prefix=""))
        subjects += [Subject(path.name, folder, path) for path in router or ()]
        with progress_bar(enabled=True) as report:
            measured = evaluate_routing(subjects, found, groups, plan, report)
        write_report(out, measured, plan, groups)
    typer.echo(out / "routing.md")


def data_folder(given: Path | None) -> Path:
    from server.config import SettingsError, load_settings

    try:
        return load_settings({} if given is None else {"data_dir": given}, None).data_dir
    except SettingsError as error:
        fail(str(error), code=2)


def _encoder_folder(name: str, data_dir: Path | None) -> Path:
    """A folder as it is given, else a pulled encoder's; raises EncoderError for one that is none."""
    from routing.encoder_model import encoder_id

    folder = Path(name) if Path(name).is_dir() else data_folder(data_dir) / "models" / name
    encoder_id(folder)
    return folder


@contextlib.contextmanager
def failing(*errors: type[Exception]) -> Iterator[None]:
    """These errors mean that the command failed, not that it has a bug: one line, exit code 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        fail(f"this command needs {error.name}: run `pip install 'loramux[{_EXTRAS[error.name]}]'`")
    except errors as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
