"""Which configuration of `kernels.gemm` is fastest: measured on a GPU, kept in a file of its name."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import torch

TABLES = Path(__file__).parent / "tables"

ROW_CLASSES = (16, 32, 64, 128)
"""A configuration serves up to so many rows. Above, compute counts as much as bandwidth, and cuBLAS is as fast."""

SHARED_MEMORY = 150 * 1024
"""Bytes of one program: leaves 77 of an SM's 227 KiB to the kernels of the adapters.

On an H100 those cost 0.6 to 4 % of a step beside such programs and 15 to 18 % beside cuBLAS, which fills the SM.
"""

IN_FLIGHT = (32 * 1024, 224 * 1024)
"""Bytes of weights under way in each SM: 4.3 TB/s times a latency near 1 us need 32 KiB in each of 132 SMs."""

SM_COUNT = 132
"""Of an H100 or H200; decides only which candidates are worth measuring."""

BEST = ((64, 128, 1), (32, 128, 1), (32, 256, 1), (64, 256, 1), (128, 128, 1), (32, 128, 2), (64, 128, 2), (32, 256, 2))
"""(block_n, block_k, splits) that on an H100 were fastest for one of Llama 3.1 8B's linears at 16, 64 or 128 rows."""

MOST_CANDIDATES = 30


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes, splits of K, warps and pipeline stages of one product.

    prefetch: steps of weights brought into L2 before the kernel waits for the one before it (0 or a power of two; only
    with programmatic dependent launch). swapped: computes the transpose, with the weights as the tensor cores' first
    operand: then `block_n` >= 64, not `block_m`, is what Hopper's warp-group instructions need.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int
    prefetch: int = 4
    swapped: bool = False

    @property
    def shared_memory(self) -> int:
        """Bytes of the pipeline's buffers for 16-bit values on Hopper; warp-group instructions hold on to one more."""
        warp_group = (self.block_n if self.swapped else self.block_m) >= 64
        return (self.stages - (not warp_group)) * (self.block_m + self.block_n) * self.block_k * 2


@dataclass(frozen=True)
class Choice:
    """The fastest configuration of ours; `alone`: it is as fast as cuBLAS.

    Where it is slower it still serves steps with adapters, whose kernels find no room beside cuBLAS's: on an H200, 64
    rows of Llama 3.1 8B with 8 adapters take 5.77 ms a step with our products alone and 5.93 with cuBLAS's for one of
    the four linears, where it is 4 % faster.
    """

    config: GemmConfig
    alone: bool


@dataclass(frozen=True)
class GemmTable:
    """By (n, k, rows class): what was measured. Without an entry cuBLAS serves."""

    entries: Mapping[tuple[int, int, int], Choice] = field(default_factory=dict)

    @classmethod
    def load(cls, device_name: str, folder: Path = TABLES) -> "GemmTable":
        """The table of a GPU by its `torch.cuda.get_device_name()`, empty where there is none.

        Raises ValueError for a file that is not a list of {n, k, rows_class, alone, config}.
        """
        path = folder / f"{slug(device_name)}.json"
        if not path.is_file():
            return cls()
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                {
                    (row["n"], row["k"], row["rows_class"]): Choice(GemmConfig(**row["config"]), row["alone"])
                    for row in rows
                }
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a list of {{n, k, rows_class, alone, config}}: {error}") from error

    def save(self, device_name: str, folder: Path = TABLES) -> Path:
        """Write the file that `load` reads."""
        rows = [
            {"n": n, "k": k, "rows_class": rows_class, "alone": choice.alone, "config": asdict(choice.config)}
            for (n, k, rows_class), choice in sorted(self.entries.items(), key=lambda entry: entry[0])
        ]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{slug(device_name)}.json"
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
        return path

    def choose(
        self, rows: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, *, beside: bool = False
    ) -> GemmConfig | None:
        """The configuration for `rows` rows by a weight [n, k]; None for cuBLAS, as for all that is not in the table.

        beside: kernels of adapters run at the same time. A class without an entry is served by the next larger one.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            return None
        for rows_class in ROW_CLASSES:
            if rows <= rows_class and (n, k, rows_class) in self.entries:
                choice = self.entries[n, k, rows_class]
                return choice.config if choice.alone or beside else None
        return None


def slug(device_name: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def row_class(rows: int) -> int | None:
    """The smallest class for `rows` rows; None above the largest."""
    return next((rows_class for rows_class in ROW_CLASSES if rows <= rows_class), None)


def candidates(rows_class: int, n: int, k: int) -> list[GemmConfig]:
    """Configurations worth measuring for a weight [n, k], those that should be fast first."""
    shapes: dict[tuple[tuple[int, int, int], bool], list[GemmConfig]] = {}
    for config in _feasible(rows_class, n, k):
        shapes.setdefault(((config.block_n, config.block_k, config.splits), config.swapped), []).append(config)
    # of each shape the deepest pipeline, and one two stages shallower for the room that it leaves to other programs
    kept = [stages[-index] for stages in shapes.values() for index in (1, 3) if index <= len(stages)]
    kept.sort(key=lambda config: _cost(config, n, k))
    best = [shapes[shape, swapped][-1] for swapped in (False, True) for shape in BEST if (shape, swapped) in shapes]
    return list(dict.fromkeys(kept[: MOST_CANDIDATES - len(BEST)] + best + kept))[:MOST_CANDIDATES]


def _feasible(rows_class: int, n: int, k: int) -> Iterator[GemmConfig]:
    """By rising number of stages within a shape."""
    shapes = product((32, 64, 128, 256), (64, 128, 256), (1, 2, 3, 4), (False, True), range(2, 8))
    for block_n, block_k, splits, swapped, stages in shapes:
        warps = 8 if rows_class * block_n > 128 * 128 else 4
        config = GemmConfig(rows_class, block_n, block_k, splits, warps, stages, swapped=swapped)
        # with 64 rows the untransposed product has wgmma anyway
        if (swapped and (rows_class >= 64 or block_n < 64)) or block_k * splits * 2 > k or block_n > max(32, n):
            continue
        if splits > 1 and -(-n // block_n) > 2 * SM_COUNT:
            continue
        if config.shared_memory > SHARED_MEMORY or not IN_FLIGHT[0] <= _in_flight(config, n) <= IN_FLIGHT[1]:
            continue
        yield config


def _programs(config: GemmConfig, n: int) -> tuple[int, int]:
    """(programs of the product, how many of them an SM takes at a time)."""
    return -(-n // config.block_n) * config.splits, 227 * 1024 // (config.shared_memory + 1024)


def _in_flight(config: GemmConfig, n: int) -> int:
    """Bytes of weights that the programs of one SM have asked for at a time."""
    programs, resident = _programs(config, n)
    return min(resident, -(-programs // SM_COUNT)) * (config.stages - 1) * config.block_n * config.block_k * 2


def _cost(config: GemmConfig, n: int, k: int) -> float:
    """Rough seconds: memory at 4.3 TB/s, L2 at 5.5 TB/s, the last wave, and SMs left idle."""
    programs, resident = _programs(config, n)
    weights = n * k * 2
    activations = -(-n // config.block_n) * config.block_m * k * 2
    partials = 2 * 4 * config.splits * config.block_m * n if config.splits > 1 else 0
    slots = resident * SM_COUNT
    waves = -(-programs // slots) * slots / programs if programs > slots else 1.0
    idle = max(1.0, 0.75 * SM_COUNT / programs)
    return max(weights / 4.3e12, (weights + activations + partials) / 5.5e12) * waves * idle
