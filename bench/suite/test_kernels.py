"""The kernels that decide throughput, on a GPU: rate beside the roof of the same run."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("the kernels' speed needs a GPU", allow_module_level=True)

import kernel_speed as ks

OPT_30B = ks.MODELS[0]
PROBLEMS = (
    ks.linear(OPT_30B, "fc1", 1),
    ks.linear(OPT_30B, "fc1", 16),
    ks.linear(OPT_30B, "fc1", 128),
    ks.linear(OPT_30B, "fc1", 1024),
    ks.dequantize(OPT_30B, "fc1"),
    ks.decode_16bit(OPT_30B, 32, 1024),
    ks.decode_4bit(OPT_30B, 32, 1024),
    ks.decode_sparse(OPT_30B, 32, 1024),
    ks.prefill(OPT_30B, 16, 1024),
)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_kernel(benchmark, judge, problem):
    """The time that pytest-benchmark takes includes the launch; the rate that is judged is the device's."""
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.float16
    timer = ks.DeviceTimer(device)
    roofs = ks.measure_roofs(timer, device, dtype)
    setup = problem.make(device, dtype)

    def run() -> None:
        setup.call()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=3)
    row = ks.make_row(problem, timer(setup.call), {}, roofs)
    judge(row.value, row.unit, row.roof)
