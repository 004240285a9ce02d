"""Compiled kernels kept between runs of the tests: a file of JSON for each case, in pytest's cache folder.

What was kept counts as long as nothing that decides it has changed: the case, the kernels' sources (kernels import from
each other), Triton and its settings, and `ahead_of_time.py`, which compiles and reads the machine code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile

from ahead_of_time import ROOT, Case, Compiled, compile_cases

SOURCES = (*sorted((ROOT / "kernels").glob("*.py")), Path(__file__).with_name("ahead_of_time.py"))
ELSEWHERE = ("TRITON_INTERPRET", "TRITON_CACHE_DIR")  # Triton's settings that change no machine code here


def compiled_cases(
    cases: Sequence[Case],
    folder: Path,
    *,
    sources: Sequence[Path] = SOURCES,
    compile_anew: Callable[[Sequence[Case]], list[Compiled]] = compile_cases,
) -> list[Compiled]:
    """Return each case's machine code: as `folder` keeps it, or compiled anew and kept there.

    Several processes may share the folder: a file appears whole or not at all.
    """
    recipe = recipe_of(sources)
    paths = [folder / f"{_digest(json.dumps(asdict(case), sort_keys=True))}.json" for case in cases]
    found = [_read(path, recipe) for path in paths]
    missing = [n for n, kept in enumerate(found) if kept is None]
    if missing:
        anew = compile_anew([cases[n] for n in missing])
        for n, compiled in zip(missing, anew, strict=True):
            _write(paths[n], recipe, compiled)
            found[n] = compiled
    return [compiled for compiled in found if compiled is not None]


def recipe_of(sources: Sequence[Path]) -> str:
    """The digest of all that machine code depends on beside the case."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}
    given = {name: value for name, value in settings.items() if name not in ELSEWHERE}
    texts = {path.name: path.read_text() for path in sources}
    return _digest(json.dumps([importlib.metadata.version("triton"), given, texts], sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, recipe: str) -> Compiled | None:
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    if kept["recipe"] != recipe:
        return None
    return Compiled(**{**kept["compiled"], "loop": tuple(kept["compiled"]["loop"])})


def _write(path: Path, recipe: str, compiled: Compiled) -> None:
    with NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump({"recipe": recipe, "compiled": asdict(compiled)}, file)
    os.replace(file.name, path)
