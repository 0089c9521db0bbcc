#!/usr/bin/env bash
# Runs every kernel on small shapes under NVIDIA's compute-sanitizer: memcheck for accesses out of bounds, racecheck for
# hazards in shared memory. Needs a GPU, the CUDA toolkit's compute-sanitizer on the PATH (or in SANITIZER) and the
# packages of requirements.lock. Ends with an error if any tool reports one.
#   deploy/gpu_sanitize.sh [memcheck|racecheck|synccheck|initcheck ...]    (memcheck and racecheck by default)
set -euo pipefail
cd "$(dirname "$0")/.."
sanitizer=${SANITIZER:-compute-sanitizer}
python=${PYTHON:-.venv/bin/python}
[[ $# -gt 0 ]] || set -- memcheck racecheck

command -v "$sanitizer" >/dev/null || { echo "$sanitizer is not installed: it comes with the CUDA toolkit" >&2; exit 2; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no GPU was found" >&2; exit 2; }

# Every tensor gets an allocation of its own: within the blocks of a caching allocator no access is out of bounds.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

for tool in "$@"; do
  options=(--tool "$tool" --error-exitcode 1 --target-processes all --print-limit 20)
  # our kernels are named *_kernel; hazards that the tool reports within cuBLAS are not ours to mend
  [[ $tool == memcheck ]] || options+=(--kernel-regex kns=_kernel)
  echo "== $tool"
  "$sanitizer" "${options[@]}" "$python" -m pytest -m gpu -q -p no:cacheprovider -o timeout=0 -k sanitize tests/gpu/test_sanitize.py
done
