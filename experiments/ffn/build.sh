#!/bin/bash
# CUTLASS=<include folder> build.sh: builds ./harness for sm_90a. UNITS="variants product" builds only these anew.
set -e
cd "$(dirname "$0")"
source ./root.sh
: "${CUTLASS:?must be the include folder of CUTLASS}"
flags="-gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 --expt-relaxed-constexpr -cudart static"
flags+=" -I $root/kernels/include -I $root/kernels/cuda -I $CUTLASS"
declare -A source_of=([variants]=variants.cu
  [product]=$root/kernels/cuda/grouped_ffn_sm90.cu [product_sm80]=$root/kernels/cuda/grouped_ffn_sm80.cu
  [dispatcher]=$root/kernels/cuda/grouped_ffn.cu [permute]=$root/kernels/cuda/permute.cu [harness]=harness.cu)
mkdir -p build
for unit in ${UNITS:-product product_sm80 dispatcher permute variants harness}; do
  log=build/$unit.log
  begin=$SECONDS
  nvcc $flags -Xptxas -v -c ${source_of[$unit]} -o build/$unit.o > $log 2>&1 || { grep -v "ptxas info" $log | head -40; exit 1; }
  echo "$unit: $((SECONDS - begin)) s"
  grep -i "warning\|C75\|serializ" $log || true
  grep "spill" $log | sort | uniq -c
done
nvcc $flags build/*.o -o harness
ls -l harness
