"""The choice of a backend."""

import subprocess
import sys

import pytest
import torch

from kernels import reference
from kernels.ops import select_ops


def test_the_cpu_and_the_override_get_the_reference() -> None:
    assert select_ops(torch.device("cpu")) is reference
    assert select_ops(torch.device("meta"), override="reference") is reference


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'tritn'"):
        select_ops(torch.device("cpu"), override="tritn")
    with pytest.raises(ValueError, match="meta"):
        select_ops(torch.device("meta"))


def test_importing_the_package_imports_nothing() -> None:
    """`transformers` imports a package of this name when it looks for its own."""
    code = "import sys; import kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
