"""The automatic policy: this machine's profile, its limits, and when a policy that is in use is good enough to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..memory.arena import Resident, rss
from ..memory.stripes import Folders
from ..models import ops
from ..plan.fit import amount, fits
from ..plan.hardware import Hardware, load_profile
from ..plan.policy import Policy, PolicyError
from ..plan.predict import DECODE, PREFILL, Prediction, predict
from ..plan.problem import Problem, available
from ..plan.search import modest, search
from ..plan.spec import ModelSpec, stored_as
from ..run.engine import Limits
from ..run.report import RunReport
from ..run.running import check_process
from ..run.totals import Choice
from .measure import MEASURING_BYTES, cached_profile, load_or_measure

KEEP = 0.9  # a policy in use this near to the best is kept: another one means loading all weights anew


def machine(
    device: torch.device,
    folders: Folders,
    limits: Limits,
    *,
    profile: Hardware | str | Path | None = None,
    copies: bool | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Hardware:
    """The machine to plan for: a profile as given, or this machine's, measured on first use; within the limits.

    Raises HardwareError for a profile that cannot be read, PolicyError for a limit on a GPU that is not there and for
    one on the host's memory that leaves no room to measure in.
    """
    if profile is None:
        if limits.host is not None and cached_profile(folders, device) is None:
            _check_room(limits.host)
        hardware = load_or_measure(device, folders, progress)
    else:
        hardware = profile if isinstance(profile, Hardware) else load_profile(profile)
    if copies and not hardware.host_is_apart:  # on a CPU, as if host memory were apart: half of it is the device's
        half = hardware.host_bytes // 2
        hardware = replace(hardware, host_is_apart=True, gpu_bytes=half, host_bytes=half)
    if limits.gpu is not None and not hardware.host_is_apart:
        raise PolicyError("a limit on GPU memory was given, but there is no GPU here; limit the host's memory")
    return hardware.capped(limits.gpu, limits.host, limits.disk)


def _check_room(limit: int) -> None:
    """Raise PolicyError where measuring the machine takes more than the limit."""
    takes = rss() + MEASURING_BYTES
    if takes > limit:
        raise PolicyError(
            f"this machine was not measured yet, which takes {amount(takes)} of memory once, and the limit is "
            f"{amount(limit)}; run `python -m flexgen_triton measure` first, or name a profile with --hardware"
        )


def settled(model: ModelSpec, base: Policy, device: torch.device) -> Resident:
    """Bytes that this process has before it searches, the kernels loaded that a run needs.

    A profile knows only what another process took, which had loaded them for every format. Raises ForkedError in a
    fork of a process that computed.
    """
    check_process()
    if device.type == "cpu" or base.cpu_cache_compute:
        spec = stored_as(model, base)
        ops.prepare(spec, base.cache_format.fields(spec.dtype, spec.head_dim), sparse=base.attn_sparsity < 1)
    return Resident.now()


def choose(problem: Problem, hardware: Hardware, current: Policy | None = None) -> Choice:
    """The best policy for a problem, or the current one where it fits and is predicted nearly as fast.

    Of prompts without number, the one with the smallest round that is nearly the best: answers come sooner.

    Raises PolicyError when no policy fits.
    """
    searched = search(problem, hardware)
    found = searched.best if problem.num_prompts else modest(searched)
    best = _choice(found.policy, found.tokens_per_s, found.prediction)
    if current is None or current == best.policy:
        return best
    plan = problem.plan(current, host_is_apart=hardware.host_is_apart)
    if not fits(plan, available(hardware, problem)):
        return best
    prediction = predict(plan, hardware)
    throughput = problem.throughput(current, prediction.total_s)
    return _choice(current, throughput, prediction) if throughput >= KEEP * best.tokens_per_s else best


def _choice(policy: Policy, tokens_per_s: float, prediction: Prediction) -> Choice:
    busiest = prediction.busiest(DECODE) or prediction.busiest(PREFILL)  # one token asks for no decoding
    return Choice(policy, tokens_per_s, busiest)


def predict_run(report: RunReport, hardware: Hardware) -> Prediction:
    """Predict the time that the rounds of a run take together."""
    return Prediction.sum([predict(plan, hardware) for plan in report.plans])


def typical_length(lens: Sequence[int]) -> int:
    """One prompt length that stands for many: the mean of the longer half, which the first round is made of."""
    longest = sorted(lens, reverse=True)[: -(-len(lens) // 2)]
    return -(-sum(longest) // len(longest))
