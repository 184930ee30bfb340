#!/usr/bin/env bash
# Every test on a fresh machine: installs what is missing, builds twice (optimised; address and undefined-behaviour
# sanitizers) and runs the suites of both, then the Python package's (python/tests/run.sh) and the fuzzers for a minute
# (scripts/fuzz.sh).
#
#   tests/run_test.sh [--fast]     --fast leaves the sanitizers and the fuzzers out
set -euo pipefail
source "$(dirname "$0")/../scripts/environment.sh"

presets=(release sanitize)
case ${1:-} in
  '') ;;
  --fast) presets=(release) ;;
  --help | -h) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) printf 'error: unknown option %s; see --help\n' "$1" >&2; exit 2 ;;
esac

need_build_packages
need_python
for preset in "${presets[@]}"; do
  build "$preset" all -DFOURFOLD_BLACKWELL=AUTO
  say "testing preset $preset"
  (cd "$root" && ctest --preset "$preset" --parallel "$(nproc)" --progress)
done
"$root/python/tests/run.sh"
if [ ${#presets[@]} -gt 1 ]; then
  # 77: no libFuzzer on this machine, which fuzz.sh has said.
  "$root/scripts/fuzz.sh" --seconds 15 || [ $? = 77 ] || die "the fuzzers found something, or did not build"
fi
say "all tests passed: ${presets[*]}"
