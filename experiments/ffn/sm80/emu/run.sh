#!/bin/bash
# Runs on the CPU, thread by thread as fibers: the order of tiles (sm_80 and sm_90), and the sm_80 kernels (results,
# hangs, bank conflicts, reads out of bounds).
set -e
cd "$(dirname "$0")"
source ../../root.sh
python3 make.py $root/kernels
for program in tiles emu; do
  g++ -std=c++17 -O2 -w -I $root/kernels/include $program.cpp -o $program
  ./$program "$@"
done
