"""Model directories that cannot be run, by name: each is the demo with one thing wrong, and words that must be said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexgen_triton.demo import DEMO_DIR

CONFIG: dict[str, Any] = json.loads((DEMO_DIR / "config.json").read_text())
TOKENIZER: dict[str, Any] = json.loads((DEMO_DIR / "tokenizer.json").read_text())
HUGE = 10**12
Make = Callable[[Path], object]

FIELDS: dict[str, tuple[dict[str, Any], str]] = {  # what is changed, words of the sentence
    "layers 1e9": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number from 1"),
    "layers 1e9 as a float": ({"num_hidden_layers": 1e9}, "num_hidden_layers is 1000000000.0"),
    "layers 0": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "layers -1": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "layers 1.5": ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    "layers true": ({"num_hidden_layers": True}, "num_hidden_layers is true"),
    "layers null": ({"num_hidden_layers": None}, "num_hidden_layers is null"),
    "hidden null": ({"hidden_size": None}, "hidden_size is null"),
    "hidden a text": ({"hidden_size": "128"}, 'hidden_size is "128"'),
    "hidden 1e12": ({"hidden_size": HUGE}, "hidden_size is 1000000000000"),
    "hidden 0": ({"hidden_size": 0}, "hidden_size is 0"),
    "hidden -8": ({"hidden_size": -8}, "hidden_size is -8"),
    "hidden 100 of 3 heads": ({"hidden_size": 100, "num_attention_heads": 3}, "is not a multiple of 3 heads"),
    "hidden a list": ({"hidden_size": [192]}, "hidden_size is a list of 1"),
    "hidden of 400 digits": ({"hidden_size": 10**400}, "hidden_size is 1000"),
    "heads 0": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "heads -4": ({"num_attention_heads": -4}, "num_attention_heads is -4"),
    "ffn 0": ({"ffn_dim": 0}, "ffn_dim is 0"),
    "ffn an object": ({"ffn_dim": {}}, "ffn_dim is an object"),
    "vocabulary 0": ({"vocab_size": 0}, "vocab_size is 0"),
    "vocabulary 1e12": ({"vocab_size": HUGE}, "vocab_size is 1000000000000"),
    "positions 0": ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    "activation a list": ({"activation_function": []}, "activation_function is a list of 0"),
    "activation unknown": ({"activation_function": "mish"}, 'activation_function is "mish"; that is unknown'),
    "projection 0": ({"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0"),
    "projection a text": ({"word_embed_proj_dim": "x"}, 'word_embed_proj_dim is "x"'),
    "norm a number": ({"do_layer_norm_before": 1}, "do_layer_norm_before is 1; it must be true or false"),
    "tied a text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    "end -1": ({"eos_token_id": -1}, "eos_token_id is -1; it must be in the vocabulary"),
    "end 1e9": ({"eos_token_id": 10**9}, "eos_token_id is 1000000000"),
    "end a text": ({"eos_token_id": "</s>"}, 'eos_token_id is "</s>"; it must be one token id'),
    "two ends, one outside": ({"eos_token_id": [2, 4096]}, "eos_token_id is 4096; it must be in the vocabulary"),
    "no end in a list": ({"eos_token_id": []}, "eos_token_id is a list of 0"),
    "padding true": ({"pad_token_id": True}, "pad_token_id is true"),
    "padding outside": ({"pad_token_id": 4096}, "from 0 to 4095"),
    "beginning 0.5": ({"bos_token_id": 0.5}, "bos_token_id is 0.5"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, 'quantised by "gptq"'),
    "quantised somehow": ({"quantization_config": {}}, "quantization_config"),
    "dtype a number": ({"dtype": 16}, "dtype is 16"),
    "dtype an object": ({"dtype": {"a": 1}}, "dtype is an object"),
    "dtype unknown": ({"dtype": "float7"}, "dtype 'float7' is not supported"),
    "another family": ({"model_type": "gpt2"}, 'model_type is "gpt2"; this version runs opt'),
    "family a list": ({"model_type": []}, "model_type is a list of 0"),
    "all sizes large": (
        {"hidden_size": 1 << 20, "ffn_dim": 1 << 22, "num_hidden_layers": 9999, "num_attention_heads": 64},
        "parameters; at most 1e+14",
    ),
}


def text(name: str, value: object) -> Make:
    """Write a file, of text, bytes or JSON."""

    def make(directory: Path) -> None:
        data = value if isinstance(value, bytes | str) else json.dumps(value)
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return make


def fifo(name: str) -> Make:
    def make(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return make


def folder(name: str) -> Make:
    def make(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return make


def large(name: str, nbytes: int) -> Make:
    """A sparse file of zeros."""

    def make(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.truncate(nbytes)

    return make


def gone(*names: str) -> Make:
    def make(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return make


FORMS: dict[str, tuple[Make, str]] = {  # of config.json
    "config a list": (text("config.json", [CONFIG]), "holds a list of 1, not an object"),
    "config a number": (text("config.json", 5), "holds 5"),
    "config null": (text("config.json", None), "holds null"),
    "config a text": (text("config.json", '"opt"'), 'holds "opt"'),
    "config empty": (text("config.json", ""), "not valid JSON"),
    "config cut": (text("config.json", json.dumps(CONFIG)[:-5]), "not valid JSON"),
    "config not UTF-8": (text("config.json", b'{"model_type": "\xff\xfe"}'), "not UTF-8"),
    "config deep": (text("config.json", "[" * 100_000), "nested too deeply"),
    "config deep objects": (text("config.json", '{"a":' * 100_000), "nested too deeply"),
    "config of 5000 digits": (text("config.json", "1" * 5000), "not valid JSON"),
    "config a pipe": (fifo("config.json"), "no ordinary file"),
    "config a directory": (folder("config.json"), "no ordinary file"),
    "config of 300 MiB": (large("config.json", 300 << 20), "has 300.0 MiB; of such a file at most 16 are read"),
    "config gone": (gone("config.json"), "has no config.json"),
}


def part(**fields: Any) -> Make:
    return text("tokenizer.json", {**TOKENIZER, **fields})


def model_part(**fields: Any) -> Make:
    return part(model={**TOKENIZER["model"], **fields})


TOKENIZERS: dict[str, tuple[Make, str]] = {
    "tokenizer no JSON": (text("tokenizer.json", "{nope"), "tokenizer.json is not valid JSON"),
    "tokenizer a list": (text("tokenizer.json", [1]), "tokenizer.json holds a list"),
    "tokenizer of nothing": (text("tokenizer.json", {}), "its model is null"),
    "tokenizer not UTF-8": (text("tokenizer.json", b"\xff\xfe"), "not UTF-8"),
    "tokenizer deep": (text("tokenizer.json", "[" * 100_000), "nested too deeply"),
    "tokenizer a pipe": (fifo("tokenizer.json"), "no ordinary file"),
    "tokenizer of another kind": (model_part(type="Nope"), "makes no tokenizer"),
    "tokenizer's bad merges": (model_part(merges=[["zzqq", "qqzz"]]), "Token `zzqq` out of vocabulary"),
    "tokenizer without tokens": (model_part(vocab={}, merges=[]), "knows no text"),
    "tokenizer without added tokens": (
        text("tokenizer.json", {k: v for k, v in TOKENIZER.items() if k != "added_tokens"}),
        "makes no tokenizer ('added_tokens')",
    ),
    "tokenizer's added tokens a number": (part(added_tokens=5), "makes no tokenizer"),
    "tokenizer's config a list": (text("tokenizer_config.json", [1]), "tokenizer_config.json holds a list"),
    "tokenizer's config deep": (text("tokenizer_config.json", "[" * 100_000), "nested too deeply"),
    "tokenizer's class a number": (text("tokenizer_config.json", {"tokenizer_class": 5}), "makes no tokenizer"),
    "tokenizer's special tokens no JSON": (text("special_tokens_map.json", "x"), "special_tokens_map.json is not"),
    "tokenizer gone": (gone("tokenizer.json", "tokenizer_config.json"), "has no tokenizer (tokenizer.json"),
    "tokenizer's vocabulary alone": (
        lambda d: (gone("tokenizer.json")(d), text("vocab.json", {"a": 0})(d)),
        "makes no tokenizer",
    ),
}

CASES: dict[str, tuple[Make, str]] = {
    **{name: (text("config.json", {**CONFIG, **change}), words) for name, (change, words) in FIELDS.items()},
    **FORMS,
    **TOKENIZERS,
}


def bad_model(root: Path, name: str) -> Path:
    """The directory of that case, made under `root`."""
    directory = root / name.replace(" ", "-")
    directory.mkdir()
    for file in DEMO_DIR.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, directory)
        elif file.suffix == ".safetensors":
            (directory / file.name).symlink_to(file)
    CASES[name][0](directory)
    return directory
