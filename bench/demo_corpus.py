"""The text that the demo model learns, and the part held out: prose from what a Python installation carries.

Docstrings and comment blocks of the standard library's source files and `pydoc_data.topics`, cleaned, with whole
modules split off as held-out text. Knows no model and no tokenizer.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

HELDOUT_SHARE = 20  # one module in twenty
COMMON_WORDS = re.compile(
    r"\b(?:a|an|and|are|as|at|be|by|can|for|from|has|have|if|in|is|it|its|may|must|not|of|on|or|should|so|such|than|that|"
    r"the|their|then|there|these|this|to|used|was|we|when|which|will|with|you)\b",
    re.IGNORECASE,
)
UNWANTED = re.compile(r">>>|copyright|licen[sc]e|https?:|\S@\S|XXX|[^\x20-\x7e]|[=\-*#_~+.]{4,}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Cleaned text: one document for a module or topic, its paragraphs on lines of their own."""

    train: list[str]
    heldout: list[str]


def is_prose(paragraph: str) -> bool:
    """Return True if a paragraph reads as English sentences rather than as code, a table or a signature."""
    num_words = len(paragraph.split())
    if num_words < 6 or UNWANTED.search(paragraph) or not paragraph[0].isalpha():
        return False
    num_letters = sum(char.isalpha() or char.isspace() for char in paragraph)
    return len(COMMON_WORDS.findall(paragraph)) >= 0.2 * num_words and num_letters >= 0.88 * len(paragraph)


def as_sentence(paragraph: str) -> str:
    """Begin with a capital where a plain word begins, and end with a full stop where nothing ends."""
    if paragraph.split()[0].isalpha():
        paragraph = paragraph[0].upper() + paragraph[1:]
    return paragraph if paragraph[-1] in ".!?:)" else paragraph.rstrip(",;") + "."


def prose(text: str) -> Iterator[str]:
    """The prose paragraphs of a docstring, comment block or topic, each on one line without markup."""
    for block in re.split(r"\n\s*\n|\n\s*(?=[*-] )", text):
        line = " ".join(block.split()).removeprefix("* ").removeprefix("- ")
        line = re.sub(r"\*{1,2}(\w+)\*{1,2}", r"\1", line.replace("``", "`"))
        line = re.sub(r":\w+:(?=`)", "", line)
        if is_prose(line):
            yield as_sentence(line)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """`(line, text)` of every docstring in a source file."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """`(line, text)` of every block of full-line comments in a source file."""
    for block in re.finditer(r"(?m)(?:^[ \t]*#.*\n)+", source):
        yield source.count("\n", 0, block.start()) + 1, re.sub(r"(?m)^[ \t]*#+ ?", "", block.group())


def modules() -> Iterator[tuple[str, list[str]]]:
    """`(name, texts in source order)` of every standard-library source file, in order of path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            texts = [*docstrings(source), *comments(source)]
        except (SyntaxError, UnicodeDecodeError, ValueError):  # the standard library tests itself on broken files
            continue
        yield name, [text for _, text in sorted(texts)]


def is_heldout(name: str) -> bool:
    """Return True if a module or topic is held out, decided by its name alone."""
    return hashlib.sha256(name.encode()).digest()[0] % HELDOUT_SHARE == 0


def build_corpus() -> Corpus:
    """Collect, clean, deduplicate and split; a paragraph seen in training never returns in the held-out text."""
    sources = [*modules(), *((f"topic {name}", [text]) for name, text in sorted(topics.items()))]
    seen: set[str] = set()
    split: dict[bool, list[str]] = {False: [], True: []}
    for held, documents in split.items():
        for name, texts in sources:
            if is_heldout(name) != held:
                continue
            paragraphs = dict.fromkeys(p for text in texts for p in prose(text) if p.lower() not in seen)
            seen.update(p.lower() for p in paragraphs)
            if paragraphs:
                documents.append("\n".join(paragraphs))
    return Corpus(train=split[False], heldout=split[True])


def first_documents(documents: list[str], num_bytes: int) -> list[str]:
    """The leading documents that together stay within `num_bytes`."""
    kept: list[str] = []
    for document in documents:
        num_bytes -= len(document.encode()) + 1
        if num_bytes < 0:
            break
        kept.append(document)
    return kept
