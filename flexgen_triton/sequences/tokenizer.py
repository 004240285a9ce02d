"""A model's own tokenizer, from the files of its directory; the one place that imports transformers.

Whatever is wrong with the files is a ModelError in one sentence that names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..models.config import ModelError
from ..plan.json_file import MIB, JsonError, kind_of, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")  # one of these makes a tokenizer
JSON_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_BYTES = 256 * MIB
TRIAL = "a trial"
SHOWN = 160  # characters of the library's own reason


def has_tokenizer(directory: Path | None) -> bool:
    """Return True if a model came with a tokenizer."""
    return directory is not None and any((directory / name).exists() for name in VOCABULARIES)


def check_files(directory: Path) -> None:
    """Raise ModelError for a file of a tokenizer that is no JSON, or of another structure; loads nothing."""
    for name in JSON_FILES:
        path = directory / name
        if not path.exists():
            continue
        try:
            found = read_object(path, most=MAX_BYTES)
        except JsonError as error:
            raise ModelError(f"{error}; {_way_out(directory)}") from error
        if name == "tokenizer.json" and not isinstance(found.get("model"), dict):
            raise ModelError(f"{path}: its model is {kind_of(found.get('model'))}; {_way_out(directory)}")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory; raises ModelError where there is none, or none that works."""
    if not has_tokenizer(directory):
        raise ModelError(
            f"{directory} has no tokenizer ({', '.join(VOCABULARIES[:2])}); download it, or give prompts as token ids"
        )
    check_files(directory)
    main = next(directory / name for name in VOCABULARIES if (directory / name).exists())
    try:
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        works = bool(str(tokenizer.decode(tokenizer(TRIAL)["input_ids"], skip_special_tokens=True)))
    except (KeyboardInterrupt, SystemExit, ImportError, MemoryError):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception for a bad file, or panics
        reason = " ".join(str(error).split())[:SHOWN] or type(error).__name__
        raise ModelError(f"{main} makes no tokenizer ({reason}); {_way_out(directory)}") from error
    if not works:
        raise ModelError(f"{main} makes a tokenizer that knows no text; {_way_out(directory)}")
    return tokenizer


def _way_out(directory: Path) -> str:
    return f"download {directory.name}'s tokenizer again, or remove its files and give prompts as token ids"
