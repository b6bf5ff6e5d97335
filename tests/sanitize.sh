#!/usr/bin/env bash
# The CUDA kernels under memcheck, initcheck, synccheck and racecheck. Each tool must first find a planted bug.
# Needs a GPU, compute-sanitizer and nvcc. Usage: tests/sanitize.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

nvcc -arch=native -lineinfo -o "$folder/planted" tests/planted_bugs.cu
for tool in memcheck initcheck synccheck racecheck; do
  options=(--tool "$tool" --error-exitcode 1)
  if compute-sanitizer "${options[@]}" "$folder/planted" "$tool" > "$folder/log" 2>&1; then
    echo "sanitize: $tool must find the planted bug, it found none" >&2
    exit 1
  fi
  echo "$tool finds the planted bug: $(grep -m1 -E '^========= (Invalid|Uninitialized|Barrier|Error|Warning)' "$folder/log")"
  compute-sanitizer "${options[@]}" --kernel-name kernel_substring=moe "$python" tests/every_kernel.py | tail -n 2
done
