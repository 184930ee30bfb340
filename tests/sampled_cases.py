"""A pytest plugin: of a test with many cases one in five runs, evenly over all of them. For files whose every case
the other build runs: under sanitizers, where processes take ten times as long, all but hostile input; in the
optimised build hostile input, which sanitizers are for.

tests/CMakeLists.txt loads it: `pytest -p sampled_cases` with this folder in PYTHONPATH.
"""

from __future__ import annotations

import collections

import pytest

ONE_IN = 5
FEW = 3  # cases of a test that all run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {item for group in cases.values() for item in (group if len(group) <= FEW else group[::ONE_IN])}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
