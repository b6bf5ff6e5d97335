# Sets `root`, the checkout around the current folder, as a relative path; to be sourced.
root=.
until [ -f $root/kernels/cuda/grouped_ffn.cu ]; do
  if [ "$(realpath $root)" = / ]; then echo "not inside a checkout" >&2; exit 1; fi
  root=../$root
done
