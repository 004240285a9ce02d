"""Docstrings begin with a verb or name the thing, so that they are understood at the first reading."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("flexgen_triton", "kernels", "bench", "tests")
RIDDLE = re.compile(r"(What|Of|Where|Whether|So many|How)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def riddles(source: str) -> list[tuple[int, str]]:
    """List the docstrings that begin with a question word or a genitive."""
    return [(line, text) for line, text in docstrings(source) if RIDDLE.match(text)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_begins_as_a_riddle(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = [f"{path.relative_to(ROOT)}:{line}: {text}" for path in paths for line, text in riddles(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", ["", "def f():\n    ", "async def f():\n    ", "class C:\n    "])
@pytest.mark.parametrize("word", ["What", "Of", "Where", "Whether", "So many", "How"])
def test_a_riddle_is_found(kind, word):
    assert riddles(f'{kind}"""{word} it is."""') == [(kind.count("\n") + 1, f"{word} it is.")]
    assert not riddles(f'{kind}"""{word}ever it is."""')
