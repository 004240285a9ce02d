"""The policy: which share of weights, cache and activations lives on which tier, and how batches are scheduled."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..kernels.sizes import KV_GROUP, WEIGHT_GROUPS
from .formats import CacheFormat, FourBit, FourBitCache, PlainCache

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


@dataclass(frozen=True, slots=True)
class Policy:
    """FlexGen's policy, field for field and in its order (Sheng et al., ICML 2023, section 4); what is ours follows.

    Percentages are of bytes (weights) or of sequences (cache, activations); what GPU and CPU leave goes to disk.
    Raises PolicyError when a value is out of range or asks for what this version does not do.
    """

    gpu_batch_size: int = 1
    num_gpu_batches: int = 1
    w_gpu_percent: float = 100
    w_cpu_percent: float = 0
    cache_gpu_percent: float = 100
    cache_cpu_percent: float = 0
    act_gpu_percent: float = 100
    act_cpu_percent: float = 0
    overlap: bool = True
    sep_layer: bool = True
    pin_weight: bool = True
    cpu_cache_compute: bool = False
    attn_sparsity: float = 1.0
    compress_weight: bool = False
    comp_weight_config: CompressionConfig = field(default_factory=CompressionConfig)
    compress_cache: bool = False
    comp_cache_config: CompressionConfig = field(default_factory=lambda: CompressionConfig(group_dim=2))
    cpu_attention_percent: float = 100  # with cpu_cache_compute: of the host's sequences, those it attends to itself
    keep_open_pages: bool = False  # what a page of the cache gains stays on the GPU until the page is full

    def __post_init__(self) -> None:
        for name in ("gpu_batch_size", "num_gpu_batches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PolicyError(f"{name} is {value}; it must be a whole number of at least 1")
        for kind, what in (("w", "weights"), ("cache", "cache"), ("act", "activations")):
            gpu, cpu = getattr(self, f"{kind}_gpu_percent"), getattr(self, f"{kind}_cpu_percent")
            if not (0 <= gpu <= 100 and 0 <= cpu <= 100):
                raise PolicyError(f"{what}: {gpu:g} % GPU and {cpu:g} % CPU; each must be between 0 and 100")
            if gpu + cpu > 100:
                raise PolicyError(
                    f"{what}: {gpu:g} % GPU + {cpu:g} % CPU is {gpu + cpu:g} %; together at most 100, the rest is disk"
                )
        if not 0 <= self.cpu_attention_percent <= 100:
            raise PolicyError(
                f"cpu_attention_percent is {self.cpu_attention_percent:g}; of the host's sequences that share is "
                "attended to by the CPU, between 0 and 100"
            )
        if not 0 < self.attn_sparsity <= 1:
            raise PolicyError(
                f"attn_sparsity is {self.attn_sparsity:g}; it is the share of V that attention reads, above 0 and at "
                "most 1"
            )
        if self.compress_weight:
            _check_format("comp_weight_config", self.comp_weight_config, WEIGHT_GROUPS, (0, 1))
        if self.compress_cache:
            _check_format("comp_cache_config", self.comp_cache_config, (KV_GROUP,), (2,))

    @property
    def weight_format(self) -> FourBit | None:
        """The format that weights are stored in; None where they keep their dtype."""
        config = self.comp_weight_config
        return FourBit(config.group_size) if self.compress_weight and config.enabled else None

    @property
    def cache_format(self) -> CacheFormat:
        return FourBitCache() if self.compress_cache and self.comp_cache_config.enabled else PlainCache()

    @property
    def w_disk_percent(self) -> float:
        return 100 - self.w_gpu_percent - self.w_cpu_percent

    @property
    def cache_disk_percent(self) -> float:
        return 100 - self.cache_gpu_percent - self.cache_cpu_percent

    @property
    def attended_percent(self) -> float:
        """Of all sequences, those that the host attends to itself where its memory is apart from the device's."""
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
