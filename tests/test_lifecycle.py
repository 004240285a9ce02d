"""Engines beside each other, and engines made and closed again and again."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.memory.arena import rss

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
SPREAD = Policy(2, 2, 20, 30, 25, 30, 40, 30)
CYCLES, WARM = 100, 20

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_engines_in_one_process_do_not_meet(tiny_models, tmp_path):
    """The second one generates while the first is in the middle of a stream."""
    one, other = tiny_models["pre-norm, 3 heads of 64"], tiny_models["heads of 80, gelu"]
    with (
        LLM(str(one.path), policy=SPREAD, dtype="float32", offload_dir=tmp_path, copies=True) as first,
        LLM(str(other.path), policy=SPREAD, dtype="float32", offload_dir=tmp_path, copies=True) as second,
    ):
        found = {}
        for output in first.stream((p, GREEDY) for p in one.prompts):
            found[output.request_id] = output.outputs[0].token_ids
            beside = [o.outputs[0].token_ids for o in second.generate(other.prompts[:3], GREEDY)]
            assert beside == [t[:4] for t in other.tokens[:3]]
    assert [found[n] for n in range(len(one.prompts))] == [t[:4] for t in one.tokens]


def test_a_stream_that_is_given_up_leaves_nothing_running(tiny, tmp_path):
    before = threading.active_count()
    with LLM(str(tiny.path), policy=SPREAD, dtype="float32", offload_dir=tmp_path, copies=True) as llm:
        idle = threading.active_count()
        stream = llm.stream((p, GREEDY) for p in tiny.prompts)
        next(stream)
        stream.close()
        assert threading.active_count() == idle
        outputs = llm.generate(tiny.prompts, GREEDY)
        assert [o.outputs[0].token_ids for o in outputs] == [t[:4] for t in tiny.tokens]
    assert threading.active_count() == before


class Enough(BaseException):
    pass


@pytest.mark.parametrize("streamed", [False, True], ids=["generate", "stream"])
def test_a_run_is_asked_at_every_op_whether_to_go_on(tiny, tmp_path, streamed):
    """On the thread that wants the answers; what is raised there ends the run, and the next one is as good as ever."""
    asked: list[threading.Thread] = []
    stop_at = [None]

    def check() -> None:
        asked.append(threading.current_thread())
        if len(asked) == stop_at[0]:
            raise Enough

    def answers() -> list[list[int]]:
        if not streamed:
            return [o.outputs[0].token_ids for o in llm.generate(tiny.prompts, GREEDY)]
        outputs = llm.stream((p, GREEDY) for p in tiny.prompts)
        return [o.outputs[0].token_ids for o in sorted(outputs, key=lambda o: o.request_id)]

    before = threading.active_count()
    with LLM(str(tiny.path), policy=SPREAD, dtype="float32", offload_dir=tmp_path, copies=True, check=check) as llm:
        assert asked, "loading asks too"
        idle, loaded = threading.active_count(), len(asked)
        right = answers()
        ops = 100 if streamed else len(llm.last_report.timeline.spans)
        assert len(asked) - loaded >= ops
        assert right == [t[:4] for t in tiny.tokens]
        for more in (1, 40, 150):
            stop_at[0] = len(asked) + more
            with pytest.raises(Enough):
                answers()
            assert threading.active_count() == idle
        assert answers() == right
    assert set(asked) == {threading.current_thread()}
    assert threading.active_count() == before


def test_a_hundred_engines_leave_no_threads_files_or_memory(tiny, tmp_path):
    def held() -> tuple[int, int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd")), rss()

    for n in range(CYCLES):
        with LLM(str(tiny.path), policy=SPREAD, dtype="float32", offload_dir=tmp_path, copies=True) as llm:
            list(llm.stream((p, GREEDY) for p in tiny.prompts[:3]))
        if n == WARM:
            threads, files, memory = held()
    now = held()
    assert now[0] == threads
    assert now[1] == files
    assert now[2] - memory < 8 << 20, "80 engines of 4 MB each"
    assert not list(tmp_path.rglob("*")), "a checkpoint read in place leaves no files"


def test_two_processes_share_one_store(tiny, tmp_path):
    """Both find a `.bin` checkpoint, convert it at the same time, and answer alike; one store is left."""
    source = tmp_path / "opt-bin"
    source.mkdir()
    (source / "config.json").write_text((tiny.path / "config.json").read_text())
    torch.save(load_file(tiny.path / "model.safetensors"), source / "pytorch_model.bin")
    code = (
        "import sys\n"
        "from flexgen_triton import LLM, Policy, SamplingParams\n"
        "policy = Policy(2, 2, 0, 0, 0, 0, 0, 0)\n"
        "params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)\n"
        f"with LLM({str(source)!r}, policy=policy, offload_dir={str(tmp_path / 'off')!r}) as llm:\n"
        f"    out = llm.generate({tiny.prompts!r}, params)\n"
        "print([o.outputs[0].token_ids for o in out])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = [process.communicate(timeout=200)[0] for process in both]
    assert [p.returncode for p in both] == [0, 0]
    assert [json.loads(a) for a in answers] == [[t[:4] for t in tiny.tokens]] * 2
    left = [p.name for p in (tmp_path / "off").iterdir() if p.is_dir()]
    assert len(left) == 1, left
