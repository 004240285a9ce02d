"""The few cases of a grid that a default run takes: together they have every value of every parameter.

A test marked `grid` is exhaustive: these of its cases belong to every run, the others are marked `slow`.
`grid(cover=["case.chip"])` names the parameters, or attributes of theirs, whose every value must occur instead of all
parameters; where it names none, the first case stands for all.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence, Set

import pytest


def covering(cases: Sequence[Set[Hashable]]) -> set[int]:
    """The places of few cases that have every feature of any: again and again the first that adds most."""
    missing = set().union(*cases)
    chosen = set() if missing else {0}
    while missing:
        best = max(range(len(cases)), key=lambda n: len(cases[n] & missing))
        chosen.add(best)
        missing -= cases[best]
    return chosen


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what every grid has beside its covering cases."""
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("grid"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in grids.values():
        few = covering([_features(item) for item in cases])
        for n, item in enumerate(cases):
            if n not in few:
                item.add_marker(pytest.mark.slow)


def _features(item: pytest.Item) -> set[Hashable]:
    """The values that make a case worth running, each with its name; as text, since not every value hashes."""
    parameters = item.callspec.params
    names = item.get_closest_marker("grid").kwargs.get("cover", parameters)
    return {(name, repr(_value(parameters, name))) for name in names}


def _value(parameters: Mapping[str, object], name: str) -> object:
    first, *attributes = name.split(".")
    return functools.reduce(getattr, attributes, parameters[first])
