"""How adapters enter the store: read and checked, their files stored, then named by one transaction."""

import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from adapters_store.blobs import BlobStore, Fault, disk_errors, no_fault
from adapters_store.merge_size import check_merge
from adapters_store.merging import MergeRecipe, merge
from adapters_store.model_card import CARD_NAME
from adapters_store.peft_format import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterSummary,
    mapped_weights,
    read_layout,
    read_summary,
)
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
from adapters_store.samples_file import read_samples
from adapters_store.stored_form import write_stored
from adapters_store.types import AdapterError, AdapterLimits, LinearShape
from adapters_store.work_folder import WorkFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewAdapter:
    """What is to be registered. With `replace` a name that exists gets a new revision, and keeps what is None here.

    Without `may_be_public` a name that is public by now is refused.
    """

    name: str
    tenant: str = DEFAULT_TENANT
    public: bool | None = None
    pinned: bool | None = None
    description: str | None = None
    tags: tuple[str, ...] | None = None
    samples: tuple[str, ...] | None = None
    replace: bool = False
    may_be_public: bool = True


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
        limits: AdapterLimits | None = None,
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._work = work
        self._shape = shape
        self._base_name = base_name
        self._reserved = frozenset(reserved) | {"auto"}
        self._fault = fault
        self._limits = limits or AdapterLimits()

    def check_name(self, name: str) -> None:
        """Raises AdapterError `invalid_name` (400)."""
        if not re.fullmatch(NAME_PATTERN, name) or name in self._reserved:
            reserved = ", ".join(sorted(self._reserved))
            raise AdapterError(
                "invalid_name", f"adapter name {name!r} is not allowed: expected {NAME_PATTERN}, not {reserved}", 400
            )

    def check_new(self, new: NewAdapter, digest: str | None = None, size: int = 0) -> None:
        """Raise what a registration would raise now of the name and the quotas: AdapterError, RegistryError."""
        self.check_name(new.name)
        self._registry.check_new(
            new.tenant,
            new.name,
            public=new.public,
            replace=new.replace,
            may_be_public=new.may_be_public,
            digest=digest,
            size=size,
        )

    def register(self, folder: Path, new: NewAdapter, recipe: Mapping[str, object] | None = None) -> Registration:
        """Read, check, store and name the adapter in `folder`, which nobody changes meanwhile.

        The folder's README and `samples.json` stand in for a description and samples that are not given. Stored is
        what `write_stored` makes of the files. The blobs come first: a process killed in between leaves some that
        nothing references, for the sweep, and so does a registration that loses its name to another at the last moment:
        a third one may have put the same content meanwhile. Raises AdapterError, BlobError, RegistryError.
        """
        self.check_new(new)
        samples = new.samples if new.samples is not None else read_samples(folder)
        with self._work.staging() as stored:
            file = write_stored(folder, stored, self._shape, self._limits)
            self._fault("store.checked")
            size = sum((stored / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME))
            self.check_new(new, file.digest, size)
            config = self._blobs.put_file(stored / CONFIG_NAME)
            self._fault("store.config")
            weights = self._blobs.put_file(stored / WEIGHTS_NAME)
            self._fault("store.weights")
        description = new.description if new.description is not None else file.description or None
        done = self._registry.register(
            new.tenant,
            new.name,
            AdapterRow(
                digest=file.digest,
                rank=file.rank,
                alpha=file.alpha,
                targets=file.targets,
                modules=file.modules,
                bytes=size,
                config_blob=config.sha256,
                weights_blob=weights.sha256,
            ),
            public=new.public,
            pinned=new.pinned,
            description=description,
            tags=new.tags,
            samples=samples,
            recipe=recipe,
            replace=new.replace,
            may_be_public=new.may_be_public,
        )
        # Not stored: the next who registers the digest may have come by it otherwise.
        row = replace(done.adapter.adapter, warnings=self._warnings(file))
        return replace(done, adapter=replace(done.adapter, adapter=row))

    def register_named(self, folder: Path) -> NamedAdapter:
        """The adapter in `folder` under the folder's name, for everyone; registered unless the name had it before.

        So a name that was moved to another of its revisions stays there when the server starts again. The folder's
        samples count where the name has none, and so does its description unless the adapter is a new one. Raises
        AdapterError that names the folder; BlobError, RegistryUnavailable.
        """
        try:
            self.check_name(folder.name)
            samples = read_samples(folder)
            file = read_summary(folder, self._shape, self._limits)
            if self._registry.samples(DEFAULT_TENANT, [folder.name]).get(folder.name):
                samples = None
            current = self._current(folder.name)
            if current is not None and file.digest in {revision.digest for revision in current.revisions}:
                return self._described(current, file.description, samples)
            with self._work.staging() as copy, disk_errors():
                for name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
                    if (folder / name).is_file():
                        shutil.copyfile(folder / name, copy / name)
                return self.register(copy, NewAdapter(folder.name, public=True, samples=samples, replace=True)).adapter
        except (AdapterError, RegistryError) as error:
            if error.status >= 500:
                raise
            message = f"adapter folder {folder.name!r}: {error.message}"
            raise AdapterError(error.code, message, error.status) from error

    def merge(self, new: NewAdapter, terms: Sequence[tuple[Resolved, str, float]], recipe: MergeRecipe) -> Registration:
        """Merge (adapter, folder, weight) by `recipe`, and register the result.

        The adapters are mapped, not read: in memory are the result and one linear of all. Raises AdapterError,
        BlobError, RegistryError.
        """
        layouts = [read_layout(Path(folder), self._shape) for _, folder, _ in terms]
        self.check_new(new, size=check_merge(layouts, recipe, self._shape, self._limits))
        with ExitStack() as stack:
            weights = [
                (stack.enter_context(mapped_weights(Path(folder), self._shape, adapter.digest)), weight)
                for adapter, folder, weight in terms
            ]
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

    def _described(self, current: NamedAdapter, description: str, samples: tuple[str, ...] | None) -> NamedAdapter:
        """The name with these samples, and with this description if it has none."""
        wanted = None if current.description else description or None
        if wanted is None and not samples:
            return current
        return self._registry.update(current.tenant, current.name, description=wanted, samples=samples)

    def _current(self, name: str) -> NamedAdapter | None:
        """The built-in tenant's adapter of this name if its files are there."""
        try:
            found = self._registry.get(DEFAULT_TENANT, name)
        except NotFound:
            return None
        files = found.adapter.config_blob, found.adapter.weights_blob
        return found if found.tenant == DEFAULT_TENANT and all(map(self._blobs.exists, files)) else None

    def _warnings(self, file: AdapterSummary) -> tuple[str, ...]:
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
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}") if not path.parent.name.startswith("."))
    if not found:
        logger.warning("no folder in %s has an %s: it holds no adapters", folder, CONFIG_NAME)
    return tuple(found)
