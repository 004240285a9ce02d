"""Failures in any lane end the run at once, with the op's name, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from functools import partial

import pytest

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.memory.arena import Arena
from flexgen_triton.plan.policy import PolicyError
from flexgen_triton.run.actions import Round

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)
HOSTED = Policy(3, 2, 0, 0, 0, 60, 0, 0, cpu_cache_compute=True, cpu_attention_percent=50)
OPS = {
    "read_weight": (False, "disk_in"),
    "read_cache": (False, "disk_in"),
    "read_hidden": (False, "disk_in"),
    "compute": (False, "compute"),
    "write_hidden": (False, "disk_out"),
    "load_weight": (True, "h2d"),
    "load_cache": (True, "h2d"),
    "load_hidden": (True, "h2d"),
    "store_cache": (True, "d2h"),
    "store_hidden": (True, "d2h"),
    "write_cache": (True, "disk_out"),
}
HOSTED_OPS = {  # of a policy that has the host attend
    "store_query": "d2h",
    "attend_host": "host_attention",
    "load_attended": "h2d",
}
HOSTED_STAGES = ("project", "attend", "finish")  # which it has the device compute apart


@pytest.mark.parametrize("name", [*OPS, *HOSTED_OPS, *HOSTED_STAGES])
def test_an_error_in_any_lane_ends_the_run_and_names_its_op(tiny, tmp_path, monkeypatch, name):
    copies, lane = OPS.get(name) or (True, HOSTED_OPS.get(name, "compute"))
    stage, name = (name, "compute") if name in HOSTED_STAGES else (None, name)
    failed_at: list[float] = []
    actions = Round.actions.fget

    def failing(own, op):
        if stage and not (op.i and op.stages == 1 and own._plan.stages[op.j].spec.kind == stage):
            return actions(own)[name](op)
        failed_at.append(time.perf_counter())
        raise OSError(5, "the device is gone")

    monkeypatch.setattr(Round, "actions", property(lambda own: {**actions(own), name: partial(failing, own)}))
    threads = threading.active_count()
    policy = HOSTED if stage or name in HOSTED_OPS else Policy(3, 2, 0, 0, 0, 0, 0, 0)
    with LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=copies) as llm:
        with pytest.raises(OSError, match="the device is gone") as caught:
            llm.generate(tiny.prompts, GREEDY)
        assert time.perf_counter() - failed_at[0] < 1
        assert any(f"in {name}(i=" in note and lane in note for note in caught.value.__notes__)
        assert len(failed_at) == 1
        monkeypatch.undo()
        outputs = llm.generate(tiny.prompts, GREEDY)  # the engine is as good as new
    assert [o.outputs[0].token_ids for o in outputs] == [t[:6] for t in tiny.tokens]
    assert threading.active_count() == threads


@pytest.mark.parametrize("policy", [Policy(3, 2, 0, 0, 0, 0), HOSTED], ids=["all on disk", "attended on the host"])
def test_an_interrupt_ends_the_run_and_leaves_no_thread(tiny, tmp_path, monkeypatch, policy):
    def interrupted(self, i, k):
        raise KeyboardInterrupt

    monkeypatch.setattr(Round, "alive", interrupted)
    threads = threading.active_count()
    llm = LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=policy is HOSTED)
    with llm, pytest.raises(KeyboardInterrupt):
        llm.generate(tiny.prompts, SamplingParams(max_tokens=4, temperature=0))
    assert threading.active_count() == threads


def test_a_stream_given_up_while_the_host_attends_frees_everything(tiny, tmp_path, monkeypatch):
    """Every arena is closed, no file and no thread stays, and the engine goes on."""
    arenas = []
    made = Arena.__init__

    def noted(self, *args, **more):
        made(self, *args, **more)
        arenas.append(self)

    monkeypatch.setattr(Arena, "__init__", noted)
    threads, open_files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with LLM(str(tiny.path), policy=HOSTED, dtype="float32", offload_dir=tmp_path, copies=True) as llm:
        short = SamplingParams(max_tokens=1, temperature=0)
        stream = llm.stream([(tiny.prompts[0], short), *((p, GREEDY) for p in tiny.prompts[1:])])
        next(stream)  # the others are at work
        stream.close()
        outputs = llm.generate(tiny.prompts, GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == [t[:6] for t in tiny.tokens]
    assert arenas and all(arena.nbytes == 0 for arena in arenas)
    assert threading.active_count() == threads and len(os.listdir("/proc/self/fd")) == open_files
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_full_disk_is_found_before_generation_starts(tiny, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False)
    if mount.returncode:
        pytest.skip("this system does not let a filesystem be mounted")
    try:
        policy = Policy(7, 1, 100, 0, 0, 0)
        llm = LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=small)
        words = r"the disk needs .* has 0\.06 MiB; --gpu-batch-size 7 --percent 100 0 0 100 0 100"
        with llm, pytest.raises(PolicyError, match=words):
            llm.generate(tiny.prompts, GREEDY)
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "empty"), ([5, 10_000], "vocabulary"), ([-1], "vocabulary"), ([5] * 125, "positions")],
)
def test_prompts_that_cannot_be_run(tiny, tmp_path, prompt, words):
    with LLM(str(tiny.path), policy=Policy(), dtype="float32", offload_dir=tmp_path) as llm:
        with pytest.raises(ValueError, match=words):
            llm.generate([tiny.prompts[0], prompt], GREEDY)
        assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"temperature": -1}])
def test_sampling_parameters_out_of_range(fields):
    with pytest.raises(ValueError, match="must be"):
        SamplingParams(**fields)
