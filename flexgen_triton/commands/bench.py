"""`python -m flexgen_triton.bench`: FlexGen's benchmark, with FlexGen's flags. Without flags: the demo."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from xxhash import xxh64_hexdigest

from .. import demo
from ..arguments import as_device
from ..kernels.sizes import KV_GROUP
from ..llm import AUTO, LLM, Prompt
from ..machine.auto import predict_run
from ..machine.measure import cached_profile
from ..memory.arena import peak_rss, reset_peak_rss, rss
from ..memory.device import peak_allocated_bytes, reset_peak_allocated
from ..memory.stripes import Folders
from ..models.family import model_spec
from ..models.locate import DEMO, choose_dtype, find_sizes
from ..plan.hardware import Hardware, load_profile
from ..plan.placement import Tier
from ..plan.plan import Plan, make_plan
from ..plan.policy import CompressionConfig, Policy
from ..plan.search import Searched, modest, search
from ..plan.spec import Workload, stored_as
from ..run.trace import write_chrome_trace
from ..sequences.outputs import RequestOutput, answered
from ..sequences.params import SamplingParams
from ..utils import write_benchmark_log
from . import figures
from .command_line import invoke
from .console import console as standard_output
from .console import print_table
from .options import Command, flags_policy, is_by_hand, load_model, model_options
from .progress import Display

MAX_NAME = 220  # characters of a log's name: file systems take 255 with the ending, a digest is 16
DEBUG_MODES = ("fewer_batch", "breakdown")
FEWER_STEPS = 4  # token steps of a debug mode: prefill, and decode steps enough for a mean
STRATEGIES = {
    "sequential": {"gpu_batch_size": 4, "num_gpu_batches": 4, "overlap": False},
    "overlap, single batch": {"gpu_batch_size": 4, "num_gpu_batches": 1, "overlap": True},
    "overlap, multi-batch": {"gpu_batch_size": 4, "num_gpu_batches": 4, "overlap": True},
}


def random_prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Uniform random token ids: FlexGen's benchmark needs prompts of one length, not of any meaning."""
    generator = torch.Generator().manual_seed(seed)
    low = min(4, vocab - 1)
    ids: list[list[int]] = torch.randint(low, vocab, (count, length), generator=generator).tolist()
    return ids


def measure(
    llm: LLM,
    prompts: Sequence[Prompt],
    params: SamplingParams | list[SamplingParams],
    *,
    gen_len: int,
    hardware: Hardware | None = None,
) -> dict[str, Any]:
    """Generate and return the figures, with the answers under "outputs"; beside them what `hardware` predicts."""
    reset_peak_rss()
    weights, on_gpu = llm.engine.weights, llm.engine.device.type == "cuda"
    base = rss() - weights.host_bytes - (0 if on_gpu else weights.gpu_bytes)  # what is no part of the plan
    if on_gpu:
        reset_peak_allocated(llm.engine.device)
    outputs = answered(llm.generate(prompts, params))
    report = llm.last_report
    assert report is not None
    timeline, plans = report.timeline, report.plans
    lens = [len(o.prompt_token_ids) for o in outputs]
    placement = figures.placed(plans)
    needs = [(p.footprint.total(Tier.GPU), p.footprint.total(Tier.HOST)) for p in plans]
    on_device, on_host = max(needs, key=sum)
    return {
        "model": llm.spec.name,
        "dtype": llm.spec.dtype,
        "device": str(llm.engine.device),
        "policy": {f: getattr(llm.policy, f) for f in Policy.__slots__ if not f.startswith("comp_")},
        "prompt_len": max(lens),
        "gen_len": gen_len,
        "num_prompts": len(prompts),
        "projected": len(figures.step_seconds(report)) < gen_len,
        **figures.timing(report, prompt_tokens=sum(lens), num_prompts=len(prompts), gen_len=gen_len),
        "peak_gpu_bytes": peak_allocated_bytes(llm.engine.device) if on_gpu else 0,
        "peak_host_bytes": peak_rss(),
        "planned_host_bytes": base + on_host + (0 if on_gpu else on_device),
        "pinned_bytes": on_host if on_gpu else 0,
        "model_bytes": llm.engine.spec.weight_bytes,
        "cache_bytes": sum(placement["cache"].values()),
        "hidden_bytes": sum(placement["activations"].values()),
        "placement": placement,
        "lanes": figures.lanes_json(timeline),
        "makespan_s": timeline.makespan_s,
        "bound_s": timeline.bound_s,
        "bytes_loaded": llm.engine.weights.bytes_loaded,
        "predicted": figures.predicted_json(predict_run(report, hardware), hardware) if hardware else None,
        "outputs": outputs,
    }


def run_demo(console: Console, offload_dir: Sequence[Path]) -> dict[str, Any]:
    """The shipped model on the shipped prompts, weights on disk, cache on the host, under the three strategies."""
    prompts, gen_len = demo.prompts(), 32
    params = [SamplingParams(max_tokens=gen_len, temperature=0.7, seed=n, ignore_eos=True) for n in range(len(prompts))]
    results: dict[str, dict[str, Any]] = {}
    for name, settings in STRATEGIES.items():
        policy = Policy(w_gpu_percent=0, cache_gpu_percent=0, cache_cpu_percent=100, **settings)  # type: ignore[arg-type]
        with Display() as bars, LLM(DEMO, policy=policy, offload_dir=offload_dir, progress=bars.phase) as llm:
            results[name] = measure(llm, prompts, params, gen_len=gen_len)
    answers = {name: [o.outputs[0].token_ids for o in r["outputs"]] for name, r in results.items()}
    first = next(iter(results.values()))
    for output in first["outputs"][:6]:
        console.print(f"[bold]{escape(output.prompt or '')}[/]{escape(output.outputs[0].text)}", highlight=False)
    agree = all(a == answers["sequential"] for a in answers.values())
    if not agree:
        raise RuntimeError("the three strategies disagree; this is a bug, please report it")
    console.print(f"\nThe three strategies agree on all {len(prompts) * gen_len} tokens.")
    print_strategies(console, results)
    return {name: {k: v for k, v in r.items() if k != "outputs"} for name, r in results.items()}


def print_strategies(console: Console, results: Mapping[str, Mapping[str, Any]]) -> None:
    """A row per strategy: how fast it was, and how near to its bound."""
    table = Table(title="demo model: weights on disk, cache on the host")
    for heading in ("strategy", "prefill tok/s", "decode tok/s", "total tok/s", "makespan s", "makespan / bound"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    for name, r in results.items():
        rates = (f"{r[key]:.1f}" for key in ("prefill_tok_s", "decode_tok_s", "total_tok_s"))
        table.add_row(name, *rates, f"{r['makespan_s']:.2f}", f"{r['makespan_s'] / r['bound_s']:.2f}")
    print_table(console, table)


def dry_plan(
    model: str, path: str | None, dtype: str, policy: Policy, prompt_len: int, gen_len: int, *, host_is_apart: bool
) -> Plan:
    """The plan as it would be run with weights in a store of our own; touches nothing."""
    source = find_sizes(model, path)
    spec = stored_as(model_spec(source.config, source.name, choose_dtype(dtype, source)), policy)
    workload = Workload.uniform(prompt_len, gen_len, policy.gpu_batch_size, policy.num_gpu_batches)
    return make_plan(spec, policy, workload, host_is_apart=host_is_apart)


def show(console: Console, llm: LLM, result: dict[str, Any], *, verbose: int) -> None:
    report = llm.last_report
    assert report is not None
    outputs: list[RequestOutput] = result["outputs"]
    for output in outputs if verbose > 2 else (outputs[:1] + outputs[1:][-1:]) * (verbose == 2):
        if output.outputs[0].text:
            console.print(
                f"{output.request_id}: [bold]{escape(output.prompt or '...')}[/]{escape(output.outputs[0].text)}"
            )
    figures.print_plan(console, report.plans[0])
    figures.print_lanes(console, report.timeline, result["predicted"])
    console.print(figures.summary(result), highlight=False)


def log_name(model: str, policy: Policy, *, prompt_len: int, gen_len: int) -> str:
    """The automatic name of a run's log, without its ending: FlexGen's, and every setting that is not the default.

    No two policies have the same name; the formats of what is not compressed are no part of a policy. A name that a
    file system would refuse is cut, and ends in a digest of all of it.
    """
    p = policy
    percent = "-".join(map(_number, p.percent))
    size = f"gbs{p.gpu_batch_size}-ngbs{p.num_gpu_batches}-prompt{prompt_len}-gen{gen_len}"
    marks = [
        "cpu-cache" if p.cpu_cache_compute else "gpu-cache",
        *(["compw", *_format_marks(p.comp_weight_config, 0)] if p.compress_weight else ()),
        *(["compc", *_format_marks(p.comp_cache_config, 2)] if p.compress_cache else ()),
        *([f"sparse{_number(p.attn_sparsity)}"] if p.attn_sparsity < 1 else ()),
        *([f"attended{_number(p.cpu_attention_percent)}"] if p.cpu_attention_percent < 100 else ()),
        *(["open"] if p.keep_open_pages else ()),
        *(name for name, is_on in (("noov", p.overlap), ("nosep", p.sep_layer), ("nopin", p.pin_weight)) if not is_on),
    ]
    name = "-".join((f"fo-{model.rsplit('/', 1)[-1]}", size, "percent", percent, *marks))
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}-{xxh64_hexdigest(name.encode())}"


def _format_marks(config: CompressionConfig, dim: int) -> Iterator[str]:
    """Name each setting of a 4-bit format that is not the default."""
    if config.group_size != KV_GROUP:
        yield f"group{config.group_size}"
    if config.group_dim != dim:
        yield f"dim{config.group_dim}"
    if not config.enabled:
        yield "off"


def _number(value: float) -> str:
    """A number as it is, without the ".0" of a whole one."""
    return str(int(value)) if value == int(value) else repr(float(value))


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@model_options
@click.option("--prompt-len", type=click.IntRange(1), default=512, show_default=True)
@click.option("--gen-len", type=click.IntRange(1), default=32, show_default=True)
@click.option("--cut-gen-len", type=click.IntRange(2), help="Run this many token steps and project the rest.")
@click.option(
    "--debug-mode",
    type=click.Choice(DEBUG_MODES),
    help=f"fewer_batch: {FEWER_STEPS} token steps, the rest projected; breakdown: that without overlap, lane by lane.",
)
@click.option("--num-prompts", type=click.IntRange(1), help="With an automatic policy; by default one round.")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A prompt a line.")
@click.option(
    "--max-latency",
    type=click.FloatRange(0, min_open=True),
    help="Seconds that a round may take under an automatic policy.",
)
@click.option("--log-file", default="auto", show_default=True)
@click.option("--no-log", is_flag=True)
@click.option("--verbose", type=int, default=2, show_default=True, help="2: the first and the last text; 3: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write a Chrome/Perfetto trace here.")
@click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Measure generation under one policy, with FlexGen's flags; without any, run the shipped demo."""
    console = standard_output()
    given = {name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if given <= {"offload_dir"}:
        run_demo(console, options["offload_dir"])
        return
    by_hand = is_by_hand(context, options["policy"])
    run(console, by_hand=by_hand, **options)


def run(console: Console, *, by_hand: bool, **o: Any) -> None:
    """One benchmark run, as the flags say."""
    if o["dry_run"] and (o["debug_mode"] or o["cut_gen_len"]):  # FlexGen's published commands have them
        click.echo("--debug-mode and --cut-gen-len cut a run, and this is none: the plan is of the whole run", err=True)
    o = debugged(o)
    policy = flags_policy(o)
    if by_hand and o["dry_run"]:
        hardware, host_is_apart = dry_machine(o)
        shape = (o["prompt_len"], o["gen_len"])
        plan = dry_plan(o["model"] or DEMO, o["path"], o["dtype"], policy, *shape, host_is_apart=host_is_apart)
        figures.dry_run(console, plan, hardware, o["json_file"])
        return
    with Display() as bars, load_model(o, policy if by_hand else AUTO, bars.phase) as llm:
        prompts: Sequence[Prompt] = read_prompts(o["prompts"]) if o["prompts"] else ()
        if not by_hand:
            searched = find_policy(llm, prompts, o)
            best = searched.best if prompts or o["num_prompts"] else modest(searched)
            with bars.aside():
                figures.print_found(console, best, searched)
                if o["dry_run"]:
                    figures.dry_run(console, best.plan, searched.hardware, o["json_file"])
                    return
            llm.use(best.policy)
        count = o["num_prompts"] or llm.policy.round_size
        prompts = prompts or random_prompts(count, o["prompt_len"], llm.spec.vocab, o["seed"])
        params = SamplingParams(
            max_tokens=min(o["cut_gen_len"] or o["gen_len"], o["gen_len"]), ignore_eos=True, temperature=0
        )
        result = measure(llm, prompts, params, gen_len=o["gen_len"], hardware=profile_of(llm, o["hardware"], by_hand))
        bars.hide()
        write_results(console, llm, result, o)


def debugged(o: dict[str, Any]) -> dict[str, Any]:
    """The options as `--debug-mode` changes them: both cut the run, "breakdown" does without overlap as well."""
    if o["debug_mode"] is None:
        return o
    cut = FEWER_STEPS if o["cut_gen_len"] is None else o["cut_gen_len"]
    return {**o, "cut_gen_len": cut, "overlap": o["overlap"] and o["debug_mode"] != "breakdown"}


def dry_machine(o: Mapping[str, Any]) -> tuple[Hardware | None, bool]:
    """The machine that a dry run's plan is for, as far as it is known, and whether host memory is apart there."""
    device = as_device(o["device"])
    hardware = load_profile(o["hardware"]) if o["hardware"] else None
    if hardware is None:
        hardware = cached_profile(Folders.of(o["offload_dir"]), device)
    host_is_apart = o["copies"]
    if host_is_apart is None:
        host_is_apart = hardware.host_is_apart if o["hardware"] and hardware else device.type == "cuda"
    return hardware, host_is_apart


def read_prompts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}; save it as UTF-8") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; it needs at least one line of text")
    return prompts


def find_policy(llm: LLM, prompts: Sequence[Prompt], o: Mapping[str, Any]) -> Searched:
    """The best policies for the prompts, or for as many of `--prompt-len` as pay."""
    lens = [len(llm.token_ids(p)) for p in prompts] or [o["prompt_len"]]
    count = len(prompts) or o["num_prompts"]
    problem = llm.problem(lens, o["gen_len"], count, max_latency=o["max_latency"])
    return search(problem, llm.hardware)


def profile_of(llm: LLM, asked: str | None, by_hand: bool) -> Hardware | None:
    """The profile to predict a run with; None where this machine was never measured and need not be."""
    if asked is None and by_hand:
        return cached_profile(llm.folders, llm.engine.device)
    return llm.hardware


def write_results(console: Console, llm: LLM, result: dict[str, Any], o: dict[str, Any]) -> None:
    """Print the figures and write the files that were asked for."""
    assert llm.last_report is not None
    show(console, llm, result, verbose=o["verbose"])
    del result["outputs"]
    if o["json_file"]:
        o["json_file"].write_text(json.dumps(result, indent=1))
    if o["trace"]:
        write_chrome_trace(llm.last_report.timeline, o["trace"])
    if not o["no_log"]:
        shape = {name: result[name] for name in ("prompt_len", "gen_len")}
        name = f"{log_name(llm.spec.name, llm.policy, **shape)}.log" if o["log_file"] == "auto" else o["log_file"]
        write_benchmark_log(name, *figures.logged(result))


def main() -> None:
    invoke(command)
