"""Compare two result files, or show one.

    python bench/report.py OLD.json NEW.json    # exit code 1 when anything lost over 10 %
    python bench/report.py --table FILE.json    # a Markdown table

A row is judged by its share of the roof measured in the same run where both files have one, so that a noisy or
another machine does not count as a loss; else by its value, and then only on the same machine.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rows import Results, Row, read_results

MAX_LOSS = 0.10


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row of both files. `loss` is a fraction, negative for a gain, None where nothing can be judged."""

    name: str
    old: Row | None
    new: Row | None
    judged_by: str
    loss: float | None

    def verdict(self, max_loss: float) -> str:
        if self.old is None:
            return "new"
        if self.new is None:
            return "missing"
        if self.loss is None:
            return "not judged"
        return "LOSS" if self.is_loss(max_loss) else "ok"

    def is_loss(self, max_loss: float) -> bool:
        return self.loss is not None and self.loss > max_loss


def compare(old: Results, new: Results) -> list[Comparison]:
    """Every row of either file, in the old file's order, then what is new."""
    olds, news = ({row.name: row for row in results.rows} for results in (old, new))
    same_machine = old.machine == new.machine
    return [_compare(name, olds.get(name), news.get(name), same_machine) for name in dict.fromkeys([*olds, *news])]


def _compare(name: str, old: Row | None, new: Row | None, same_machine: bool) -> Comparison:
    if old is None or new is None or old.value is None:
        return Comparison(name, old, new, "", None)
    if new.value is None:
        return Comparison(name, old, new, "value", 1.0)
    if old.share is not None and new.share is not None:
        return Comparison(name, old, new, "share", _loss(old.share, new.share, "higher"))
    loss = _loss(old.value, new.value, new.better) if same_machine else None
    return Comparison(name, old, new, "value" if same_machine else "other machine", loss)


def _loss(old: float, new: float, better: str) -> float | None:
    """The part of `old` that is lost (of a rate), or that is added (to a time); None when there is nothing to lose."""
    if old == 0:
        return None
    return (1 - new / old) if better == "higher" else (new / old - 1)


def comparison_table(comparisons: Iterable[Comparison], max_loss: float) -> str:
    """The comparison as aligned plain text."""
    lines = [["name", "old", "new", "unit", "old share", "new share", "change", "by", "verdict"]]
    for c in comparisons:
        row = c.new or c.old
        assert row is not None, c
        change = _change(c.loss, rises=row.better == "lower" and c.judged_by == "value")
        cells = [_value(c.old), _value(c.new), row.unit, _share(c.old), _share(c.new)]
        lines.append([c.name, *cells, change, c.judged_by, c.verdict(max_loss)])
    return plain_table(lines)


def markdown_table(results: Results) -> str:
    """One result file as a Markdown table, and where it comes from."""
    origin = f"{results.machine}, commit {results.commit}, {results.header.get('date', '')}"
    return f"{rows_table(results.rows)}\n\n{origin}"


def rows_table(rows: Sequence[Row]) -> str:
    """Rows of any script as a Markdown table."""
    lines = [["", "value", "unit", "roof", "share of roof"]]
    return markdown(lines + [[r.name, _value(r), r.unit, _number(r.roof), _share(r)] for r in rows])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first line the heading; columns of numbers are aligned to the right."""
    head, *others = lines
    rule = ["---" if any(re.search("[A-Za-z`]", line[n]) for line in others) else "---:" for n in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *others))


def plain_table(lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, a rule under the first line."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def _value(row: Row | None) -> str:
    if row is None:
        return "-"
    return _number(row.value) or row.note or "-"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _change(loss: float | None, *, rises: bool) -> str:
    """The change of a figure by its loss; the figure of a loss `rises` where lower is better."""
    return "" if loss is None else f"{(loss if rises else -loss) + 0.0:+.1%}"


def _share(row: Row | None) -> str:
    return "" if row is None or row.share is None else f"{row.share:.1%}"


def _report(old: Results, new: Results, max_loss: float) -> int:
    print(f"old: {old.machine}, commit {old.commit}\nnew: {new.machine}, commit {new.commit}")
    if old.machine != new.machine:
        print("different machines: only shares of the roof are judged")
    comparisons = compare(old, new)
    print(comparison_table(comparisons, max_loss))
    lost = [c.name for c in comparisons if c.is_loss(max_loss)]
    missing = [c.name for c in comparisons if c.new is None]
    if missing:
        print(f"missing in the new file: {', '.join(missing)}")
    if lost:
        print(f"lost over {max_loss:.0%}: {', '.join(lost)}")
    return 1 if lost else 0


def main(argv: list[str] | None = None) -> int:
    """0: nothing lost over the limit; 1: something did; 2: a file cannot be read."""
    parser = argparse.ArgumentParser(description="Compare two benchmark result files, or show one as Markdown.")
    parser.add_argument("files", nargs="*", type=Path, metavar="OLD NEW")
    parser.add_argument("--table", type=Path, metavar="FILE", help="show this result file as a Markdown table")
    parser.add_argument("--max-loss", type=float, default=100 * MAX_LOSS, metavar="PERCENT", help="default %(default)g")
    args = parser.parse_args(argv)
    if len(args.files) != (0 if args.table else 2):
        parser.error("give OLD.json NEW.json, or --table FILE.json")
    try:
        if args.table:
            print(markdown_table(read_results(args.table)))
            return 0
        return _report(read_results(args.files[0]), read_results(args.files[1]), args.max_loss / 100)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
