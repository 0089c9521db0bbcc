"""Compiles Triton kernels without a GPU, in a process of its own: Triton decides at import whether to interpret."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

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


class Compiler:
    """Compiles in one subprocess, which imports torch and Triton once for all tests. Use it in a `with` block."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def compile(self, cases: Sequence[Case], capability: int) -> list[Compiled]:
        """Compile all cases for sm_80 or sm_90. Raises AssertionError with the traceback if one fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.poll() is None, "the compiler has crashed before"
        self._process.stdin.write(
            json.dumps({"capability": capability, "cases": [asdict(case) for case in cases]}) + "\n"
        )
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the compiler has crashed"
        done = json.loads(answer)
        assert "error" not in done, done["error"]
        return [Compiled(**result) for result in done["results"]]


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


def _answer(line: str) -> dict[str, object]:
    asked = json.loads(line)
    try:
        return {"results": [asdict(_compile(Case(**case), asked["capability"])) for case in asked["cases"]]}
    except Exception:
        return {"error": traceback.format_exc()[-4000:]}


def main() -> None:
    """Answers each line of the standard input with one of the standard output, which nothing else may write to."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(_answer(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
