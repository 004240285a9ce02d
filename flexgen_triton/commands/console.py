"""Printing for people: prose in lines of the console's width, tables whose cells are never cut.

A table keeps its natural width where that fits, and where the output is no terminal. In a narrower terminal it is
written row by row instead, a line for each cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDTH = 120  # of prose where the output is no terminal
UNBOUNDED = 1 << 16
TIERS = {"gpu": "GPU", "host": "host", "disk": "disk"}  # names for people


def console() -> Console:
    """Standard output."""
    found = Console(highlight=False)
    if not found.is_terminal:
        found.width = WIDTH
    return found


def print_table(console: Console, table: Table) -> None:
    """Print a table with all of every cell."""
    wide = Console(file=console.file, width=UNBOUNDED, highlight=False, force_terminal=console.is_terminal)
    needed = Measurement.get(wide, wide.options, table).maximum
    if needed <= console.width:
        console.print(table)
    elif not console.is_terminal:
        wide.width = needed
        wide.print(table)
    else:
        console.print(Text("\n".join(records(table))), soft_wrap=True)


def records(table: Table) -> Iterable[str]:
    """A table's lines where it is written row by row: a row's first cell, then the others with their headings."""
    headings = [str(column.header) for column in table.columns]
    if table.title:
        yield str(table.title)
    for row in zip_longest(*(column.cells for column in table.columns), fillvalue=""):
        first, *others = (str(cell) for cell in row)
        yield f"{headings[0]} {first}".strip()
        for heading, cell in zip(headings[1:], others, strict=True):
            if cell:
                yield f"  {heading}: {cell}" if heading else f"  {cell}"
    yield ""
