"""`python -m flexgen_triton.apps.data_wrangle`: fill in a column of a table, or tell which of its rows match."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..commands.command_line import invoke
from ..commands.options import Command, load_by_hand, model_options
from ..llm import LLM
from ..sequences.outputs import answered
from ..sequences.params import SamplingParams

Row = dict[str, str]

TABLES = {  # of each task: the column that is asked for, and rows
    "impute": """\
name,street,phone,city
Harbour Grill,2 Quay Road,0117 4960 112,Bristol
The Old Mill,14 Castle Street,0131 4960 207,Edinburgh
Blue Door,7 Park Row,0117 4960 318,Bristol
Ahmed's Kitchen,31 Leith Walk,0131 4960 423,Edinburgh
Saffron House,5 Corn Street,0117 4960 534,Bristol
""",
    "match": """\
first,second,same
"Kettle KX-20, 1.7 l, steel","KX20 steel kettle 1.7 litres",yes
"Kettle KX-20, 1.7 l, steel","Toaster TX-4, four slices",no
"Lamp Orion, 60 cm, black","Orion desk lamp (black, 60cm)",yes
"Lamp Orion, 60 cm, black","Lamp Orion, 40 cm, white",no
"Drill D500 with case","D500 drill, case included",yes
"Drill D500 with case","Saw S500 with case",no
""",
}


def read_table(file: Path) -> list[Row]:
    """Rows of a CSV file with a heading, or of a JSON file that is a list of objects. Raises ValueError otherwise."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else list(csv.DictReader(io.StringIO(text)))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read as {'JSON' if file.suffix == '.json' else 'CSV'}: {error}") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{file} is no list of objects; a row is an object with its columns as keys")
    return [{str(name): "" if value is None else str(value) for name, value in row.items()} for row in found]


def question(row: Row, column: str) -> str:
    """A row without the column that is asked for, and that column's name."""
    known = "; ".join(f"{name}: {value}" for name, value in row.items() if name != column)
    return f"{known}; {column}:"


def prompts(rows: Sequence[Row], column: str, num_examples: int) -> list[str]:
    """Each row after the first few as a question; those are examples, with their answers, before every one."""
    examples = "".join(f"{question(row, column)} {row[column]}\n" for row in rows[:num_examples])
    return [examples + question(row, column) for row in rows[num_examples:]]


def scores(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """The share of right answers; where they are "yes" or "no", precision, recall and F1 of "yes" as well."""
    pairs = [(a.strip().lower(), e.strip().lower()) for a, e in zip(answers, expected, strict=True)]
    found = {"accuracy": sum(a == e for a, e in pairs) / len(pairs)}
    if all(e in ("yes", "no") for _, e in pairs):
        right, said, true = (pairs.count(("yes", "yes")), *([p[n] for p in pairs].count("yes") for n in (0, 1)))
        found |= {"precision": right / max(said, 1), "recall": right / max(true, 1)}
        found["f1"] = 2 * right / max(said + true, 1)
    return found


def complete(llm: LLM, texts: Sequence[str], params: SamplingParams, *, at_once: bool) -> list[str]:
    """Each prompt's first line of answer, computed all together or one after the other."""
    calls = [list(texts)] if at_once else [[text] for text in texts]
    return [o.outputs[0].text.strip() for call in calls for o in answered(llm.generate(call, params))]


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--task", type=click.Choice(list(TABLES)), default="impute", show_default=True, help="Of the own tables.")
@click.option("--table", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A table: CSV or JSON.")
@click.option("--column", help="The column that is asked for; by default the last.")
@click.option("--examples", type=click.IntRange(0), default=2, show_default=True, help="Rows that are examples.")
@click.option("--batch", is_flag=True, help="All rows at once instead of one after the other.")
@click.option("--max-tokens", type=int, default=8, show_default=True, help="Length of an answer at most.")
@model_options
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Ask for a column of each row of a table, given a few rows as examples, and say how many answers are right."""
    file, num_examples = options["table"], options["examples"]
    rows = read_table(file) if file else list(csv.DictReader(io.StringIO(TABLES[options["task"]])))
    if len(rows) <= num_examples:
        raise ValueError(f"the table has {len(rows)} rows and {num_examples} are examples; none is left to ask about")
    column = options["column"] or list(rows[0])[-1]
    if lacking := next((n for n, row in enumerate(rows, 1) if column not in row), None):
        raise ValueError(f"row {lacking} of the table has no column {column!r}; give --column one that all have")
    texts, params = (
        prompts(rows, column, num_examples),
        SamplingParams(max_tokens=options["max_tokens"], temperature=0, stop="\n"),
    )
    with load_by_hand(context, options) as llm:
        answers = complete(llm, texts, params, at_once=options["batch"])
    for row, answer in zip(rows[num_examples:], answers, strict=True):
        click.echo(f"{question(row, column)} {answer}  (is {row[column]})")
    found = scores(answers, [row[column] for row in rows[num_examples:]])
    click.echo(f"{len(texts)} rows: {', '.join(f'{name} {x:.3f}' for name, x in found.items())}")


def main() -> None:
    invoke(command)


if __name__ == "__main__":
    main()
