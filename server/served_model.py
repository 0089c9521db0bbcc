"""The base model that the settings name: its folder, its shape, and what clients call it."""

from dataclasses import dataclass
from pathlib import Path

from adapters_store.store import StoreConfig
from server.checkpoint import locate
from server.config import Settings
from server.model.config import ModelConfig


@dataclass(frozen=True)
class ServedModel:
    """`base_name` is what adapters' configs are compared with, `served_name` the model of requests."""

    folder: Path
    base: ModelConfig
    base_name: str
    served_name: str

    @classmethod
    def of(cls, settings: Settings) -> "ServedModel":
        """Raises CheckpointError, ModelError."""
        model = settings.serve.model
        if model is None:
            raise ValueError("no model is given, expected --model FOLDER or a hub id")
        folder = locate(model, settings.data_dir)
        local = Path(model).expanduser().is_dir()
        served_name = settings.serve.served_name or (folder.resolve().name if local else model.split("/")[-1])
        base_name = folder.resolve().name if local else served_name
        return cls(folder, ModelConfig.from_folder(folder), base_name, served_name)

    def store_config(self, settings: Settings) -> StoreConfig:
        """Where its adapters are kept."""
        return settings.serve.store_config(self.served_name, settings.data_dir, settings.sources.max_adapter_bytes)
