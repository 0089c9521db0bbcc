"""Compiles Triton kernels without a GPU, in a process of its own: Triton decides at import whether to interpret."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that one program may use, by compute capability (CUDA C++ programming guide, technical specifications)."""


@dataclass(frozen=True)
class Case:
    """One compilation: `kernel` is "module:function"; `signature` gives Triton's type of every run-time argument
    ("*bf16", "*i32", "i32", "fp32", "tensordesc<bf16[64, 64]>"), `constants` the value of every constexpr."""

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """What one compilation used: bytes of shared memory, and whether tensor-core instructions of Hopper are in it."""

    shared: int
    wgmma: bool
    tma: bool = field(default=False)


def compile_offline(cases: Sequence[Case], capability: int) -> list[Compiled]:
    """Compile all cases for sm_80 or sm_90 in one subprocess. Raises AssertionError with its output if one fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, str(capability)],
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**result) for result in json.loads(done.stdout.splitlines()[-1])]


def _compile(case: Case, capability: int) -> Compiled:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = dict(case.signature) | dict.fromkeys(case.constants, "constexpr")
    ordered = {argument: signature[argument] for argument in kernel.arg_names}
    # pointers and descriptors are aligned to 16 bytes, as torch's allocations are
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(ordered.values()) if kind.startswith("*")}
    constants = {name: tuple(value) if isinstance(value, list) else value for name, value in case.constants.items()}
    source = ASTSource(kernel, ordered, constants, aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = done.asm["ptx"]
    return Compiled(done.metadata.shared, "wgmma" in ptx, "cp.async.bulk.tensor" in ptx)


def main() -> None:
    capability = int(sys.argv[1])
    results = [_compile(Case(**case), capability) for case in json.load(sys.stdin)]
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
