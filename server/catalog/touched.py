"""What an adapter touches, by its headers: linears, and memory of the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters_store.linear_names import module_path
from adapters_store.pages import rank_pages
from adapters_store.peft_format import read_layout
from adapters_store.types import LinearShape


@dataclass(frozen=True)
class Touched:
    """`modules` are names such as `layers.0.self_attn.q_proj` in the model's order; `pages` rank pages by group."""

    modules: tuple[str, ...]
    pages: Mapping[str, int]

    def warnings(self, pool: Mapping[str, int]) -> tuple[str, ...]:
        """What to tell of an adapter that a pool of so many pages a group can never hold."""
        for group, count in self.pages.items():
            if count > pool.get(group, count):
                return (
                    f"requests for it are refused here with mix_too_large: it needs {count} rank pages of {group},"
                    f" and this server has {pool[group]}, expected a larger --page-memory",
                )
        return ()


def touched(folder: Path, shape: LinearShape) -> Touched:
    """What the adapter in `folder` touches, which has been registered from there. Raises as `read_layout` does."""
    layout = read_layout(folder, shape)
    modules = tuple(module_path(*module).removeprefix("model.") for module in sorted(layout.modules))
    return Touched(modules, rank_pages(layout.group_ranks))
