"""A default run has every value of every grid, and a run of everything has every case."""

from __future__ import annotations

import itertools

import pytest
from grids import covering
from hypothesis import given
from hypothesis import strategies as st

pytest_plugins = ["pytester"]

GRID = """
    import pytest

    @pytest.mark.grid
    @pytest.mark.parametrize("copies", [False, True])
    @pytest.mark.parametrize("form", ["plain", "4bit", "sparse"])
    def test_forms(form, copies): ...

    @pytest.mark.grid(cover=["case.imag"])
    @pytest.mark.parametrize("case", [complex(n, n % 2) for n in range(6)])
    def test_one_of_each_kind(case): ...

    @pytest.mark.grid(cover=[])
    @pytest.mark.parametrize("case", range(5))
    def test_the_first_for_all(case): ...

    def test_alone(): ...
"""

HOOK = """
    import pytest
    from grids import mark_slow

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(items):
        mark_slow(items)
"""


@given(st.lists(st.frozensets(st.integers(0, 9)), min_size=1, max_size=12))
def test_the_chosen_cases_have_every_feature_and_none_is_in_vain(cases):
    chosen = covering(cases)
    assert set().union(*(cases[n] for n in chosen)) == set().union(*cases)
    assert len(chosen) <= max(len(set().union(*cases)), 1)


def test_a_grid_of_independent_values_takes_as_many_cases_as_its_longest_side():
    cases = [set(enumerate(values)) for values in itertools.product("abcde", "xyz", "01")]
    assert len(covering(cases)) == 5


def test_one_case_asked_for_by_name_is_covering():
    assert covering([{("form", "plain"), ("copies", True)}]) == {0}


@pytest.fixture
def counts(pytester: pytest.Pytester):
    """Count the tests of GRID that pass, given pytest's arguments."""
    pytester.makeini("[pytest]\nmarkers =\n    slow\n    grid")
    pytester.makeconftest(HOOK)
    pytester.makepyfile(test_grid=GRID)
    return lambda *args: pytester.runpytest_inprocess(*args).parseoutcomes()["passed"]


def test_default_and_slow_runs_have_every_case_between_them(counts):
    assert counts("-m", "slow or not slow") == counts() == 6 + 6 + 5 + 1
    assert counts("-m", "not slow") == 3 + 2 + 1 + 1
    assert counts("-m", "slow") == 3 + 4 + 4


def test_a_case_asked_for_by_its_name_runs(counts):
    assert counts("-m", "not slow", "test_grid.py::test_forms[sparse-True]") == 1
