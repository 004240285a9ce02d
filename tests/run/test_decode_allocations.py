"""Decoding allocates nothing: from token step 1 on, what a layer makes lies in memory from before the run."""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_policies import STRATEGIES
from tiny_models import MODELS, Tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.memory.arena import Arena
from flexgen_triton.models import ops
from flexgen_triton.models.ops import implementation
from flexgen_triton.plan.schedule import Op
from flexgen_triton.run.actions import Round
from flexgen_triton.sequences.sequence import TokenSequence

FORMATS = {  # dtype, 4-bit weights, 4-bit cache, share of V
    "fp32": ("float32", False, False, 1.0),
    "bf16": ("bfloat16", False, False, 1.0),
    "4-bit weights": ("float32", True, False, 1.0),
    "4-bit weights, bf16": ("bfloat16", True, False, 1.0),
    "4-bit cache": ("float32", False, True, 1.0),
    "sparse": ("float32", False, False, 0.2),
}
Action = Callable[[Op], int | None]
MIXED = (20, 30, 25, 30, 40, 30)
ATTENDED = (20, 30, 25, 70, 40, 30)  # of three sequences two on the host
PLACES = {"on disk": (0, 0, 0, 0, 0, 0), "in memory": (100, 0, 100, 0, 100, 0)}

# What allocates still, and goes from this list when it no longer does.
FUNCTIONS = ("reserve",)  # the workspace of 4-bit products on a GPU, which grows to its size in the first step
INTERPRETER = ("triton/runtime/interpreter.py",)  # in place of a GPU
GROWTH = 16 << 10  # bytes of Python's objects from step to step: none stay, some are about to go


def excused() -> bool:
    """Return True if the call comes from code that may still allocate."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(INTERPRETER) or frame.f_code.co_name in FUNCTIONS:
            return True
        frame = frame.f_back
    return False


def storages(tree: object) -> Iterator[int]:
    return (t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.numel())


@dataclass
class Seen:
    """Calls of the watched ops, by op, and those among them that allocate."""

    arenas: set[int] = field(default_factory=set)
    calls: Counter[str] = field(default_factory=Counter)
    found: Counter[tuple[str, str]] = field(default_factory=Counter)


class Watch(TorchDispatchMode):
    """Counts, by name, the operators whose result lies neither in an arena nor where an argument does."""

    def __init__(self, seen: Seen, op: str) -> None:
        super().__init__()
        self.seen, self.op = seen, op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.calls[self.op] += 1
        out = func(*args, **(kwargs or {}))
        arenas = self.seen.arenas
        known = arenas if "lift_fresh" in str(func) else arenas | set(storages((args, kwargs)))
        if not set(storages(out)) <= known and not excused():
            self.seen.found[self.op, str(func)] += 1
        return out


def python_bytes() -> int:
    """Bytes of objects made in the engine's own files, but for its records of what ran when."""
    package = str(Path(ops.__file__).parents[1])
    files = ("models/*", "memory/*", "run/actions.py", "run/head.py")
    wanted = [tracemalloc.Filter(True, f"{package}/{name}") for name in files]
    return sum(t.size for t in tracemalloc.take_snapshot().filter_traces(wanted).traces)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Watches all that any lane does in token steps from 1 on."""
    seen, make, actions = Seen(), Arena.__init__, Round.actions.fget

    def make_and_note(self: Arena, *args, **kwargs) -> None:
        make(self, *args, **kwargs)
        if self.nbytes:
            seen.arenas.add(self.buffer.untyped_storage().data_ptr())

    def watch(act: Action, op: Op) -> int | None:
        if op.i == 0:
            return act(op)
        stage = act.args[0]._plan.stages[op.j].spec.kind  # of a computation, the first
        with Watch(seen, stage if op.name == "compute" else op.name):
            return act(op)

    monkeypatch.setattr(Arena, "__init__", make_and_note)
    watched_actions = property(lambda self: {name: partial(watch, act) for name, act in actions(self).items()})
    monkeypatch.setattr(Round, "actions", watched_actions)
    return seen


def run(
    tiny: Tiny,
    folder: Path,
    fmt: str,
    strategy: str,
    percent: tuple[float, ...],
    *,
    copies: bool,
    on_step: Callable[[int, int], None] | None = None,
    **fields: Any,
) -> None:
    """Generate a few tokens; `on_step` is told of each GPU batch's token steps."""
    dtype, weights, cache, sparsity = FORMATS[fmt]
    num_batches, overlap = STRATEGIES[strategy]
    policy = Policy(
        3,
        num_batches,
        *percent,
        overlap=overlap,
        compress_weight=weights,
        compress_cache=cache,
        attn_sparsity=sparsity,
        **fields,
    )
    greedy = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)
    with LLM(str(tiny.path), policy=policy, dtype=dtype, offload_dir=folder, copies=copies) as llm:
        requests = [TokenSequence(list(p), greedy) for p in tiny.prompts[: 3 * num_batches]]
        llm.engine.generate(requests, progress=on_step)


@pytest.mark.grid
@pytest.mark.parametrize("copies", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_token_step_allocates_no_tensor(tiny, tmp_path, watched, fmt, copies):
    run(tiny, tmp_path, fmt, "multi-batch", MIXED, copies=copies)
    assert watched.calls and not watched.found


@pytest.mark.grid
@pytest.mark.parametrize("strategy", ["sequential", "single batch"])
@pytest.mark.parametrize("place", PLACES)
def test_under_any_strategy_and_anywhere(tiny, tmp_path, watched, strategy, place):
    run(tiny, tmp_path, "fp32", strategy, PLACES[place], copies=True)
    assert watched.calls and not watched.found


@pytest.mark.grid
@pytest.mark.parametrize("share", [50, 100])
@pytest.mark.parametrize("fmt", FORMATS)
def test_nor_where_the_host_attends(tiny, tmp_path, watched, fmt, share):
    attending = {"cpu_cache_compute": True, "cpu_attention_percent": share, "keep_open_pages": share == 50}
    run(tiny, tmp_path, fmt, "multi-batch", ATTENDED, copies=True, **attending)
    assert {"project", "attend_host", "finish"} <= set(watched.calls) and not watched.found


@pytest.mark.parametrize("fmt", ["fp32", "4-bit cache", "sparse"])
def test_nor_where_open_blocks_stay(tiny, tmp_path, watched, fmt):
    run(tiny, tmp_path, fmt, "multi-batch", MIXED, copies=True, keep_open_pages=True)
    assert watched.calls and not watched.found


@pytest.mark.parametrize("name", MODELS)
def test_nor_does_any_architecture(tiny_models, tmp_path, watched, name):
    run(tiny_models[name], tmp_path, "fp32", "multi-batch", MIXED, copies=True)
    assert watched.calls and not watched.found


@pytest.mark.grid(cover=[])
@pytest.mark.parametrize("fmt", ["fp32", "4-bit weights", "4-bit cache", "sparse"])
def test_nor_do_the_triton_kernels(tiny, tmp_path, watched, monkeypatch, fmt):
    monkeypatch.setattr(implementation, "uses_triton", lambda x: True)
    short = replace(tiny, prompts=[p[:12] for p in tiny.prompts])  # the interpreter takes milliseconds a program
    run(short, tmp_path, fmt, "single batch", MIXED, copies=True)
    assert watched.calls and not watched.found


@pytest.mark.grid(cover=[])
@pytest.mark.parametrize("fmt", FORMATS)
def test_nor_do_pythons_objects_grow_in_number(tiny, tmp_path, fmt):
    sizes: list[int] = []
    tracemalloc.start()
    try:
        run(tiny, tmp_path, fmt, "multi-batch", MIXED, copies=True, on_step=lambda *_: sizes.append(python_bytes()))
    finally:
        tracemalloc.stop()
    warm = sizes[len(sizes) // 3 :]  # what the first steps keep for the others is kept
    assert max(warm) - warm[0] < GROWTH, sizes
