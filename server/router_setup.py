"""What routes prompts, made of the settings: the encoder's process and the service that keeps the routers."""

import importlib.util
import logging
import time
from pathlib import Path

from adapters_store.store import AdapterStore
from routing.calibrated import min_score as calibrated_score
from routing.encoder import EncoderProcess, EncoderUnavailable
from routing.encoder_model import EncoderError
from routing.encoder_tokenizer import EncoderTokenizer
from routing.retriever import RetrieverDefaults
from routing.router import Routers
from server.checkpoint import CheckpointError, locate
from server.config import DEFAULT_ENCODER, Settings
from server.embedder import Embedder
from server.gated_routers import GatedRouters
from server.router_folders import RouterFolders
from server.routers import RouterService

logger = logging.getLogger(__name__)


def encoder_process(settings: Settings) -> tuple[EncoderProcess | None, str]:
    """What reads prompts, not started yet; or None, and why the model `auto` is not served.

    Raises CheckpointError if the settings name an encoder that is not there; the default one may be missing.
    """
    routing = settings.routing
    if routing.encoder == "none":
        return None, "the server's settings switch the encoder off"
    if importlib.util.find_spec("sentence_transformers") is None:
        return _without("the extra `routing` is not installed, `pip install 'loramux[routing]'` adds it")
    try:
        folder = locate(routing.encoder, settings.data_dir)
    except CheckpointError as error:
        if routing.encoder != DEFAULT_ENCODER:
            raise CheckpointError(f"the encoder is not here: {error}") from error
        return _without(str(error))
    process = EncoderProcess(
        folder,
        device=settings.serve.device if routing.device == "auto" else routing.device,
        num_threads=routing.threads,
        cache_texts=routing.cached_texts,
        gpu_share=routing.gpu_share,
        log_format=settings.serve.log_format,
    )
    return process, ""


def _without(why: str) -> tuple[None, str]:
    """Nobody asked for a server without an encoder: whoever starts one reads it in the log."""
    logger.warning("neither `auto` by a prompt's text nor embeddings of an encoder are served: %s", why)
    return None, why


def encoder_name(settings: Settings) -> tuple[str, ...]:
    """What clients call the encoder, if there is to be one: a folder's name, or the last part of a hub id."""
    encoder = settings.routing.encoder
    folder = Path(encoder).expanduser()
    if encoder == "none":
        return ()
    return (folder.resolve().name if folder.is_dir() else encoder.rpartition("/")[2],)


def embedder_of(settings: Settings, process: EncoderProcess | None) -> Embedder | None:
    """What answers requests for embeddings; None, and a line in the log, where there is no usable encoder."""
    if process is None:
        return None
    try:
        (name,) = encoder_name(settings)
        return Embedder(name, process.plain_encoder(), EncoderTokenizer.from_folder(process.folder))
    except (EncoderError, EncoderUnavailable) as error:
        logger.warning("there is no embedding model: %s", error)
        return None


def router_service(
    settings: Settings,
    store: AdapterStore,
    routers: Routers,
    process: EncoderProcess | None,
    fingerprint: str,
) -> RouterService:
    """Keeps `routers` equal to what encoder and registry have. `fingerprint` is the base model's."""
    routing = settings.routing

    def defaults(encoder: str, trained: float | None) -> RetrieverDefaults:
        calibrated = calibrated_score(encoder) if trained is None else trained
        lowest = calibrated if routing.min_score is None else routing.min_score
        return RetrieverDefaults(routing.top_k, lowest, routing.temperature)

    gated = GatedRouters(store, routers, fingerprint, time.perf_counter)
    folders = RouterFolders(store.registry, store.blobs, settings.router_folder)
    return RouterService(store, routers, process, gated, folders, defaults, time.perf_counter)
