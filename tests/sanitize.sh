#!/usr/bin/env bash
# The CUDA kernels under memcheck, initcheck, synccheck and racecheck, side by side. Each tool must first find a
# planted bug. Needs a GPU, compute-sanitizer and nvcc; takes minutes. Usage: tests/sanitize.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
folder=$(mktemp -d)
trap 'jobs -p | xargs -r kill 2> /dev/null; rm -rf "$folder"' EXIT
# Every tensor is an allocation of its own: the tools see where it ends, and that it is new.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

check() {
  local tool=$1 options=(--tool "$1" --error-exitcode 1) filter=(--kernel-name kernel_substring=moe)
  if compute-sanitizer "${options[@]}" "$folder/planted" "$tool" > "$folder/$tool.planted" 2>&1; then
    echo "sanitize: $tool must find the planted bug, it found none" >&2
    return 1
  fi
  local arguments=()
  if [[ $tool == initcheck ]]; then
    filter=()  # it must see what torch's kernels write
    # What bulk copies write it does not see, and the expert kernels' results leave so; the tests fill theirs with NaN.
    compute-sanitizer "${options[@]}" "$folder/planted" bulk_copy > "$folder/bulk_copy.log" 2>&1 ||
      arguments=(--without_expert_kernels)
  fi
  compute-sanitizer "${options[@]}" "${filter[@]}" "$python" tests/every_kernel.py "${arguments[@]}" \
    > "$folder/$tool.log" 2>&1
}

nvcc -arch=native -lineinfo -o "$folder/planted" tests/planted_bugs.cu
declare -A running
for tool in memcheck initcheck synccheck racecheck; do
  check "$tool" &
  running[$tool]=$!
done
failed=0
for tool in memcheck initcheck synccheck racecheck; do
  wait "${running[$tool]}" || failed=1
  echo "$tool finds the planted bug: $(grep -m1 -E '^========= (Invalid|Uninitialized|Barrier|Error|Warning)' "$folder/$tool.planted")"
  if [[ $tool == initcheck && -s $folder/bulk_copy.log ]]; then
    echo "initcheck of a bulk copy that is right: $(tail -n 1 "$folder/bulk_copy.log")"
  fi
  tail -n 20 "$folder/$tool.log" 2> /dev/null || true
done
exit $failed
