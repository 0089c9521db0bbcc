"""How adapters enter the store: read and checked, their files stored, then named by one transaction."""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters_store.blobs import BlobStore, Fault, disk_errors, no_fault
from adapters_store.merging import MergeRecipe, merge
from adapters_store.model_card import CARD_NAME
from adapters_store.peft_format import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, read_adapter
from adapters_store.peft_write import write_peft
from adapters_store.registry import (
    DEFAULT_TENANT,
    NAME_PATTERN,
    AdapterRow,
    NamedAdapter,
    NotFound,
    Registration,
    Registry,
    RegistryError,
    Resolved,
)
from adapters_store.types import AdapterError, LinearShape
from adapters_store.work_folder import WorkFolder


@dataclass(frozen=True)
class NewAdapter:
    """What is to be registered. With `replace` a name that exists gets a new revision, and keeps what is None here."""

    name: str
    tenant: str = DEFAULT_TENANT
    public: bool | None = None
    pinned: bool | None = None
    description: str | None = None
    tags: tuple[str, ...] | None = None
    samples: tuple[str, ...] | None = None
    replace: bool = False


class Intake:
    """Registrations, blocking, from any thread. `reserved` names are refused."""

    def __init__(
        self,
        registry: Registry,
        blobs: BlobStore,
        work: WorkFolder,
        shape: LinearShape,
        base_name: str,
        reserved: Iterable[str] = (),
        fault: Fault = no_fault,
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._work = work
        self._shape = shape
        self._base_name = base_name
        self._reserved = frozenset(reserved) | {"auto"}
        self._fault = fault

    def check_name(self, name: str) -> None:
        """Raises AdapterError `invalid_name` (400)."""
        if not re.fullmatch(NAME_PATTERN, name) or name in self._reserved:
            reserved = ", ".join(sorted(self._reserved))
            raise AdapterError(
                "invalid_name", f"adapter name {name!r} is not allowed: expected {NAME_PATTERN}, not {reserved}", 400
            )

    def register(self, folder: Path, new: NewAdapter, recipe: Mapping[str, object] | None = None) -> Registration:
        """Read, check, store and name the adapter in `folder`, which nobody changes meanwhile.

        The blobs come first: a process killed in between leaves some that nothing references, for the sweep. Raises
        AdapterError, BlobError, RegistryError.
        """
        self.check_name(new.name)
        file = read_adapter(folder, self._shape)
        self._fault("store.checked")
        config = self._blobs.put_file(folder / CONFIG_NAME)
        self._fault("store.config")
        weights = self._blobs.put_file(folder / WEIGHTS_NAME)
        self._fault("store.weights")
        description = new.description if new.description is not None else file.description or None
        warnings = self._warnings(file)
        done = self._registry.register(
            new.tenant,
            new.name,
            AdapterRow(
                digest=file.digest,
                rank=file.rank,
                alpha=file.alpha,
                targets=file.targets,
                modules=file.modules,
                bytes=file.num_bytes,
                config_blob=config.sha256,
                weights_blob=weights.sha256,
                warnings=warnings,
            ),
            public=new.public,
            pinned=new.pinned,
            description=description,
            tags=new.tags,
            samples=new.samples,
            recipe=recipe,
            replace=new.replace,
        )
        # Stored are those of whoever registered the same digest first, which may be another tenant.
        return replace(done, adapter=replace(done.adapter, adapter=replace(done.adapter.adapter, warnings=warnings)))

    def register_named(self, folder: Path) -> NamedAdapter:
        """The adapter in `folder` under the folder's name, for everyone; registered unless the name had it before.

        So a name that was moved to another of its revisions stays there when the server starts again.
        Raises AdapterError that names the folder; BlobError, RegistryUnavailable.
        """
        try:
            self.check_name(folder.name)
            digest = read_adapter(folder, self._shape).digest
            current = self._current(folder.name)
            if current is not None and digest in {revision.digest for revision in current.revisions}:
                return current
            with self._work.staging() as copy, disk_errors():
                for name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
                    if (folder / name).is_file():
                        shutil.copyfile(folder / name, copy / name)
                return self.register(copy, NewAdapter(folder.name, public=True, replace=True)).adapter
        except (AdapterError, RegistryError) as error:
            if error.status >= 500:
                raise
            message = f"adapter folder {folder.name!r}: {error.message}"
            raise AdapterError(error.code, message, error.status) from error

    def merge(self, new: NewAdapter, terms: Sequence[tuple[Resolved, str, float]], recipe: MergeRecipe) -> Registration:
        """Merge (adapter, folder, weight) by `recipe`, and register the result.

        Raises AdapterError, BlobError, RegistryError.
        """
        weights = [(read_adapter(Path(folder), self._shape).weights, weight) for _, folder, weight in terms]
        merged = merge(weights, recipe.method, recipe.rank, recipe.density, recipe.seed or 0)
        del weights
        record = recipe.as_json()
        for entry, (adapter, _, _) in zip(record["adapters"], terms, strict=True):
            entry["name"] = adapter.name
        if new.description is None:
            parts = ", ".join(f"{adapter.name} ({weight:g})" for adapter, _, weight in terms)
            new = replace(new, description=f"{recipe.method} merge of {parts}")
        with self._work.staging() as folder, disk_errors():
            write_peft(folder, merged, self._base_name)
            del merged
            return self.register(folder, new, record)

    def _current(self, name: str) -> NamedAdapter | None:
        """The built-in tenant's adapter of this name if its files are there."""
        try:
            found = self._registry.get(DEFAULT_TENANT, name)
        except NotFound:
            return None
        files = found.adapter.config_blob, found.adapter.weights_blob
        return found if found.tenant == DEFAULT_TENANT and all(map(self._blobs.exists, files)) else None

    def _warnings(self, file: AdapterFile) -> tuple[str, ...]:
        trained_on = (file.base_model or "").rstrip("/").rpartition("/")[2]
        served = self._base_name.rstrip("/").rpartition("/")[2]
        if not trained_on or trained_on.lower() == served.lower():
            return ()
        return (f"trained on base model {trained_on[:200]!r}, served on {served!r}",)


def find_adapters(folder: Path) -> tuple[Path, ...]:
    """The sub-folders that hold an adapter, by name, hidden ones left out. Raises AdapterError `adapter_incomplete`."""
    if not folder.is_dir():
        raise AdapterError("adapter_incomplete", f"{str(folder)!r} is not a folder: expected a folder of adapters")
    if (folder / CONFIG_NAME).is_file():
        raise AdapterError(
            "adapter_incomplete", f"{str(folder)!r} is itself an adapter: expected the folder that holds adapters"
        )
    found = (path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    return tuple(sorted(path for path in found if not path.name.startswith(".")))
