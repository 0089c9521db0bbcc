"""Shapes of the LoRA kernels: how many rows, columns and steps one program takes."""

from dataclasses import dataclass

from kernels.tiles import TileShape

PROGRAMS = 264
"""Of a kernel that fills an H100 or H200: two for each of its 132 multiprocessors."""

FEW_TILES = 32
"""Up to this many tiles the programs are cut small, to have enough of them; H100, 8 tiles: 4 % less than "many"."""


@dataclass(frozen=True)
class ShrinkConfig:
    """One program multiplies the rows of a tile with a `splits`-th of the input, `block_k` columns at a time.

    joined: with all slices of the page at once, which reads the rows once, instead of with one of them.
    """

    block_k: int
    splits: int
    joined: bool
    warps: int
    stages: int


@dataclass(frozen=True)
class ExpandConfig:
    """One program makes `block_n` columns of the rows of a block ("shared": of 64 rows), `pages` pages at a time."""

    block_n: int
    pages: int
    warps: int
    stages: int


@dataclass(frozen=True)
class LoraConfig:
    """`reduced`: a kernel of its own sums the splits and rounds, instead of every program of the expansion."""

    shrink: ShrinkConfig
    expand: ExpandConfig
    reduced: bool


def lora_config(shape: TileShape, inputs: int, slices: tuple[int, ...], itemsize: int) -> LoraConfig:
    """What `lora_delta` runs with: it depends on shapes and capacities alone, as a captured graph needs it.

    itemsize: bytes of an element; shapes of 4 bytes take half as much at a time, to fit into the same shared memory.
    """
    if shape.block_rows > 16:
        shrink, expand = _prefill(shape.tiles, inputs, len(slices)), ExpandConfig(128, 1, 4, 2)
    elif shape.tiles <= FEW_TILES:
        # H100: 2 warps and 1 stage leave room beside the base product; 4 stages turn +4 % into +20 %
        shrink = ShrinkConfig(256, 16 if len(slices) == 1 else 8, False, 2, 1)
        expand = ExpandConfig(512 if sum(slices) >= 6144 else 256, 1, 2, 2)
    else:
        shrink = ShrinkConfig(128, _many_splits(inputs, len(slices)), False, 2, 4)
        expand = ExpandConfig(256 if sum(slices) >= 6144 else 128, 1, 2, 2)
    if shape.kind == "shared":
        columns = shared_columns(sum(slices))
        # sm_90: 33 and 49 KB of shared memory; 8 pages would take 66 and 99 KB and leave none to the base product
        expand = ExpandConfig(columns, 8 if columns < 64 else 4, 4, 2)
    return LoraConfig(
        _fit_shrink(shrink, inputs, itemsize),
        fit_expand(expand, max(slices), itemsize),
        shape.kind == "shared" or shape.block_rows > 16,
    )


def _prefill(tiles: int, inputs: int, num_slices: int) -> ShrinkConfig:
    """As many splits as fill the GPU, and no fewer than were best on an H100 for 2048 rows: 2 for several slices, 4 for
    one (2.05 ms for 32 layers, 3.8 without splits).
    """
    fewest, most = (2, 8) if inputs <= 8192 else (4, 16)
    fewest = fewest if num_slices > 1 else 4
    return ShrinkConfig(64, max(fewest, min(most, PROGRAMS // tiles)), True, 4, 4)


def _many_splits(inputs: int, num_slices: int) -> int:
    """H100, 64 tiles: 2 for three or two slices of 4096, 4 for one of 4096, 7 for one of 14336."""
    if num_slices > 1:
        return 2
    return 4 if inputs <= 8192 else 7


def shared_columns(outputs: int) -> int:
    """The widest that leaves 96 programs for 64 rows; H100: 64 for 6144 columns, 32 for 4096, 128 for 28672."""
    return next((columns for columns in (128, 64) if outputs >= 96 * columns), 32)


def _power_of_two(size: int) -> int:
    """The lowest power of two that is neither below `size` nor below 16, the least that a product takes."""
    return max(16, 1 << (size - 1).bit_length())


def _fit_shrink(config: ShrinkConfig, inputs: int, itemsize: int) -> ShrinkConfig:
    block_k = min(config.block_k if itemsize < 4 else config.block_k // 2, _power_of_two(inputs))
    steps = -(-inputs // block_k)
    splits = next(splits for splits in range(min(config.splits, steps), 0, -1) if steps % splits == 0)
    return ShrinkConfig(block_k, splits, config.joined, config.warps, config.stages)


def fit_expand(config: ExpandConfig, widest: int, itemsize: int) -> ExpandConfig:
    """No wider than the widest slice, and half as much at a time where elements have 4 bytes."""
    half = itemsize >= 4
    block_n = min(config.block_n // 2 if half else config.block_n, _power_of_two(widest))
    return ExpandConfig(block_n, max(1, config.pages // 2) if half else config.pages, config.warps, config.stages)
