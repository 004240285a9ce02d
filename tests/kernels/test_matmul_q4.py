"""Products with 4-bit matrices against fp64, within twice the error of a plain product in the same precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flexgen_triton.kernels import formats, matmul_q4
from flexgen_triton.kernels.chips import CHIPS, INTERPRETER

DTYPES = (torch.float16, torch.float32)
SHAPES = {  # M, N, K, G
    "minimal": (1, 1, 1, 64),
    "one-tile": (16, 128, 128, 64),
    "k-not-whole-groups": (5, 300, 130, 64),
    "k-split": (17, 129, 1024, 64),
    "k-split-odd": (31, 257, 1152, 128),
    "k-split-masked": (3, 140, 1090, 128),
    "middle": (33, 257, 192, 64),
    "middle-k-split": (65, 127, 1024, 128),
    "middle-masked": (130, 100, 100, 64),
    "dense": (256, 65, 96, 64),
    "group-32": (7, 65, 100, 32),
}


def problem(m: int, n: int, k: int, group: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random operands; x has a mean and an outlier column, which the minimums' part must survive."""
    torch.manual_seed(m + n + k)
    x = torch.randn(m, k) + 0.5
    x[:, :1] *= 20
    codes, scales = formats.quantize_weight(torch.randn(n, k) / k**0.5, group)
    bias, residual = torch.randn(n), torch.randn(m, n)
    given = {"x": x.to(dtype), "codes": codes, "scales": scales, "rows": n}
    return given, {"bias": bias.to(dtype), "residual": residual.to(dtype)}


def plain(x, codes, scales, rows, bias=None, activation=None, residual=None):
    """In 16 bits a product with the dequantised matrix; in 32 the sum that codes and minimums make, by torch."""
    if x.dtype == torch.float16:
        y = F.linear(x, formats.dequantize_weight(codes, scales, rows, x.shape[1], x.dtype))
    else:
        scale_only, minimum_only = scales.clone(), scales.clone()
        scale_only[:, :, 1], minimum_only[:, :, 0] = 0, 0
        y = sum(
            F.linear(x, formats.dequantize_weight(codes, part, rows, x.shape[1], x.dtype))
            for part in (scale_only, minimum_only)
        )
    y = matmul_q4.ACTIVATIONS[activation](y if bias is None else y + bias)
    return y if residual is None else y + residual


def assert_as_good_as_plain(found, given, **extra):
    truth = matmul_q4.matmul_q4_ref(**given, **extra)
    error = (found.double() - truth).abs().max()
    allowed = 2 * (plain(**given, **extra).double() - truth).abs().max()
    # A single output may be lucky in the plain product: half a unit of the dtype is free.
    allowed += truth.abs().max() * torch.finfo(found.dtype).eps / 2
    assert error <= allowed, (error.item(), allowed.item())


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_is_within_twice_that_of_a_plain_product(shape, dtype):
    given, extra = problem(*shape, dtype)
    m, n = shape[:2]
    poisoned = torch.full((m, n + 5), torch.nan, dtype=dtype)
    found = matmul_q4.matmul_q4(**given, **extra, activation="gelu", out=poisoned[:, 2 : 2 + n])
    assert_as_good_as_plain(found, given, **extra, activation="gelu")
    assert poisoned[:, :2].isnan().all() and poisoned[:, 2 + n :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", matmul_q4.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_every_epilogue(activation, with_bias, dtype):
    given, extra = problem(6, 70, 64, 64, dtype)
    extra = {"bias": extra["bias"]} if with_bias else {}
    assert_as_good_as_plain(
        matmul_q4.matmul_q4(**given, **extra, activation=activation), given, **extra, activation=activation
    )


def test_no_rows_no_launch():
    given, extra = problem(0, 70, 64, 64, torch.float16)
    assert matmul_q4.matmul_q4(**given, **extra).shape == (0, 70)


def test_rows_of_x_and_residual_may_be_strided():
    given, extra = problem(5, 70, 192, 64, torch.float16)
    wide = {name: F.pad(t, (3, 4), value=torch.nan)[:, 3:-4] for name, t in [("x", given["x"]), *extra.items()][:1]}
    residual = F.pad(extra["residual"], (3, 4), value=torch.nan)[:, 3:-4]
    assert torch.equal(
        matmul_q4.matmul_q4(**{**given, **wide}, residual=residual),
        matmul_q4.matmul_q4(**given, residual=extra["residual"]),
    )


def test_a_segment_of_whole_blocks_is_a_matrix():
    given, _ = problem(4, 600, 128, 64, torch.float16)
    whole = matmul_q4.matmul_q4(**given)
    part = given | {"codes": given["codes"][1:], "scales": given["scales"][1:], "rows": 344}
    assert torch.equal(matmul_q4.matmul_q4(**part), whole[:, 256:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_groups(dtype):
    x = problem(40, 70, 300, 64, dtype)[0]["x"]
    expected = F.pad(x, (0, 20)).unflatten(1, (-1, 64)).double().sum(-1)
    torch.testing.assert_close(matmul_q4.sums_of_groups(x, 64).double(), expected, atol=1e-4, rtol=1e-6)


def test_a_workspace_serves_call_after_call():
    """Its counters are zero again, whatever stood in the partial sums does not matter, and it grows."""
    workspace = matmul_q4.Workspace(torch.device("cpu"))
    for shape in ((3, 129, 1024, 64), (2, 257, 1024, 128), (17, 129, 1024, 128)):
        given, extra = problem(*shape, torch.float16)
        workspace.partials.fill_(torch.nan)
        found = matmul_q4.matmul_q4(**given, **extra, workspace=workspace)
        assert torch.equal(found, matmul_q4.matmul_q4(**given, **extra))
        assert len(workspace.counters) and not workspace.counters.any()


def test_chips_without_matrix_instructions(monkeypatch):
    """Their tile of 8 rows, and the early crossover."""
    monkeypatch.setattr(matmul_q4, "chip_of", lambda device: replace(INTERPRETER, has_mma=False))
    for m in (8, 9):
        given, extra = problem(m, 130, 130, 64, torch.float16)
        assert_as_good_as_plain(matmul_q4.matmul_q4(**given, **extra), given, **extra)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_splits_fill_the_gpu_and_are_never_short(chip):
    for rows in (1, 17, 64, 150):
        tile = matmul_q4.tile_of(chip, rows)
        for tiles in (1, 6, 56, 224, 5000):
            for columns in (1, 500, 1024, 7168, 28672):
                splits = matmul_q4.splits_of(chip, tile, tiles, columns)
                assert splits == 1 or columns // splits >= matmul_q4.SPLIT_COLUMNS
                assert splits == 1 or splits * tiles <= tile.programs_per_sm * chip.num_sms
        assert matmul_q4.splits_of(chip, tile, 1, 10**6) == tile.programs_per_sm * chip.num_sms
