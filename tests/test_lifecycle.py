"""The life of a model: made, used by several at once, closed at any moment, dropped, forked, left open at the exit."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.memory.arena import Arena, rss
from flexgen_triton.memory.store import StoreError
from flexgen_triton.plan.policy import PolicyError
from flexgen_triton.run.running import ClosedError

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


@pytest.fixture
def open_model(tiny, tmp_path) -> Callable[..., LLM]:
    """Makes a model that is spread over all tiers, its host memory apart."""
    return lambda **more: LLM(
        str(tiny.path), **{"policy": SPREAD, "dtype": "float32", "offload_dir": tmp_path, "copies": True, **more}
    )


@pytest.fixture
def arenas(monkeypatch) -> list[Arena]:
    """Every arena that is made."""
    found, made = [], Arena.__init__

    def noted(self, *args, **more):
        made(self, *args, **more)
        found.append(self)

    monkeypatch.setattr(Arena, "__init__", noted)
    return found


@pytest.fixture
def few_are_read_ahead(monkeypatch) -> None:
    for module in ("llm", "run.engine"):
        monkeypatch.setattr(f"flexgen_triton.{module}.MIN_WAITING", 8)


@pytest.fixture(autouse=True)
def nothing_is_left(tiny, tiny_models) -> Iterator[None]:
    """No more threads and descriptors than before, once the models are made: that may start a progress bar's thread."""
    _ = tiny_models["pre-norm, 3 heads of 64"], tiny_models["heads of 80, gelu"]

    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = held()
    yield
    if held() != before:
        gc.collect()
    assert all(now <= old for now, old in zip(held(), before, strict=True))


def tokens(outputs) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in sorted(outputs, key=lambda o: o.request_id)]


class Enough(BaseException):
    pass


def fail_beside(stream) -> None:
    next(stream)
    raise Enough


USES = {
    "generate": lambda llm: llm.generate([[5]], GREEDY),
    "generate nothing": lambda llm: llm.generate([], GREEDY),
    "stream": lambda llm: llm.stream([([5], GREEDY)]),
    "use": lambda llm: llm.use(SPREAD),
    "engine": lambda llm: llm.engine,
    "policy": lambda llm: llm.policy,
}


def test_a_closed_model_says_so(open_model):
    llm = open_model()
    begun = llm.stream([([5], GREEDY)])
    llm.close()
    llm.close()
    for use in (*USES.values(), lambda llm: next(begun)):
        with pytest.raises(ClosedError) as caught:
            use(llm)
        assert str(caught.value) == "the model is closed; make a new LLM" and isinstance(caught.value, ValueError)
    assert llm.token_ids([5]) == [5], "what needs no memory is answered still"


def test_a_model_without_an_engine_can_be_closed(open_model):
    with open_model(policy="auto", hardware="h100") as llm:
        pass
    with pytest.raises(ClosedError, match="is closed"):
        llm.generate([[5]], GREEDY)


def test_an_exception_inside_with_is_the_one_that_comes_out(open_model):
    llm = open_model()
    with pytest.raises(Enough), llm:
        fail_beside(llm.stream([([5], GREEDY)] * 9))
    with pytest.raises(ClosedError):
        llm.generate([[5]], GREEDY)


@pytest.mark.parametrize(
    ("end", "words"),
    [(LLM.close, "model is closed"), (lambda llm: llm.use(Policy(2, 2)), r"loaded anew, as use\(\) was told")],
    ids=["close", "use"],
)
def test_what_ends_a_model_ends_its_streams_with_an_error(tiny, open_model, arenas, end, words):
    """Between two answers; memory is freed at once, and later too there is an error and never a silent end."""
    llm = open_model()
    streams = [llm.stream((p, GREEDY) for p in tiny.prompts * 2) for _ in range(2)]
    for stream in streams:
        next(stream)
    old = [a for a in arenas if a.nbytes]
    end(llm)
    assert old and not any(a.nbytes for a in old)
    assert not [t for t in threading.enumerate() if t.name.startswith("lane-")]
    for stream in streams:
        with pytest.raises(ClosedError, match=words):
            next(stream)
    if not llm._closed:
        assert tokens(llm.generate(tiny.prompts, GREEDY)) == [t[:4] for t in tiny.tokens]
    llm.close()


@pytest.mark.usefixtures("few_are_read_ahead")
@pytest.mark.parametrize("where", ["prompts", "progress"])
def test_a_model_closed_by_what_it_calls_ends_with_an_error(tiny, open_model, arenas, where):
    """By the prompts' iterator, in the caller's thread, or by what is told of token steps, in a lane's."""
    closing = threading.Event()

    def progress(phase: str, done: int, total: int) -> None:
        if where == "progress" and phase == "generate" and done == 2 and not closing.is_set():
            closing.set()
            llm.close()

    def prompts():
        for n, prompt in enumerate(tiny.prompts * 9):
            if where == "prompts" and n == 30:
                llm.close()
            yield prompt, GREEDY

    llm = open_model(progress=progress)
    with pytest.raises(ClosedError, match="is closed"):
        list(llm.stream(prompts()))
    assert not any(a.nbytes for a in arenas)


@pytest.mark.usefixtures("few_are_read_ahead")
def test_a_model_closed_from_another_thread_ends_what_waits_for_it(tiny, open_model, arenas):
    """In the midst of generate and of stream, each in a thread of its own."""
    llm, found = open_model(), []
    at_work = threading.Barrier(3, timeout=60)

    def watched(prompts):
        yield from prompts[:3]
        at_work.wait()
        yield from prompts[3:] * 200

    def run(use: Callable[[], object]) -> None:
        try:
            use()
        except ValueError as error:
            found.append(error)

    asked = [(p, GREEDY) for p in tiny.prompts]
    uses = (lambda: list(llm.stream(watched(asked))), lambda: llm.generate(list(watched(tiny.prompts)), GREEDY))
    threads = [threading.Thread(target=run, args=(use,)) for use in uses]
    for thread in threads:
        thread.start()
    at_work.wait()
    while not any(a.name == "device rings" and a.nbytes for a in arenas):
        pass
    llm.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [type(e) for e in found] == [ClosedError] * 2
    assert not any(a.nbytes for a in arenas)


def test_what_runs_beside_a_stream_keeps_its_automatic_policy(tiny, open_model):
    """Another one would end the stream; without anything under way it is chosen anew."""
    long = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
    with open_model(policy="auto", hardware="h100", copies=None) as llm:
        stream = llm.stream((p, GREEDY) for p in tiny.prompts)
        found, engine = [next(stream)], llm.engine
        beside = llm.generate([p[:9] for p in tiny.prompts] * 3, long)
        assert llm.engine is engine and all(len(o.outputs[0].token_ids) == 12 for o in beside)
        found += stream
    assert tokens(found) == [t[:4] for t in tiny.tokens]


def test_models_and_streams_that_are_dropped_free_all_they_have(tiny, open_model, arenas):
    models = [open_model() for _ in range(3)]
    streams = [llm.stream((p, GREEDY) for p in tiny.prompts) for llm in models]
    for stream in streams:
        next(stream)
    del models, streams, stream
    gc.collect()
    assert arenas and not any(a.nbytes for a in arenas)


def test_a_model_that_cannot_be_made_leaves_nothing(tiny, open_model, arenas, tmp_path):
    with pytest.raises(PolicyError, match="needs"):
        open_model(cpu_memory="1MiB")
    source = tmp_path / "opt-bin"
    source.mkdir()
    (source / "config.json").write_text((tiny.path / "config.json").read_text())
    torch.save(load_file(tiny.path / "model.safetensors"), source / "pytorch_model.bin")
    whole = {"policy": Policy(), "dtype": "float32", "offload_dir": tmp_path / "off"}
    LLM(str(source), **whole).close()
    damaged = max((tmp_path / "off").rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    with damaged.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(StoreError, match="is damaged"):
        LLM(str(source), **whole)
    assert not any(a.nbytes for a in arenas)


FORKS = """
import os, signal, sys, time, warnings
from flexgen_triton import LLM, Policy, SamplingParams
path, folder, prompts = {path!r}, {folder!r}, {prompts!r}
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
def open_model(**more):
    fields = {{"policy": Policy(2, 2, 20, 30, 25, 30, 40, 30), "dtype": "float32", "offload_dir": folder}}
    return LLM(path, **{{**fields, "copies": True, **more}})
def tokens(llm):
    return [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
def told(use):
    try:
        return use()
    except ValueError as error:
        return f"{{type(error).__name__}}: {{error}}"
def fork(use):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm({seconds})
    print("child:", use(), flush=True)
    sys.exit(7)  # the long way, past finalisers
early = open_model(policy="auto", hardware="h100")
print(fork(lambda: told(lambda: tokens(early))))
llm = open_model()
stream = llm.stream((p, GREEDY) for p in prompts)
first = next(stream)
for use in (
    lambda: told(lambda: tokens(llm)), lambda: told(lambda: next(llm.stream([(prompts[0], GREEDY)]))),
    lambda: told(lambda: next(stream)), lambda: told(open_model), lambda: told(lambda: tokens(early)),
    llm.close, stream.close,
):
    print(fork(use))
from multiprocessing import get_context
def work(queue):
    queue.put(told(lambda: tokens(llm)))
queue = get_context("fork").Queue()
process = get_context("fork").Process(target=work, args=(queue,))
process.start()
print(queue.get(timeout={seconds}))
process.join()
print(process.exitcode)
found = sorted([first, *stream], key=lambda o: o.request_id)
print([o.outputs[0].token_ids for o in found] == tokens(llm) == {tokens!r})
left = llm.stream((p, GREEDY) for p in prompts)
next(left)
"""


@pytest.mark.slow
def test_forks_are_refused_and_harmless(tiny, tmp_path):
    """Forks made after a model was at work are refused; a model made before, but used in the fork alone, works."""
    code = FORKS.format(
        path=str(tiny.path), folder=str(tmp_path), prompts=tiny.prompts, tokens=[t[:4] for t in tiny.tokens], seconds=60
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    refused = (
        "ForkedError: a model was at work in the process that this one was forked from, and threads do not survive a "
        "fork; fork before the first model is loaded, or start the process by spawn"
    )
    right = str([t[:4] for t in tiny.tokens])
    said = [f"child: {right}", "7", *[f"child: {refused}", "7"] * 5, *["child: None", "7"] * 2, refused, "0", "True"]
    assert done.stdout.splitlines() == said


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


@pytest.mark.slow
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
