"""Norms, activations and rotary positions: what passes over activations apart from products."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory.scratch import Scratch
from . import implementation
from .implementation import widened

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # in place
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_new": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "gelu_pytorch_tanh": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "silu": partial(F.silu, inplace=True),
}
FUSED_ACTIVATIONS = {name: "gelu_tanh" if name in ("gelu_new", "gelu_pytorch_tanh") else name for name in ACTIVATIONS}
LAYER_NORM_EPS = 1e-5


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, scratch: Scratch | None = None) -> Tensor:
    """Layer normalisation of x [M, K] over K, in x's dtype."""
    out = (scratch or Scratch(device=x.device)).take(*x.shape, dtype=x.dtype)
    if implementation.uses_triton(x):
        from ...kernels.norm import layer_norm as normalise
    else:
        from ...kernels.cpu.norm import layer_norm as normalise
    normalise(x, weight, bias, eps=LAYER_NORM_EPS, out=out)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, scratch: Scratch | None = None) -> Tensor:
    """Root mean square normalisation of x [M, K] over K, in x's dtype, computed in fp32."""
    scratch = scratch or Scratch(device=x.device)
    out = scratch.take(*x.shape, dtype=x.dtype)
    if implementation.uses_triton(x):
        from ...kernels.norm import rms_norm as normalise

        normalise(x, weight, eps=eps, out=out)
        return out
    with scratch.frame():
        wide, squares = widened(x, scratch), scratch.take(*x.shape, dtype=torch.float32)
        scale = scratch.take(len(x), 1, dtype=torch.float32)
        torch.mean(torch.mul(wide, wide, out=squares), 1, keepdim=True, out=scale)
        out.copy_(torch.mul(wide, scale.add_(eps).rsqrt_(), out=squares))
    return out.mul_(weight)


def rotate(x: Tensor, positions: Tensor, theta: float, scratch: Scratch) -> None:
    """Turn each head's pairs (i, i + D/2) by its position times theta ** (-2 i / D), in place: [T, H, D].

    `positions` are [T] int32 (Su et al., RoFormer, 2021, section 3.2, with a head's halves as the pairs).
    """
    half = x.shape[2] // 2
    with scratch.frame():
        angles = scratch.take(len(x), 1, half, dtype=torch.float32)
        torch.mul(positions[:, None, None], _frequencies(half, theta, x.device), out=angles)
        cos, sin = (scratch.take(*angles.shape, dtype=x.dtype).copy_(f(angles)) for f in (torch.cos, torch.sin))
        left, right, turned = x[..., :half], x[..., half:], scratch.take(*x.shape[:2], half, dtype=x.dtype)
        torch.mul(left, cos, out=turned).addcmul_(right, sin, value=-1)
        right.mul_(cos).addcmul_(left, sin)
        left.copy_(turned)


@lru_cache(maxsize=8)
def _frequencies(half: int, theta: float, device: torch.device) -> Tensor:
    """[D/2] fp32"""
    return 1.0 / theta ** (torch.arange(half, dtype=torch.float32, device=device) / half)


def gated(x: Tensor, activation: str, scratch: Scratch) -> Tensor:
    """`activation(gate) * up` of x [M, 2 F], gate beside up -> [M, F]."""
    width = x.shape[1] // 2
    out = scratch.take(len(x), width, dtype=x.dtype).copy_(x[:, :width])
    ACTIVATIONS[activation](out)
    return out.mul_(x[:, width:])
