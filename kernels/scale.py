"""Factors of a mapping's weights that are made while the linears run."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Scale: TypeAlias = Tensor | Callable[[], Tensor | None] | None
"""fp32[S, T, U], a factor for each slice, row and column of a mapping, or a call that makes it; None for 1."""


def scale_of(scale: Scale) -> Tensor | None:
    """The factors, made now where they are not there yet."""
    return scale if scale is None or isinstance(scale, Tensor) else scale()
