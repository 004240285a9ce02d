"""The Triton kernels: the top-level `kernels/` folder in a source tree, the files beside this one in a wheel."""

from pathlib import Path

_source = Path(__file__).resolve().parents[2] / "kernels"
if _source.is_dir():
    __path__.append(str(_source))
