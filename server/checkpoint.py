"""From the `--model` of the command line to a folder on this machine."""

from pathlib import Path

from server.model_recipes import RECIPES

HUB_PATTERNS = ["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors"]
CONNECT_SECONDS = 10


class CheckpointError(ValueError):
    """There is no model where the settings say. The message is one sentence."""


def locate(model: str, data_dir: Path) -> Path:
    """The folder of `model`: a path, the name of a pulled model, or a hub id, which is downloaded if it must be.

    Raises CheckpointError. Without a network this takes seconds, not minutes.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"model {model!r} is a file, expected a folder with config.json and safetensors")
    if model in RECIPES:
        pulled = data_dir / "models" / model
        if pulled.is_dir():
            return pulled
        raise CheckpointError(f"model {model!r} is not here yet, run `loramux pull {model}` first")
    parts = model.split("/")
    if len(parts) != 2 or not all(parts) or model.startswith((".", "~")):
        raise CheckpointError(f"model folder {model!r} does not exist, and it is no hub id of the form org/name")
    return _download(model)


def _download(hub_id: str) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_PATTERNS, etag_timeout=CONNECT_SECONDS))
    except LocalEntryNotFoundError:
        problem = "the hub cannot be reached and there is no local copy"
    except HFValidationError:
        problem = "that is no valid hub id"
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        problem = "the hub does not have it, or not for you" if status in (401, 403, 404) else "the hub refused"
    except (HTTPError, OSError) as error:
        problem = f"the download failed ({type(error).__name__})"
    raise CheckpointError(f"model {hub_id!r} is no folder here, and as a hub id: {problem}")
