"""flexgen_triton: text generation with language models larger than the GPU, at the throughput its links allow."""

from . import environment as _environment  # noqa: F401  # before anything imports torch

TYPE_CHECKING = False  # typing's own takes as long to import as all the rest
if TYPE_CHECKING:
    from .flex_opt import OptLM
    from .llm import LLM
    from .plan.policy import CompressionConfig, Policy
    from .sequences.outputs import CompletionOutput, RequestOutput
    from .sequences.params import SamplingParams
    from .utils import ExecutionEnv

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "CompressionConfig",
    "ExecutionEnv",
    "OptLM",
    "Policy",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> object:
    """Import the public names on first use, so that planning needs no torch."""
    from importlib import import_module

    homes = {"LLM": ".llm", "SamplingParams": ".sequences.params"}
    homes |= {"OptLM": ".flex_opt", "ExecutionEnv": ".utils"}
    homes |= dict.fromkeys(("CompletionOutput", "RequestOutput"), ".sequences.outputs")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(homes.get(name, ".plan.policy"), __name__), name)
