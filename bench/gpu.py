"""Every check that needs a GPU, in one command: `python bench/gpu.py`.

The links' rates, the kernels (kernel_speed.py), then correctness (tokens under every kind of policy against
transformers' on the CPU, in fp32; no allocation while decoding), then the engine under policies from all-resident to
all-offloaded, each judged by its own bound. `bench/peers.py` runs there too.
Results go to bench/results/<machine>/gpu-<commit>.json (or `--out`), after every check, so that a run that is cut short
keeps what it has. Exits with 2 where there is no GPU and with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import rows
import torch

sys.path.insert(0, str(rows.ROOT))
sys.path.insert(0, str(rows.ROOT / "tests"))

import kernel_speed

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.commands.bench import random_prompts
from flexgen_triton.commands.figures import lanes_json, predicted_json, timing
from flexgen_triton.commands.options import policy_flags
from flexgen_triton.machine.auto import predict_run
from flexgen_triton.machine.measure import measure
from flexgen_triton.memory.arena import Arena
from flexgen_triton.memory.stripes import Folders
from flexgen_triton.plan.hardware import Hardware
from flexgen_triton.plan.placement import Tier
from flexgen_triton.plan.schedule import COMPUTE, Op
from flexgen_triton.plan.spec import HEAD
from flexgen_triton.run.actions import ACTIONS, Round
from flexgen_triton.sequences.sequence import TokenSequence

if TYPE_CHECKING:
    from tiny_models import Tiny

GIB = 1 << 30
CUDA = torch.device("cuda")
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Case:
    """One engine run: model, policy and shape."""

    model: str
    policy: Policy
    prompt_len: int
    gen_len: int
    gpu_memory: str | None = None

    @property
    def name(self) -> str:
        limit = (f"within {self.gpu_memory}",) if self.gpu_memory else ()
        return " ".join((self.model, f"{self.prompt_len}/{self.gen_len}", *policy_flags(self.policy), *limit))


HEADLINE = Policy(48, 3, 20, 80, 0, 100, 0, 100, cpu_cache_compute=True)  # FlexGen's for OPT-30B (ICML 2023, table 2)
CASES = (
    Case("opt-1.3b", Policy(64, 1, 100, 0, 100, 0, 100, 0), 128, 32),
    Case("opt-1.3b", Policy(64, 4, 0, 100, 100, 0, 100, 0), 128, 32),
    Case("opt-1.3b", Policy(64, 4, 0, 100, 0, 100, 0, 100), 128, 32),
    Case("opt-1.3b", Policy(64, 4, 0, 0, 0, 100, 0, 100), 128, 16),
    Case("opt-6.7b", Policy(64, 4, 0, 100, 100, 0, 100, 0), 256, 32),
    Case("opt-6.7b", Policy(48, 3, 20, 80, 0, 100, 0, 100), 512, 32),
    Case("opt-6.7b", Policy(48, 3, 20, 80, 0, 100, 0, 100, overlap=False), 512, 8),
    Case("opt-6.7b", Policy(48, 3, 20, 80, 0, 100, 0, 100, pin_weight=False), 512, 8),
    Case("opt-6.7b", Policy(48, 3, 20, 80, 0, 100, 0, 100, compress_weight=True), 512, 32),
    Case("opt-6.7b", Policy(48, 3, 20, 80, 0, 100, 0, 100, compress_weight=True, compress_cache=True), 512, 32),
    Case("opt-6.7b", Policy(48, 3, 20, 80, 0, 100, 0, 100, attn_sparsity=0.1), 512, 16),
    Case("opt-6.7b", Policy(16, 1, 100, 0, 100, 0, 100, 0, compress_weight=True, compress_cache=True), 512, 32),
    Case("opt-6.7b", HEADLINE, 512, 32),
    Case("opt-6.7b", replace(HEADLINE, cpu_attention_percent=50), 512, 32),
    Case("opt-6.7b", replace(HEADLINE, cpu_attention_percent=50, keep_open_pages=True), 512, 32),
    Case("opt-6.7b", replace(HEADLINE, compress_cache=True), 512, 32),
    Case("opt-6.7b", replace(HEADLINE, attn_sparsity=0.1), 512, 32),
    # FlexGen's prompts have 512 tokens; with 256, weights and cache fit 128 GB of host memory
    Case("opt-30b", HEADLINE, 256, 32, gpu_memory="16GiB"),
)


def copy_rate(target: torch.Tensor, source: torch.Tensor, repeats: int = 8) -> float:
    """Bytes a second of one copy, by device events, the best of several."""
    best = float("inf")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return len(source) / best


def links() -> Iterator[rows.Row]:
    """Rates of the links through the engine's own arenas: what later runs are judged by."""
    with Arena("host", GIB, torch.device("cpu"), pin=True) as host, Arena("device", GIB, CUDA) as device:
        host.buffer.random_()
        yield rows.Row("host to device, pinned", copy_rate(device.buffer, host.buffer) / 1e9, "GB/s")
        yield rows.Row("device to host, pinned", copy_rate(host.buffer, device.buffer) / 1e9, "GB/s")
        with Arena("other", GIB, CUDA) as other:
            rate = 2 * copy_rate(other.buffer, device.buffer) / 1e9
            yield rows.Row("device to device, read and written", rate, "GB/s")


WAYS: tuple[dict[str, Any], ...] = (  # of attending to what the host holds
    {"cpu_cache_compute": True},
    {"cpu_cache_compute": True, "cpu_attention_percent": 40, "keep_open_pages": True},
)


def correctness(scratch: Path) -> Iterator[rows.Row]:
    """Greedy tokens of tiny fp32 models under mixed policies, all of them transformers' own."""
    from tiny_models import MODELS, NEW_TOKENS, make_tiny

    torch.backends.cuda.matmul.allow_tf32 = False
    percents = ((100, 0, 100, 0, 100, 0), (0, 100, 0, 100, 0, 100), (0, 0, 0, 0, 0, 0), (20, 30, 25, 30, 40, 30))
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
    for n, (name, fields) in enumerate(MODELS.items()):
        tiny = make_tiny(scratch / f"opt-{n}", fields)
        right = total = 0
        for percent in percents:
            for num_batches, overlap, sep_layer, pin in (
                (1, True, True, True),
                (3, True, False, False),
                (2, False, True, True),
            ):
                plain = Policy(2, num_batches, *percent, overlap=overlap, sep_layer=sep_layer, pin_weight=pin)
                for policy in (plain, *(replace(plain, **way) for way in WAYS)):
                    with LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=scratch, device="cuda") as llm:
                        outputs = llm.generate(tiny.prompts, params)
                    right += sum(o.outputs[0].token_ids == want for o, want in zip(outputs, tiny.tokens, strict=True))
                    total += len(tiny.prompts)
        yield rows.Row(f"tokens equal to transformers': {name}", right / total, "share", roof=1.0, share=right / total)


FORMATS = {  # 4-bit weights, 4-bit cache, share of V
    "4-bit weights": (True, False, 1.0),
    "4-bit cache": (False, True, 1.0),
    "20 % of V": (False, False, 0.2),
    "4-bit weights and cache, 10 % of V": (True, True, 0.1),
}


def compression(scratch: Path) -> Iterator[rows.Row]:
    """Tokens in fp32 and logits in fp16, against a plain model whose numbers went through the format's references.

    In fp16 a row of logits is right when its error is within 4 times that of the plain model rounded to fp16.
    """
    from reference_opt import Options, ReferenceOPT
    from tiny_models import MODELS, NEW_TOKENS, make_tiny

    torch.backends.cuda.matmul.allow_tf32 = False
    for n, (name, fields) in enumerate(MODELS.items()):
        tiny = make_tiny(scratch / f"formats-{n}", fields)
        for fmt, (weights, cache, sparsity) in FORMATS.items():
            options = Options(weight_group=64 if weights else None, kv_quantised=cache, sparsity=sparsity)
            plain, rounded = (ReferenceOPT.load(tiny.path, replace(options, dtype=d)) for d in DTYPES.values())
            want = [plain.generate(p, NEW_TOKENS)[0] for p in tiny.prompts]
            fits = {"compress_weight": weights, "compress_cache": cache, "attn_sparsity": sparsity}
            policies = [Policy(3, 2, *p, **fits) for p in ((100, 0, 100, 0, 100, 0), (20, 30, 25, 40, 40, 30))]
            policies += [replace(policies[1], **way) for way in WAYS]
            tokens, logits = [], []
            for policy in policies:
                tokens += [got == w for (got, _), w in zip(run(tiny, policy, "float32", scratch), want, strict=True)]
                for prompt, (got, rows_) in zip(tiny.prompts, run(tiny, policy, "float16", scratch), strict=True):
                    ids = torch.tensor(prompt + got[:-1])
                    exact, near = (m.score(ids, len(prompt))[len(prompt) - 1 :] for m in (plain, rounded))
                    allowed = 4 * (near - exact).abs().max()
                    logits += [bool((a - b).abs().max() <= allowed) for a, b in zip(rows_, exact, strict=True)]
            for what, right in (("tokens, fp32", tokens), ("logits, fp16", logits)):
                share = sum(right) / len(right)
                yield rows.Row(f"{what}: {name}, {fmt}", share, "share", roof=1.0, share=share)


def front_door(scratch: Path) -> Iterator[rows.Row]:
    """Streams, sampling on the device, log-probabilities, and engines made and closed, as the tests do on a CPU."""
    from tiny_models import MODELS, make_tiny

    name = next(iter(MODELS))
    tiny = make_tiny(scratch / "front-door", MODELS[name])
    params = [
        SamplingParams(max_tokens=3 + n, seed=n, top_p=0.9, top_k=40, repetition_penalty=1.1, logprobs=2,
                       prompt_logprobs=2, ignore_eos=True)
        for n in range(len(tiny.prompts))
    ]  # fmt: skip
    answers = []
    policies = (Policy(7, 1), Policy(2, 2, 0, 50, 0, 50, 50, 50), Policy(3, 2, 20, 30, 25, 30, 40, 30))
    for policy in policies:
        with LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=scratch, device="cuda") as llm:
            outputs = sorted(llm.stream(zip(tiny.prompts, params, strict=True)), key=lambda o: o.request_id)
        answers.append([o.outputs[0].token_ids for o in outputs])
        scored = [list(o.prompt_logprobs or ()) for o in outputs]
        given = [len(s) == len(p) and all(s[1:]) for s, p in zip(scored, tiny.prompts, strict=True)]
        share = sum(given) / len(given)
        yield rows.Row(f"prompts scored, {policy.gpu_batch_size} at a time", share, "share", roof=1.0, share=share)
    same = [a == b == c for a, b, c in zip(*answers, strict=True)]
    yield rows.Row("seeded samples, any policy", sum(same) / len(same), "share", roof=1.0, share=sum(same) / len(same))
    held = []
    for _ in range(20):
        with LLM(str(tiny.path), policy=policies[2], dtype="float32", offload_dir=scratch, device="cuda") as llm:
            list(llm.stream((p, SamplingParams(max_tokens=2, temperature=0)) for p in tiny.prompts[:3]))
        held.append(torch.cuda.memory_allocated())
    kept = float(held[-1] == held[4])
    yield rows.Row("20 engines leave no GPU memory", kept, "share", roof=1.0, share=kept, note=f"{held[-1]} bytes")


def allocations(scratch: Path) -> Iterator[rows.Row]:
    """Decoding takes no memory from torch's allocator: its counter before and after every layer of a token step.

    From step 2 on: in the first, products of 4 bits and cuBLAS set their workspaces aside. Sparse attention is left
    out, whose top-k and log-sum-exp are torch's.
    """
    from tiny_models import MODELS, NEW_TOKENS, make_tiny

    tiny = make_tiny(scratch / "allocations", next(iter(MODELS.values())))
    greedy = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
    compute = ACTIONS[COMPUTE]
    for fmt, (weights, cache, sparsity) in {"16 bits": (False, False, 1.0), **FORMATS}.items():
        if sparsity < 1:
            continue
        layers, heads = Counter[int](), Counter[int]()

        def counted(round_: Round, op: Op, layers: Counter[int] = layers, heads: Counter[int] = heads) -> None:
            before = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
            compute(round_, op)
            counts = heads if round_._plan.stages[op.j].spec.kind == HEAD else layers
            counts[op.i] += torch.cuda.memory_stats()["allocation.all.allocated"] - before

        policy = Policy(3, 2, 20, 30, 25, 30, 40, 30, compress_weight=weights, compress_cache=cache)
        with (
            patch.dict(ACTIONS, {COMPUTE: counted}),
            LLM(str(tiny.path), policy=policy, dtype="float16", offload_dir=scratch, device="cuda") as llm,
        ):
            llm.generate(tiny.prompts, greedy)
        steps = range(2, NEW_TOKENS)
        share = sum(not layers[i] for i in steps) / len(steps)
        note = f"layers {[layers[i] for i in steps]}, head and sampler {[heads[i] for i in steps]}"
        yield rows.Row(f"token steps without an allocation: {fmt}", share, "share", roof=1.0, share=share, note=note)


def run(tiny: Tiny, policy: Policy, dtype: str, scratch: Path) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy tokens of every prompt and their logits [tokens, V], on the GPU."""
    from tiny_models import NEW_TOKENS

    requests = [
        TokenSequence(list(p), SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0))
        for p in tiny.prompts
    ]
    seen: dict[int, list[torch.Tensor]] = {id(r): [] for r in requests}

    def keep(batch: Sequence[TokenSequence], logits: torch.Tensor) -> None:
        for request, row in zip(batch, logits.cpu(), strict=True):
            seen[id(request)].append(row)

    with LLM(str(tiny.path), policy=policy, dtype=dtype, offload_dir=scratch, device="cuda") as llm:
        llm.engine.generate(requests, keep_logits=keep)
    return [(r.tokens, torch.stack(seen[id(r)])) for r in requests]


def engine(case: Case, store: Path, hardware: Hardware | None = None) -> rows.Row:
    """Throughput of one case, judged by the busiest lane of the same run."""
    limit = {"gpu_memory": case.gpu_memory} if case.gpu_memory else {}
    with LLM(case.model, path="_DUMMY_", policy=case.policy, offload_dir=store, device="cuda", **limit) as llm:
        prompts = random_prompts(case.policy.round_size, case.prompt_len, llm.spec.vocab, 0)
        llm.generate(prompts[:2], SamplingParams(max_tokens=2, ignore_eos=True, temperature=0))
        torch.cuda.reset_peak_memory_stats()
        llm.generate(prompts, SamplingParams(max_tokens=case.gen_len, ignore_eos=True, temperature=0))
        report = llm.last_report
        assert report is not None
        figures = timing(
            report, prompt_tokens=len(prompts) * case.prompt_len, num_prompts=len(prompts), gen_len=case.gen_len
        )
        timeline = report.timeline
        share = timeline.bound_s / timeline.makespan_s
        predicted = predicted_json(predict_run(report, hardware), hardware) if hardware else None
        details = {
            **figures,
            "predicted": predicted,
            "makespan_s": timeline.makespan_s,
            "bound_s": timeline.bound_s,
            "lanes": lanes_json(timeline),
            "planned_gpu_bytes": report.plans[0].footprint.total(Tier.GPU),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        }
    rate = figures["total_tok_s"]
    note = f"predicted {predicted['total_s']:.2f} s, took {timeline.makespan_s:.2f}" if predicted else ""
    return rows.Row(case.name, rate, "tok/s", roof=rate / share, share=share, details=details, note=note)


def profile(scratch: Path) -> tuple[Hardware, rows.Row]:
    """The machine as `python -m flexgen_triton measure` sees it: what the runs below are predicted from."""
    began = time.perf_counter()
    hardware = measure(CUDA, Folders.of(scratch))
    took = time.perf_counter() - began
    return hardware, rows.Row("machine measured", took, "s", details={"profile": json.loads(hardware.to_json())})


class Recorder:
    """Rows as they come: printed, and written to the result file each time."""

    def __init__(self, path: Path | None) -> None:
        self._header = rows.make_header()
        self._path = path or rows.results_path("gpu", self._header)
        self._rows: list[rows.Row] = []
        self.failed = False

    def add(self, row: rows.Row) -> None:
        self._rows.append(row)
        self.failed |= row.unit == "share" and row.share != 1.0
        value = "no figure" if row.value is None else f"{row.value:.4g} {row.unit}"
        share = f", {row.share:.0%} of the roof" if row.share is not None else ""
        print(f"{row.name}: {value}{share} {row.note}", flush=True)
        rows.write_results(self._path, self._rows, self._header)

    def attempt(self, name: str, check: Callable[[], Iterator[rows.Row]]) -> None:
        """Run one check; what it raises is a failed row, and the others still run."""
        began = time.perf_counter()
        try:
            for row in check():
                self.add(row)
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            self.failed = True
            notes = " ".join(getattr(error, "__notes__", ()))
            self.add(rows.Row(name, None, "", note=rows.without_folders(f"{type(error).__name__}: {error} {notes}")))
        print(f"  ({name}: {time.perf_counter() - began:.0f} s)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Every check that needs a GPU.")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("--scratch", type=Path, help="where random weights are made, 16 GB of them")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was checked", file=sys.stderr)
        return 2
    recorder = Recorder(arguments.out)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        recorder.attempt("links", links)
        recorder.attempt("kernels", kernel_speed.rows)
        recorder.attempt("correctness", lambda: correctness(scratch))
        recorder.attempt("compression", lambda: compression(scratch))
        recorder.attempt("front door", lambda: front_door(scratch))
        recorder.attempt("allocations", lambda: allocations(scratch))
        found: list[Hardware] = []

        def measured() -> Iterator[rows.Row]:
            hardware, row = profile(scratch)
            found.append(hardware)
            yield row

        recorder.attempt("measure", measured)
        hardware = found[0] if found else None
        for case in CASES:
            recorder.attempt(case.name, lambda case=case: iter([engine(case, scratch / "store", hardware)]))
    return int(recorder.failed)


if __name__ == "__main__":
    raise SystemExit(main())
