"""The policy: which share of weights, cache and activations lives on which tier, and how batches are scheduled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from ..flags import allowed, flag, flags_of, within
from ..kernels.sizes import KV_GROUP, WEIGHT_GROUPS
from .formats import CacheFormat, FourBit, FourBitCache, PackedFormat, PlainCache

LOSSY = ("4bit", "4bit-cache", "sparse")  # what changes the output, by the names that allow it


class PolicyError(ValueError):
    """A policy that cannot be obeyed; the message says which field, its value and what would do."""


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """Group quantisation, with FlexGen's fields: 4 bits with a scale and a minimum for each group of `group_size`.

    Groups run along what a product sums over: a weight's input dimension (1), the cache's head dimension (2). FlexGen
    groups weights along their output dimension (0); its scripts say so, and get groups along the other one, which a
    fused kernel can use.
    """

    num_bits: int = 4
    group_size: int = 64
    group_dim: int = 0
    symmetric: bool = False
    enabled: bool = True


def _percent(help: str | None = None) -> dict[str, Any]:
    return flag(help, name="percent", kind=int, by_hand=True)


MIN_SHARE = math.ulp(0.0)  # the least number above 0
SIZE = within(1, whole=True, says="it must be a whole number of at least 1")


@dataclass(frozen=True, slots=True)
class Policy:
    """FlexGen's policy, field for field and in its order (Sheng et al., ICML 2023, section 4); what is ours follows.

    A field's metadata is its flag on the command line, and the numbers that it may have. Percentages are of bytes
    (weights) or of sequences (cache, activations); what GPU and CPU leave goes to disk.
    Raises PolicyError when a value is out of range or asks for what this version does not do.
    """

    gpu_batch_size: int = field(default=1, metadata=flag(default=4, by_hand=True) | SIZE)
    num_gpu_batches: int = field(default=1, metadata=flag(by_hand=True) | SIZE)
    w_gpu_percent: float = field(
        default=100,
        metadata=_percent(
            "Six numbers: weights on GPU and CPU, cache on GPU and CPU, activations on GPU and CPU; the rest is disk."
        ),
    )
    w_cpu_percent: float = field(default=0, metadata=_percent())
    cache_gpu_percent: float = field(default=100, metadata=_percent())
    cache_cpu_percent: float = field(default=0, metadata=_percent())
    act_gpu_percent: float = field(default=100, metadata=_percent())
    act_cpu_percent: float = field(default=0, metadata=_percent())
    overlap: bool = field(default=True, metadata=flag("Load ahead while computing.", after="comp_weight_config"))
    sep_layer: bool = field(default=True, metadata=flag("Attention and MLP are layers of their own."))
    pin_weight: bool = field(default=True, metadata=flag("Keep the host's weights in pinned memory."))
    cpu_cache_compute: bool = field(
        default=False, metadata=flag("The CPU attends to what its memory holds of the cache.")
    )
    attn_sparsity: float = field(
        default=1.0,
        metadata=flag("Share of V that decode reads.")
        | within(MIN_SHARE, 1, says="it is the share of V that attention reads, above 0 and at most 1"),
    )
    compress_weight: bool = field(default=False, metadata=flag("Weights in 4 bits."))
    comp_weight_config: CompressionConfig = field(
        default_factory=CompressionConfig,
        metadata=flag(
            "Weights that share a scale: 32, 64, 128.", name="group_size", inner="group_size", after="compress_cache"
        ),
    )
    compress_cache: bool = field(default=False, metadata=flag("KV cache in 4 bits."))
    comp_cache_config: CompressionConfig = field(default_factory=lambda: CompressionConfig(group_dim=2))
    cpu_attention_percent: float = field(
        default=100,
        metadata=flag(
            "With --cpu-cache-compute: of the host's sequences, those it attends to; the rest are sent to the GPU.",
            after="cpu_cache_compute",
        )
        | within(0, 100, says="of the host's sequences that share is attended to by the CPU, between 0 and 100"),
    )
    keep_open_pages: bool = field(
        default=False,
        metadata=flag(
            "New tokens' cache leaves the GPU a whole page at a time, not at once.", after="cpu_attention_percent"
        ),
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            numbers, value = allowed(f), getattr(self, f.name)
            if numbers and not numbers.has(value):
                shown = f"{value:g}" if isinstance(value, float) else value
                raise PolicyError(f"{f.name} is {shown}; {numbers.says}")
        for kind, what in (("w", "weights"), ("cache", "cache"), ("act", "activations")):
            gpu, cpu = getattr(self, f"{kind}_gpu_percent"), getattr(self, f"{kind}_cpu_percent")
            if not (0 <= gpu <= 100 and 0 <= cpu <= 100):
                raise PolicyError(f"{what}: {gpu:g} % GPU and {cpu:g} % CPU; each must be between 0 and 100")
            if gpu + cpu > 100:
                raise PolicyError(
                    f"{what}: {gpu:g} % GPU + {cpu:g} % CPU is {gpu + cpu:g} %; together at most 100, the rest is disk"
                )
        if self.compress_weight:
            _check_format("comp_weight_config", self.comp_weight_config, WEIGHT_GROUPS, (0, 1))
        if self.compress_cache:
            _check_format("comp_cache_config", self.comp_cache_config, (KV_GROUP,), (2,))

    @property
    def weight_format(self) -> PackedFormat | None:
        """The format that weights are stored in; None where they keep their dtype."""
        config = self.comp_weight_config
        return FourBit(config.group_size) if self.compress_weight and config.enabled else None

    @property
    def cache_format(self) -> CacheFormat:
        return FourBitCache() if self.compress_cache and self.comp_cache_config.enabled else PlainCache()

    @property
    def percent(self) -> tuple[float, ...]:
        """FlexGen's six numbers: of weights, cache and activations the shares on GPU and CPU."""
        weights, cache = (self.w_gpu_percent, self.w_cpu_percent), (self.cache_gpu_percent, self.cache_cpu_percent)
        return (*weights, *cache, self.act_gpu_percent, self.act_cpu_percent)

    @property
    def w_disk_percent(self) -> float:
        return 100 - self.w_gpu_percent - self.w_cpu_percent

    @property
    def cache_disk_percent(self) -> float:
        return 100 - self.cache_gpu_percent - self.cache_cpu_percent

    @property
    def attended_percent(self) -> float:
        """Percentage of all sequences that the host attends to itself where its memory is apart from the device's."""
        return self.cache_cpu_percent * self.cpu_attention_percent / 100 if self.cpu_cache_compute else 0.0

    @property
    def act_disk_percent(self) -> float:
        return 100 - self.act_gpu_percent - self.act_cpu_percent

    @property
    def round_size(self) -> int:
        """Sequences in one round of the schedule."""
        return self.gpu_batch_size * self.num_gpu_batches

    @property
    def strategy(self) -> str:
        if not self.overlap:
            return "sequential"
        return "overlap, single batch" if self.num_gpu_batches == 1 else "overlap, multi-batch"


BY_HAND = tuple(f.name for f in flags_of(Policy) if f.by_hand)  # one of these says that the policy is given by flags


def _check_format(name: str, config: CompressionConfig, groups: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """Raise PolicyError for a format that does not exist."""
    if config.num_bits != 4:
        raise PolicyError(f"{name}: num_bits is {config.num_bits}; only 4 is available")
    if config.symmetric:
        raise PolicyError(f"{name}: symmetric quantisation is not available; groups have a minimum and a scale")
    if config.group_size not in groups:
        available = " or ".join(map(str, groups))
        raise PolicyError(f"{name}: group_size is {config.group_size}; available is {available}")
    if config.group_dim not in dims:
        available = " or ".join(map(str, dims))
        raise PolicyError(f"{name}: group_dim is {config.group_dim}; available is {available}")
