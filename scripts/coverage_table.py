#!/usr/bin/env python3
"""Prints which lines the tests executed, by room, from gcovr's JSON: called by scripts/coverage.sh.

    scripts/coverage_table.py LINES.json

Below the table stand the lines that no test executed of the rooms that are the specification. Exit status: 0, or 1 where
one of these rooms has no more than 95% of its lines executed.
"""

from __future__ import annotations

import collections
import itertools
import json
import sys
from pathlib import PurePosixPath

SPECIFICATION = ("src/numeric", "src/moe", "src/checkpoint", "src/reference")
WANTED_PERCENT = 95.0


def executed_by_file(path: str) -> dict[str, dict[int, bool]]:
    """For every file its lines of code, and whether each was executed."""
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    return {
        entry["file"]: {line["line_number"]: line["count"] > 0
                        for line in entry["lines"] if not line.get("gcovr/noncode")}
        for entry in report["files"]
    }


def ranges(numbers: list[int]) -> str:
    """[3, 4, 5, 9] -> "3-5, 9"."""
    texts = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        first, *rest = [number for _, number in run]
        texts.append(f"{first}-{rest[-1]}" if rest else f"{first}")
    return ", ".join(texts)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        files = executed_by_file(sys.argv[1])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {sys.argv[1]}: expected gcovr's JSON, found: {error}; scripts/coverage.sh writes it")
    rooms = collections.defaultdict(list)
    for name, lines in files.items():
        rooms["/".join(PurePosixPath(name).parts[:2])] += lines.values()

    print("| room | lines | executed | |\n| --- | --- | --- | --- |")
    low = []
    for room in [*SPECIFICATION, *sorted(rooms.keys() - set(SPECIFICATION))]:
        lines = rooms[room]
        if not lines:
            sys.exit(f"error: {sys.argv[1]} has no lines of {room}; were the tests built with preset coverage?")
        percent = 100 * sum(lines) / len(lines)
        print(f"| {room} | {len(lines)} | {sum(lines)} | {percent:.1f}% |")
        if room in SPECIFICATION and percent <= WANTED_PERCENT:
            low.append(room)

    print("\nnot executed:")
    for name, lines in sorted(files.items()):
        missing = [number for number, executed in lines.items() if not executed]
        if missing and name.startswith(SPECIFICATION):
            print(f"{name}: {ranges(missing)}")
    for room in low:
        print(f"{room} has no more than {WANTED_PERCENT:.0f}% of its lines executed")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
