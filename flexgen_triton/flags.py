"""Fields of dataclasses as flags of a command line: how each is spelt, and the two ways between values and words.

How a flag is spelt is metadata of its field. A number or a text follows it (`--top-k 5`); a field that is False by
default is a switch (`--keep-open-pages`), one that is True takes a word (`--overlap false`). Several fields may share
one flag (`--percent` and six numbers), and a field that is a dataclass may have a flag for one field of its own
(`--group-size`). Knows no command, and no library that parses them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Spelling:
    """A field's flag. What is empty follows from the field: its name, its default, its type."""

    help: str | None
    name: str
    default: Any
    kind: type | None
    inner: str
    after: str
    by_hand: bool


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a number may have, its ends included, and how a refusal says so."""

    low: float
    high: float
    whole: bool
    says: str

    def has(self, value: float) -> bool:
        return (isinstance(value, int) or not self.whole) and self.low <= value <= self.high


def flag(
    help: str | None = None,
    *,
    name: str = "",
    default: Any = None,
    kind: type | None = None,
    inner: str = "",
    after: str = "",
    by_hand: bool = False,
) -> dict[str, Any]:
    """Give a field a flag. Neighbours with one `name` share it, in their order; the first one's help is its help.

    `default` is the command line's, where that is not the field's. `kind` is the type of the values, where they have
    not the one that the field is annotated with. A field that is a sequence has a flag that may be given several times.
    `inner` names the field of the field that the flag gives. `after` is the field whose flag it follows in the help;
    others stand in the fields' order. `by_hand`: to give it is to choose by flags, so a command always says it.
    """
    return {"flag": Spelling(help, name, default, kind, inner, after, by_hand)}


def within(low: float, high: float = math.inf, *, whole: bool = False, says: str = "") -> dict[str, Any]:
    """Say which numbers a field may have."""
    return {"range": Range(low, high, whole, says)}


def allowed(field: Field[Any]) -> Range | None:
    """Return the range that a number in this field has."""
    found: Range | None = field.metadata.get("range")
    return found


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag as a parser needs it; `name` is the one under which its value is kept."""

    name: str
    fields: tuple[str, ...]
    inner: str
    kind: type
    is_many: bool  # it may be given several times
    default: Any
    help: str | None
    by_hand: bool

    @property
    def word(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_switch(self) -> bool:
        """True where the flag alone says it, and without it the value is False."""
        return self.default is False

    def value_in(self, made: DataclassInstance) -> Any:
        """The value that the flag gives of a dataclass: its field's, or those of all that share it."""
        values = tuple(getattr(made, name) for name in self.fields)
        if self.inner:
            return getattr(values[0], self.inner)
        return values if len(values) > 1 else values[0]

    def field_values(self, kind: type[DataclassInstance], value: Any) -> dict[str, Any]:
        """The inverse: what the fields are when the flag says this."""
        if self.inner:
            (whole,) = (_default(f) for f in fields(kind) if f.name == self.fields[0])
            value = replace(whole, **{self.inner: value})
        return dict(zip(self.fields, value if len(self.fields) > 1 else (value,), strict=True))

    def words(self, value: Any) -> list[str]:
        """The command line's words for a value that is not the default."""
        if self.is_switch:
            return [self.word]
        if self.is_many:
            return [word for item in value for word in (self.word, _text(item))]
        return [self.word, *(map(_text, value) if len(self.fields) > 1 else [_text(value)])]


@cache
def flags_of(kind: type[DataclassInstance]) -> tuple[Flag, ...]:
    """Every flag of a dataclass, in the order of its help."""
    hints = get_type_hints(kind)
    ordered = _in_order([f for f in fields(kind) if "flag" in f.metadata])
    groups = groupby(ordered, key=lambda f: f.metadata["flag"].name or f.name)
    return tuple(_flag(name, list(group), hints) for name, group in groups)


def _in_order(found: Sequence[Field[Any]], after: str = "") -> Iterator[Field[Any]]:
    for f in found:
        if f.metadata["flag"].after == after:
            yield f
            yield from _in_order(found, f.name)


def _flag(name: str, group: Sequence[Field[Any]], hints: Mapping[str, Any]) -> Flag:
    first, spelling = group[0], group[0].metadata["flag"]
    own = type(_flags_default(first)) if spelling.inner else _item_type(hints[first.name])
    kind = spelling.kind or own
    defaults = tuple(kind(d) if kind is float else d for d in map(_flags_default, group))
    return Flag(
        name,
        tuple(f.name for f in group),
        spelling.inner,
        kind,
        is_many=_default(first) == (),
        default=defaults if len(group) > 1 else defaults[0],
        help=spelling.help,
        by_hand=spelling.by_hand,
    )


def _item_type(hint: Any) -> type:
    """The type of a value, of one that may be None, or of a sequence's items."""
    kinds: list[type] = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return kinds[0]


def _flags_default(field: Field[Any]) -> Any:
    """The command line's default."""
    spelling = field.metadata["flag"]
    if spelling.default is not None:
        return spelling.default
    return getattr(_default(field), spelling.inner) if spelling.inner else _default(field)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def from_flags(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass of its flags' values; fields whose flag is not among them have their own defaults."""
    given: dict[str, Any] = {}
    for found in flags_of(kind):
        if found.name in values:
            given |= found.field_values(kind, values[found.name])
    return kind(**given)


def to_flags(made: DataclassInstance) -> list[str]:
    """The words from which a command line makes this dataclass, without those that say a default.

    Raises ValueError for a value that no flag can say.
    """
    words: list[str] = []
    said: dict[str, Any] = {}
    for found in flags_of(type(made)):
        value = found.value_in(made)
        words += found.words(value) if found.by_hand or value != found.default else []
        said[found.name] = tuple(map(found.kind, value)) if len(found.fields) > 1 else value
    heard = from_flags(type(made), said)
    for name in (f.name for f in fields(made)):
        if getattr(heard, name) != getattr(made, name):
            raise ValueError(f"{name} is {getattr(made, name)!r}; no flag says that")
    return words


def _text(value: Any) -> str:
    """A value as a word: a number as short as it can be read back."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
