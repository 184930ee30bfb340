#!/usr/bin/env bash
# Runs the fuzzers of the readers (tests/fuzz; docs/checkpoints.md): Clang's libFuzzer, with the address and
# undefined-behaviour sanitizers. What they learn stays in build/fuzz/corpus, and is where the next run starts.
#
#   scripts/fuzz.sh [--seconds N] [header] [index] [config] [experts]
#
#   --seconds N   for each of them (default: 15; the long run: 1800). Without names, all of them, as many at a time as
#                 there are cores
#
# Exit status: 0 nothing found; 1 a finding, whose input lies in build/fuzz/findings; 2 usage; 77 no libFuzzer here.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

seconds=15
targets=()
while [ $# -gt 0 ]; do
  case $1 in
    --seconds)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { printf 'error: --seconds: expected a number from 1, found %s\n' "'${2:-}'" >&2; exit 2; }
      seconds=$2; shift ;;
    header | index | config | experts) targets+=("$1") ;;
    --help | -h) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) printf 'error: unknown argument %s; see --help\n' "$1" >&2; exit 2 ;;
  esac
  shift
done
[ ${#targets[@]} -gt 0 ] || targets=(header index config experts)

has_fuzzer() {
  command -v clang++ >/dev/null &&
    echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
    clang++ -x c++ - -fsanitize=fuzzer,address -fopenmp -o /dev/null 2>/dev/null
}
if ! has_fuzzer; then
  (need_packages clang libclang-rt-14-dev libomp-dev) || true  # a subshell: without these the rest of the tests still counts
  has_fuzzer || { say "skipped: clang++ can't link a libFuzzer target here (Debian: clang libclang-rt-14-dev libomp-dev)"; exit 77; }
fi
need_build_packages
build fuzz fuzzers

cores=$(nproc)  # before OMP_NUM_THREADS, which it heeds
# One thread: the targets are small, and a pool of threads costs more than it saves.
export OMP_NUM_THREADS=1
export UBSAN_OPTIONS=print_stacktrace=1
findings=$build_folder/fuzz/findings
mkdir -p "$findings"
trap 'trap - INT TERM; kill 0' INT TERM  # background jobs of a script do not heed Ctrl-C

# fuzz TARGET: one of them; says what it found.
fuzz() {
  local target=$1 corpus=$build_folder/fuzz/corpus/$1 log=$build_folder/fuzz/$1.log inputs=() folder
  mkdir -p "$corpus"
  for folder in "$root/tests/fuzz/seeds/$target" "$root/tests/fuzz/regressions/$target"; do
    [ ! -d "$folder" ] || inputs+=("$folder")
  done
  say "fuzzing $target for $seconds s (log: build/fuzz/$target.log)"
  if "$build_folder/fuzz/tests/fuzz/${target}_fuzz" -max_total_time="$seconds" -max_len=4096 -timeout=10 \
    -rss_limit_mb=2048 -malloc_limit_mb=512 -print_final_stats=1 -artifact_prefix="$findings/$target-" \
    "$corpus" "${inputs[@]}" >"$log" 2>&1; then
    say "  $target: nothing found: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") runs, $(grep -oE 'cov: [0-9]+' "$log" | tail -1), corpus of $(ls "$corpus" | wc -l) inputs"
  else
    grep -E 'SUMMARY|runtime error|does not hold|Test unit written' "$log" >&2 || tail -n 20 "$log" >&2
    printf 'error: %s: a finding; repeat it with build/fuzz/tests/fuzz/%s_fuzz FILE\n' "$target" "$target" >&2
    return 1
  fi
}

# As many at a time as there are cores.
status=0
running=0
for target in "${targets[@]}"; do
  if [ "$running" -ge "$cores" ]; then
    wait -n || status=1
    running=$((running - 1))
  fi
  fuzz "$target" &
  running=$((running + 1))
done
while [ "$running" -gt 0 ]; do
  wait -n || status=1
  running=$((running - 1))
done
exit $status
