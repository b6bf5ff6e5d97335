#!/bin/bash
# CUTLASS=<include folder> build.sh [ptx|sm90|both]
#   ptx: harness80 from compute_80 PTX, as a newer device would run it (default)
#   sm90: harness80_sm90, the same compiled ahead for sm_90
#   both: harness80_both, the product for 80 and 90a as it ships, to see the dispatcher choose
set -e
cd "$(dirname "$0")"
source ../root.sh
: "${CUTLASS:?must be the include folder of CUTLASS}"
mode=${1:-ptx}
case $mode in
  ptx) arch="-gencode=arch=compute_80,code=compute_80"; out=harness80;;
  sm90) arch="-gencode=arch=compute_80,code=sm_90"; out=harness80_sm90;;
  both) arch="-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a -DNO_VARIANTS"; out=harness80_both;;
esac
flags="-std=c++17 -O3 --expt-relaxed-constexpr -I $root/kernels/include -I $root/kernels/cuda -I $CUTLASS -cudart static"
mkdir -p build/$mode
for unit in $root/kernels/cuda/grouped_ffn{_sm80,,_sm90}.cu variants.cu harness.cu; do
  object=build/$mode/$(basename $unit .cu).o
  begin=$SECONDS
  nvcc $arch $flags -c $unit -o $object
  echo "$(basename $unit): $((SECONDS - begin)) s, $(stat -c %s $object) bytes"
done
nvcc $arch $flags build/$mode/*.o -o $out
ls -l $out
