#!/usr/bin/env bash
# Which lines of the library the tests execute: builds with gcov's counters, runs every test that needs no GPU, and
# prints a table by room and the lines that no test executed (all rooms, to look at: build/coverage/html/index.html).
#
#   scripts/coverage.sh [--report]     --report: of the tests that have run already in build/coverage
#
# Exit status 1 where a room that is the specification (numeric, moe, checkpoint, reference) has no more than 95% of its
# lines executed. Takes long (docs/testing.md): counters in every loop.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

run=1
case ${1:-} in
  '') ;;
  --report) run=0 ;;
  --help | -h) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) printf 'error: unknown option %s; see --help\n' "$1" >&2; exit 2 ;;
esac

folder=$build_folder/coverage
need_build_packages
need_packages gcovr
need_python
if [ $run = 1 ]; then
  build coverage
  find "$folder" -name '*.gcda' -delete
  say "testing preset coverage"
  # Counters make programs slow and let them write files of their own, so that tests of limits may fail here. Whether
  # the code is right is what tests/run_test.sh says.
  (cd "$root" && ctest --preset coverage --parallel "$(nproc)" --progress) ||
    say "tests failed in this build (above); what they executed is counted"
elif [ -z "$(find "$folder" -name '*.gcda' -print -quit 2>/dev/null)" ]; then
  die "no test has run in build/coverage; run scripts/coverage.sh without --report"
fi

say "counting lines"
mkdir -p "$folder/html"
gcovr --root "$root" --object-directory "$folder" -j "$(nproc)" --filter "$root/src/" --filter "$root/include/" \
  --json "$folder/lines.json" --html-details "$folder/html/index.html" "$folder" ||
  die "gcovr failed; does its gcov belong to the compiler of build/coverage?"
"$root/scripts/coverage_table.py" "$folder/lines.json"
