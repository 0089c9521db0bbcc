"""A linear's output before the update of its adapters has been added."""

from torch import Tensor

Summands = tuple[Tensor, Tensor | None]
"""(y, delta), equal in shape and dtype: the value is y + delta, or y where delta is None.

Whoever consumes the value adds in fp32, so that no kernel has to run for the sum alone.
"""
