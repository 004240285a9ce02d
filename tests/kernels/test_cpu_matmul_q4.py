"""Products with 4-bit weights on the CPU equal products with the numbers the weights stand for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from flexgen_triton.kernels.cpu import matmul_q4 as cpu_matmul_q4
from flexgen_triton.kernels.cpu.matmul_q4 import CROSSOVER_ROWS, dequantize, linear_q4, matmul_q4, matmul_q4_ref
from flexgen_triton.kernels.formats import dequantize_weight, quantize_weight
from flexgen_triton.kernels.sizes import BLOCK_ROWS

NAN = float("nan")
SHAPES = {  # M, N, K, G
    "minimal": (1, 1, 1, 64),
    "no rows of x": (0, 3, 64, 64),
    "one block": (1, 256, 128, 64),
    "two blocks and a bit, K not of groups": (3, 513, 1000, 128),
    "small groups": (2, 300, 96, 32),
    "every tile": (7, 257, 200, 64),
    "below the crossover": (CROSSOVER_ROWS - 1, 5, 130, 64),
    "above the crossover": (CROSSOVER_ROWS + 1, 259, 130, 64),
}


def make(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x, codes and scales; what no output may read is NaN, what no output may write as well."""
    num_rows, rows, columns, group = shape
    torch.manual_seed(0)
    x = torch.full((num_rows, columns + 3), NAN)
    x[:, :columns] = torch.randn(num_rows, columns)
    codes, scales = quantize_weight(torch.randn(rows, columns), group)
    spare = len(codes) * BLOCK_ROWS - rows
    if spare:
        codes[-1, :, -spare:] = -1
        scales[-1, :, :, -spare:] = NAN
    return x[:, :columns], codes, scales


def grouped_product(x: Tensor, codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    """Compute the kernel's result in plain fp32: sums over groups, times the scale, plus the minimum's part."""
    groups = scales.shape[1]
    plain = torch.tensor([1.0, 0.0], dtype=torch.float16).view(1, 1, 2, 1).expand(scales.shape)
    q = dequantize_weight(codes, plain, rows, 4 * codes.shape[1], torch.float32).view(rows, groups, -1)
    xs = torch.nn.functional.pad(x, (0, 4 * codes.shape[1] - x.shape[1])).unflatten(1, (groups, -1))
    scale, low = scales.float().permute(2, 0, 3, 1).flatten(1, 2)[:, :rows]  # [N, K/G] each
    return (torch.einsum("mgk,ngk->mng", xs, q) * scale + xs.sum(-1)[:, None] * low).sum(-1)


def exact_product(x: Tensor, codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    return x.double() @ dequantize_weight(codes, scales, rows, x.shape[1], torch.float64).T


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@pytest.mark.parametrize("multiply", [matmul_q4, linear_q4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_product_is_as_exact_as_plain_fp32(multiply, shape):
    x, codes, scales = make(shape)
    num_rows, rows = len(x), shape[1]
    board = torch.full((num_rows, rows + 2), NAN)
    multiply(x, codes, scales, rows, board[:, 1:-1])
    exact = exact_product(x, codes, scales, rows)
    error = largest(board[:, 1:-1] - exact)
    assert error <= 2 * largest(grouped_product(x, codes, scales, rows) - exact) + 1e-6 * largest(exact)
    assert board[:, 0].isnan().all() and board[:, -1].isnan().all()


def test_reference_is_the_exact_product_in_fp32():
    x, codes, scales = make((3, 300, 130, 64))
    exact = exact_product(x, codes, scales, 300)
    assert largest(matmul_q4_ref(x, codes, scales, 300) - exact) < 1e-5 * largest(exact)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_dequantised_panel_is_the_format_s_own(group):
    codes, scales = quantize_weight(torch.randn(300, 400), group)
    columns = 4 * codes.shape[1]
    panel = torch.full((columns, 2 * BLOCK_ROWS), NAN)
    dequantize(codes, scales, panel)
    assert torch.equal(panel.T, dequantize_weight(codes, scales, 2 * BLOCK_ROWS, columns, torch.float32))


def test_blocks_may_lie_apart():
    x, codes, scales = make((2, 512, 128, 64))
    apart = [torch.zeros(2, 2, *t.shape[1:], dtype=t.dtype)[:, 1].copy_(t) for t in (codes, scales)]
    for num_rows in (2, 2 * CROSSOVER_ROWS):
        many = x.repeat(num_rows // 2, 1)
        together, out = torch.empty(num_rows, 512), torch.empty(num_rows, 512)
        linear_q4(many, codes, scales, 512, together)
        linear_q4(many, *apart, 512, out)
        assert torch.equal(together, out)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_row_that_is_not_finite_stays_alone(bad):
    x, codes, scales = make((4, 256, 128, 64))
    x[2, 5] = bad
    out = torch.empty(4, 256)
    matmul_q4(x, codes, scales, 256, out)
    assert not out[2].isfinite().any()
    assert out[[0, 1, 3]].isfinite().all()


def test_runs_in_several_threads_at_once():
    x, codes, scales = make((3, 300, 200, 64))
    want = torch.empty(3, 300)
    matmul_q4(x, codes, scales, 300, want)

    def work(_: int) -> Tensor:
        out = torch.empty(3, 300)
        matmul_q4(x, codes, scales, 300, out)
        return out

    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(out, want) for out in pool.map(work, range(12)))


def test_number_of_threads_does_not_change_the_product(monkeypatch):
    x, codes, scales = make((5, 700, 200, 64))
    outs = []
    for threads in (1, 2):
        monkeypatch.setattr(cpu_matmul_q4.torch, "get_num_threads", lambda n=threads: n)
        outs.append(torch.empty(5, 700))
        matmul_q4(x, codes, scales, 700, outs[-1])
    assert torch.equal(*outs)
