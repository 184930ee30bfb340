#!/usr/bin/env bash
# Every test on a fresh machine: installs what is missing, builds twice (address and undefined-behaviour sanitizers;
# optimised) and runs the suites of both, then the Python package's (python/tests/run.sh) and the fuzzers for a minute
# (scripts/fuzz.sh).
#
#   tests/run_test.sh [--fast]     --fast leaves the sanitizers and the fuzzers out
set -euo pipefail
source "$(dirname "$0")/../scripts/environment.sh"

presets=(sanitize release)
case ${1:-} in
  '') ;;
  --fast) presets=(release) ;;
  --help | -h) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) printf 'error: unknown option %s; see --help\n' "$1" >&2; exit 2 ;;
esac

need_build_packages
# The sanitized build needs neither Python's packages nor CUTLASS's headers, which are downloaded meanwhile.
(need_python && configure release -DFOURFOLD_BLACKWELL=AUTO) &
preparation=$!
[ ${#presets[@]} = 1 ] || build sanitize
wait "$preparation" || die "Python's packages or the release build were not prepared; why stands above"
build release all -DFOURFOLD_BLACKWELL=AUTO
for preset in "${presets[@]}"; do
  say "testing preset $preset"
  (cd "$root" && ctest --preset "$preset" --parallel "$(nproc)" --progress)
done
# The fuzzers beside the Python package, most of whose steps keep one core busy. 77: no libFuzzer on this machine.
fuzz_log=$build_folder/fuzz-run.log
if [ ${#presets[@]} -gt 1 ]; then
  say "starting the fuzzers in the background (log: build/fuzz-run.log)"
  setsid "$root/scripts/fuzz.sh" --seconds 15 >"$fuzz_log" 2>&1 &
  fuzzers=$! # a process group of its own
  trap 'kill -- -$fuzzers 2>/dev/null || true' EXIT
fi
"$root/python/tests/run.sh"
if [ ${#presets[@]} -gt 1 ]; then
  say "waiting for the fuzzers"
  status=0
  wait "$fuzzers" || status=$?
  trap - EXIT
  cat "$fuzz_log"
  [ $status = 0 ] || [ $status = 77 ] || die "the fuzzers found something, or did not build"
fi
say "all tests passed: ${presets[*]}"
