#!/usr/bin/env bash
# Packs what scripts/gpu_check.sh needs on a machine with a GPU that builds nothing: the command, the GPU tests and the
# scripts, linked statically but for libc and libm, stripped.
#
#   scripts/gpu_bundle.sh DIR             then there: DIR/scripts/gpu_check.sh --binaries DIR
#   scripts/gpu_bundle.sh NAME.tar.xz     the folder NAME, packed: every test holds the library, which packs well
#
# FOURFOLD_BLACKWELL=OFF in the environment leaves Blackwell's kernels out, and their tests.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

most_mb=60 # of an archive
case ${1:-} in
  '' | --help | -h) sed -n '2,8s/^# \{0,1\}//p' "$0"; [ -n "${1:-}" ] && exit 0 || exit 2 ;;
esac
result=$1 target=$1
if [[ $result = *.tar.xz ]]; then
  name=$(basename "$result" .tar.xz)
  [ "$name" != .tar.xz ] || die "expected a name before .tar.xz, found '$result'"
  packing=$(mktemp -d) && trap 'rm -rf "$packing"' EXIT
  target=$packing/$name
fi
need_build_packages
need_python # with pip, for the headers of CUTLASS
folder=$build_folder/portable
say "building a portable release in build/portable (log: build/portable.log)"
mkdir -p "$build_folder" "$target/tests" "$target/scripts"
(cmake -S "$root" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DFOURFOLD_PORTABLE=ON -DFOURFOLD_CUDA=ON \
  -DFOURFOLD_BLACKWELL="${FOURFOLD_BLACKWELL:-AUTO}" -DFOURFOLD_TEST_PYTHON="$python" &&
  cmake --build "$folder" --parallel "$(nproc)" --target fourfold_command gpu_tests) \
  >"$build_folder/portable.log" 2>&1 || { tail -n 60 "$build_folder/portable.log" >&2; die "the build failed"; }

install -s -m 755 "$folder/fourfold" "$target/fourfold"
while read -r test; do
  install -s -m 755 "$folder/tests/$test" "$target/tests/$test"
done <"$folder/gpu_tests.txt"
install -m 644 "$folder/gpu_tests.txt" "$target/gpu_tests.txt"
install -m 755 "$root"/scripts/{gpu_check.sh,gpu_counters.py,bench_shapes.py,torch_grouped.py,vllm_peers.py} "$target/scripts/"
if [ "$result" != "$target" ]; then
  mkdir -p "$(dirname "$result")"
  XZ_OPT='--lzma2=preset=6,dict=192MiB' tar -cJf "$result.part" -C "$packing" "$name"
  mv "$result.part" "$result"
fi
mb=$(du -sm "$result" | cut -f 1)
say "$result: $mb MB, $(wc -l <"$folder/gpu_tests.txt") GPU tests"
[ "$result" = "$target" ] || [ "$mb" -le "$most_mb" ] || die "the bundle has $mb MB, more than $most_mb"
