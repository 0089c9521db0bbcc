"""The registered adapters: names by tenant, their revisions, and leases on the folders that hold them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapters_store.peft_format import CONFIG_NAME, read_adapter
from adapters_store.types import AdapterError, LinearShape

DEFAULT_TENANT = "default"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
MIN_PREFIX = 4
"""Fewest hexadecimal digits of a digest in `name@<digest prefix>`."""


class UnknownAdapter(LookupError):
    """No adapter of this name that the tenant may see; one it may not see is reported in the same words."""

    def __init__(self, name: str) -> None:
        super().__init__(f"adapter {name!r} does not exist")
        self.name = name


@dataclass(frozen=True)
class Revision:
    """One digest that a name has pointed to; `created` is in seconds since the epoch."""

    digest: str
    created: float


@dataclass(frozen=True)
class RegisteredAdapter:
    """One revision of a name. `revisions` lists all of the name's, oldest first, as of this one's registration."""

    name: str
    digest: str
    tenant: str
    public: bool
    path: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    modules: int
    bytes: int
    base_model: str | None
    description: str
    created: float
    revisions: tuple[Revision, ...]


@dataclass(eq=False)
class StoreLease:
    """Adapters in use by one request: local folder by digest. Given back exactly once by `AdapterStore.release`."""

    paths: Mapping[str, str]
    released: bool = False


class AdapterStore:
    """Adapters for a model of one shape. `clock` gives seconds since the epoch; `reserved` names are refused."""

    def __init__(self, shape: LinearShape, clock: Callable[[], float], reserved: Iterable[str] = ()) -> None:
        self.shape = shape
        self._clock = clock
        self._reserved = frozenset(reserved) | {"auto"}
        self._names: dict[tuple[str, str], list[RegisteredAdapter]] = {}  # revisions, the current one last
        self._public: dict[str, tuple[str, str]] = {}  # keys of _names by public name
        self._paths: dict[str, str] = {}
        self._leases: set[StoreLease] = set()
        self._counts: Counter[str] = Counter()

    def register_folder(self, folder: Path) -> tuple[RegisteredAdapter, ...]:
        """Register every sub-folder that holds an adapter, under its own name, for everyone.

        Raises AdapterError, naming the sub-folder, for the first one that cannot be served.
        """
        if not folder.is_dir():
            raise AdapterError("adapter_incomplete", f"{str(folder)!r} is not a folder: expected a folder of adapters")
        if (folder / CONFIG_NAME).is_file():
            raise AdapterError(
                "adapter_incomplete", f"{str(folder)!r} is itself an adapter: expected the folder that holds adapters"
            )
        found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}") if not path.parent.name.startswith("."))
        return tuple(self._register_named(path) for path in found)

    def register(
        self,
        name: str,
        folder: Path,
        tenant: str = DEFAULT_TENANT,
        *,
        public: bool = False,
        replace_existing: bool = False,
    ) -> RegisteredAdapter:
        """Read, check and name the adapter in `folder`.

        A name that exists moves to the new digest if `replace_existing`. Raises AdapterError: `invalid_name` (400),
        `adapter_exists` (409), or what `read_adapter` raises.
        """
        self._check_name(name)
        history = self._names.get((tenant, name), [])
        if history and not replace_existing:
            raise AdapterError("adapter_exists", f"adapter {name!r} exists: expected a new name, or replacement", 409)
        if public and self._public.get(name, (tenant, name)) != (tenant, name):
            raise AdapterError("adapter_exists", f"a public adapter {name!r} exists: expected a new name", 409)
        file = read_adapter(folder, self.shape)
        created = self._clock()
        revision = RegisteredAdapter(
            name=name,
            digest=file.digest,
            tenant=tenant,
            public=public,
            path=self._paths.setdefault(file.digest, str(folder.resolve())),
            rank=file.rank,
            alpha=file.alpha,
            targets=file.targets,
            modules=file.modules,
            bytes=file.num_bytes,
            base_model=file.base_model,
            description=file.description,
            created=created,
            revisions=(),
        )
        kept = [old for old in history if old.digest != file.digest]
        revisions = tuple(Revision(each.digest, each.created) for each in [*kept, revision])
        revision = replace(revision, revisions=revisions)
        self._names[tenant, name] = [*kept, revision]
        if public:
            self._public[name] = (tenant, name)
        elif self._public.get(name) == (tenant, name):
            del self._public[name]
        return revision

    def resolve(self, tenant: str, name: str) -> RegisteredAdapter:
        """The adapter that `name`, or `name@<digest prefix>`, means for a tenant: its own before a public one.

        Raises UnknownAdapter, also for a prefix that is too short, matches nothing or more than one revision.
        """
        plain, at, prefix = name.partition("@")
        key = (tenant, plain) if (tenant, plain) in self._names else self._public.get(plain)
        if key is None:
            raise UnknownAdapter(name)
        history = self._names[key]
        if not at:
            return history[-1]
        matches = [revision for revision in history if revision.digest.startswith(prefix.lower())]
        if len(prefix) < MIN_PREFIX or len(matches) != 1:
            raise UnknownAdapter(name)
        return matches[0]

    def list(self, tenant: str) -> tuple[RegisteredAdapter, ...]:
        """The adapters that a tenant may use, by name."""
        own = {name: (owner, name) for owner, name in self._names if owner == tenant}
        visible = self._public | own
        return tuple(self._names[visible[name]][-1] for name in sorted(visible))

    def lease(self, digests: Iterable[str]) -> StoreLease:
        """Keep the folders of these adapters in place. Raises UnknownAdapter for a digest never registered."""
        paths: dict[str, str] = {}
        for digest in digests:
            if digest not in self._paths:
                raise UnknownAdapter(digest)
            paths[digest] = self._paths[digest]
        lease = StoreLease(paths)
        self._leases.add(lease)
        self._counts.update(paths.keys())
        return lease

    def release(self, lease: StoreLease) -> None:
        """Give a lease back. Raises RuntimeError the second time."""
        if lease.released or lease not in self._leases:
            raise RuntimeError("the lease is released already or not of this store")
        lease.released = True
        self._leases.remove(lease)
        self._counts.subtract(lease.paths.keys())
        self._counts += Counter()

    def leases(self, digest: str) -> int:
        """How many leases hold an adapter."""
        return self._counts[digest]

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the counts equal the leases and every revision has a folder."""
        if Counter(digest for lease in self._leases for digest in lease.paths) != self._counts:
            raise RuntimeError(f"lease counts {dict(self._counts)} differ from the leases")
        for (tenant, name), history in self._names.items():
            digests = [revision.digest for revision in history]
            if not digests or len(set(digests)) != len(digests) or not self._paths.keys() >= set(digests):
                raise RuntimeError(f"adapter {name!r} of tenant {tenant!r} has bad revisions {digests}")

    def _register_named(self, folder: Path) -> RegisteredAdapter:
        try:
            return self.register(folder.name, folder, DEFAULT_TENANT, public=True)
        except AdapterError as error:
            raise AdapterError(error.code, f"adapter folder {folder.name!r}: {error.message}", error.status) from error

    def _check_name(self, name: str) -> None:
        if not re.fullmatch(NAME_PATTERN, name) or name in self._reserved:
            reserved = ", ".join(sorted(self._reserved))
            raise AdapterError(
                "invalid_name", f"adapter name {name!r} is not allowed: expected {NAME_PATTERN}, not {reserved}", 400
            )
