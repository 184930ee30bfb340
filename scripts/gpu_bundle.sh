#!/usr/bin/env bash
# Packs what scripts/gpu_check.sh needs on a machine with a GPU that builds nothing: the command, the GPU tests and the
# scripts, linked statically but for libc and libm, stripped.
#
#   scripts/gpu_bundle.sh DIR        then there: DIR/scripts/gpu_check.sh --binaries DIR
set -euo pipefail
source "$(dirname "$0")/environment.sh"

most_mb=60
case ${1:-} in
  '' | --help | -h) sed -n '2,5s/^# \{0,1\}//p' "$0"; [ -n "${1:-}" ] && exit 0 || exit 2 ;;
esac
target=$1
need_build_packages
need_python # with pip, for the headers of CUTLASS
folder=$build_folder/portable
say "building a portable release in build/portable (log: build/portable.log)"
mkdir -p "$build_folder" "$target/tests" "$target/scripts"
(cmake -S "$root" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DFOURFOLD_PORTABLE=ON -DFOURFOLD_CUDA=ON \
  -DFOURFOLD_TEST_PYTHON="$python" &&
  cmake --build "$folder" --parallel "$(nproc)" --target fourfold_command gpu_tests) \
  >"$build_folder/portable.log" 2>&1 || { tail -n 60 "$build_folder/portable.log" >&2; die "the build failed"; }

install -s -m 755 "$folder/fourfold" "$target/fourfold"
while read -r test; do
  install -s -m 755 "$folder/tests/$test" "$target/tests/$test"
done <"$folder/gpu_tests.txt"
install -m 644 "$folder/gpu_tests.txt" "$target/gpu_tests.txt"
install -m 755 "$root"/scripts/{gpu_check.sh,torch_grouped.py} "$target/scripts/"
mb=$(du -sm "$target" | cut -f 1)
say "$target: $mb MB, $(wc -l <"$target/gpu_tests.txt") GPU tests"
[ "$mb" -le "$most_mb" ] || die "the bundle has $mb MB, more than $most_mb"
