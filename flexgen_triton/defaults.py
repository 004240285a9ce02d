"""Names and places that commands and library share; importing it takes no time."""

from __future__ import annotations

from pathlib import Path

AUTO = "auto"  # the policy that is found by the engine itself
DEMO = "demo"  # the model that ships with the package
DUMMY = "_DUMMY_"  # the path of a model with random weights
DEFAULT_OFFLOAD_DIR = Path("~/.cache/flexgen_triton")
