#!/usr/bin/env bash
# Every test on a fresh machine: installs what is missing, builds twice (optimised; address and undefined-behaviour
# sanitizers) and runs the suites of both.
#
#   tests/run_test.sh [--fast]     --fast leaves the sanitizers out
set -euo pipefail
source "$(dirname "$0")/../scripts/environment.sh"

presets=(release sanitize)
case ${1:-} in
  '') ;;
  --fast) presets=(release) ;;
  --help | -h) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) printf 'error: unknown option %s; see --help\n' "$1" >&2; exit 2 ;;
esac

need_build_packages
need_python
for preset in "${presets[@]}"; do
  build "$preset"
  say "testing preset $preset"
  (cd "$root" && ctest --preset "$preset" --parallel "$(nproc)" --progress)
done
say "all tests passed: ${presets[*]}"
