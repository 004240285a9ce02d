"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from ahead_of_time import Case, Compiled
from kept_compiles import compiled_cases

CompileFor = Callable[[Sequence[Case], Sequence[Case]], dict[str, Compiled]]


@pytest.fixture(scope="session")
def compiles_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where machine code is kept from one run to the next; only for this one where pytest keeps nothing."""
    if pytestconfig.pluginmanager.has_plugin("cacheprovider"):
        return pytestconfig.cache.mkdir("compiled_kernels")
    return tmp_path_factory.mktemp("compiled_kernels")


@pytest.fixture(scope="module")
def compile_for(request: pytest.FixtureRequest, compiles_folder: Path) -> CompileFor:
    """A function that compiles those of a module's cases that its selected tests name, and some for all of them."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    named = {str(item.callspec.params.get("case")) for item in here}

    def compile_those(cases: Sequence[Case], others: Sequence[Case] = ()) -> dict[str, Compiled]:
        wanted = {str(case): case for case in (*(case for case in cases if str(case) in named), *others)}
        return dict(zip(wanted, compiled_cases(list(wanted.values()), compiles_folder), strict=True))

    return compile_those
