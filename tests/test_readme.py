"""The README's two commands are the ones that CI runs, and what it refers to exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_two_commands_are_what_ci_runs():
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert all(command in lines for command in commands)


def test_files_that_it_links_to_exist():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_its_python_example_uses_the_public_names():
    import flexgen_triton

    (imported,) = re.findall(r"from flexgen_triton import (.+)", README)
    assert {name.strip() for name in imported.split(",")} <= set(flexgen_triton.__all__)
