"""Fixtures that every test folder shares."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: kernels run on the CPU here
if "PYTEST_XDIST_WORKER" in os.environ:  # the other cores run other tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from grids import mark_slow
from hypothesis import settings

from flexgen_triton.demo import DEMO_DIR

if TYPE_CHECKING:  # fixtures import torch and transformers themselves: the process that hands tests out needs neither
    from tiny_models import Tiny
    from transformers import OPTForCausalLM

for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:  # as in the background: tests send them, and commands leave it so
        signal.signal(number, handler)

settings.register_profile("ci", derandomize=True)  # CI judges the change, not the draw
if os.environ.get("CI"):
    settings.load_profile("ci")
EXAMPLES = int(os.environ.get("FLEXGEN_EXAMPLES", "1"))  # so many times as many of every property


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks and words
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)
    if EXAMPLES > 1:
        multiply_examples(items)


def multiply_examples(items: list[pytest.Item]) -> None:
    tests = {t for item in items if (t := getattr(getattr(item, "obj", None), "__func__", getattr(item, "obj", None)))}
    for test in tests:
        own = getattr(test, "_hypothesis_internal_use_settings", None)  # hypothesis has no public name for it
        if own is not None:
            test._hypothesis_internal_use_settings = settings(own, max_examples=EXAMPLES * own.max_examples)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same for all of its processes."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"


@pytest.fixture(scope="session")
def tiny_models(shared_folder: Path) -> Mapping[str, Tiny]:
    from tiny_models import TinyModels

    return TinyModels(shared_folder)


@pytest.fixture(scope="session")
def tiny(tiny_models: Mapping[str, Tiny]) -> Tiny:
    return tiny_models["pre-norm, 3 heads of 64"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other cost a model this small more than they bring."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    """The demo model, in fp32."""
    import torch
    from transformers import OPTForCausalLM

    return OPTForCausalLM.from_pretrained(DEMO_DIR, dtype=torch.float32, local_files_only=True).eval()
