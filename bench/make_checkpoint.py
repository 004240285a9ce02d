"""Make a random checkpoint of a named OPT size, in the hub's layout, in little memory.

    python bench/make_checkpoint.py 6.7b DIR --dtype bfloat16 --format safetensors --layers 8

Every tensor is drawn from its own seed, in pieces, so the weights do not depend on the format or the sharding. A
safetensors shard is streamed; a .bin shard is held in memory while it is written. A complete checkpoint is reused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from limits import drop_page_cache, parse_bytes

# blocks, heads, hidden size (Zhang et al., 2022, OPT, table 1; Galactica: Taylor et al., 2022, table 5)
SIZES = {
    "125m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "1.3b": (24, 32, 2048),
    "2.7b": (32, 32, 2560),
    "6.7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
    "30b": (48, 56, 7168),
    "galactica-30b": (48, 56, 7168),
    "66b": (64, 72, 9216),
    "175b": (96, 96, 12288),
}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # our name: safetensors' name
SHARD_BYTES = {"safetensors": 4 * 10**9, "bin": 10**9}  # a .bin shard is held in memory
PIECE = 2**22  # numbers drawn at a time: 16 MiB of float32
MARKER = "random_checkpoint.json"

Named = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that the bytes of a checkpoint depend on."""

    size: str
    layers: int
    dtype: str
    format: str
    seed: int
    shard_bytes: int


def opt_config(recipe: Recipe) -> dict[str, Any]:
    """The model's config.json."""
    _, heads, hidden = SIZES[recipe.size]
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "gelu" if recipe.size.startswith("galactica") else "relu",
        "do_layer_norm_before": recipe.size != "350m",
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "ffn_dim": 4 * hidden,
        "hidden_size": hidden,
        "init_std": 0.02,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": recipe.layers,
        "vocab_size": 50000 if recipe.size.startswith("galactica") else 50272,
        "word_embed_proj_dim": 512 if recipe.size == "350m" else hidden,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "use_cache": True,
        "torch_dtype": recipe.dtype,
    }


def opt_tensors(config: dict[str, Any]) -> Iterator[Named]:
    """Names and shapes of an OPT checkpoint, in order; the tied lm_head is left out."""
    hidden, ffn, projected = config["hidden_size"], config["ffn_dim"], config["word_embed_proj_dim"]
    yield "model.decoder.embed_tokens.weight", (config["vocab_size"], projected)
    yield "model.decoder.embed_positions.weight", (config["max_position_embeddings"] + 2, hidden)
    if projected != hidden:
        yield "model.decoder.project_out.weight", (projected, hidden)
        yield "model.decoder.project_in.weight", (hidden, projected)
    linears = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkv"} | {"self_attn.out_proj": (hidden, hidden)}
    linears |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.decoder.layers.{block}"
        for name, shape in linears.items():
            yield f"{prefix}.{name}.weight", shape
            yield f"{prefix}.{name}.bias", shape[:1]
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            yield from _layer_norm(f"{prefix}.{name}", hidden)
    if config["do_layer_norm_before"]:
        yield from _layer_norm("model.decoder.final_layer_norm", hidden)


def _layer_norm(name: str, hidden: int) -> Iterator[Named]:
    yield f"{name}.weight", (hidden,)
    yield f"{name}.bias", (hidden,)


def random_pieces(tensor: Named, recipe: Recipe) -> Iterator[torch.Tensor]:
    """A tensor's numbers in flat pieces: normal, deviation 0.02 around 0, or 0.1 around 1 for layer-norm weights."""
    name, shape = tensor
    digest = hashlib.sha256(f"{recipe.seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    mean, deviation = (1.0, 0.1) if name.endswith("layer_norm.weight") else (0.0, 0.02)
    for start in range(0, prod(shape), PIECE):
        piece = torch.empty(min(PIECE, prod(shape) - start))
        yield piece.normal_(mean, deviation, generator=generator).to(getattr(torch, recipe.dtype))


def cut_shards(tensors: Iterable[Named], itemsize: int, shard_bytes: int) -> list[list[Named]]:
    """Tensors in order, as many to a shard as fit; a larger tensor has its own."""
    shards: list[list[Named]] = []
    room = 0
    for tensor in tensors:
        nbytes = prod(tensor[1]) * itemsize
        if not shards or nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= nbytes
    return shards


def write_safetensors(path: Path, tensors: list[Named], recipe: Recipe) -> None:
    """Streams a safetensors file: length of the header, JSON header padded to 8 bytes, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + prod(shape) * getattr(torch, recipe.dtype).itemsize
        header[name] = {"dtype": DTYPES[recipe.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in random_pieces(tensor, recipe):
                file.write(piece.view(torch.uint8).numpy().tobytes())


def write_bin(path: Path, tensors: list[Named], recipe: Recipe) -> None:
    """Writes a pytorch_model shard, held in memory."""
    state = {}
    for name, shape in tensors:
        flat = torch.empty(prod(shape), dtype=getattr(torch, recipe.dtype))
        for index, piece in enumerate(random_pieces((name, shape), recipe)):
            flat[index * PIECE : index * PIECE + piece.numel()] = piece
        state[name] = flat.view(shape)
    torch.save(state, path)


def _write_weights(directory: Path, recipe: Recipe) -> None:
    tensors = list(opt_tensors(opt_config(recipe)))
    itemsize = getattr(torch, recipe.dtype).itemsize
    shards = cut_shards(tensors, itemsize, recipe.shard_bytes)
    stem, suffix, write = {
        "safetensors": ("model", "safetensors", write_safetensors),
        "bin": ("pytorch_model", "bin", write_bin),
    }[recipe.format]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = directory / f"{stem}{part}.{suffix}"
        write(path, shard, recipe)
        drop_page_cache(path)
        weight_map |= {name: path.name for name, _ in shard}
    if len(shards) > 1:
        total = sum(prod(shape) for _, shape in tensors) * itemsize
        _write_json(
            directory / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def make_checkpoint(directory: Path, recipe: Recipe) -> bool:
    """Makes the checkpoint in `directory`, whole or not at all; False when it is there already.

    Raises FileExistsError when the directory holds anything else.
    """
    if is_complete(directory, recipe):
        return False
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and is not this checkpoint; remove it or name another directory")
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, recipe)
        _write_json(partial / "config.json", opt_config(recipe))
        _write_json(partial / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1})
        files = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
        _write_json(partial / MARKER, {"recipe": asdict(recipe), "files": files})
        partial.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def is_complete(directory: Path, recipe: Recipe) -> bool:
    """Return True if the directory holds this recipe's checkpoint with every file at its size."""
    marker = directory / MARKER
    if not marker.exists():
        return False
    made = json.loads(marker.read_text())
    sizes_match = all(
        (directory / n).exists() and (directory / n).stat().st_size == s for n, s in made["files"].items()
    )
    return bool(made["recipe"] == asdict(recipe)) and sizes_match


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Makes the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a random OPT checkpoint.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--format", choices=SHARD_BYTES, default="safetensors")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the size has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=parse_bytes, help="largest shard (default 4GB, or 1GB for .bin)")
    args = parser.parse_args(argv)
    layers = SIZES[args.size][0] if args.layers is None else args.layers
    if layers < 1:
        parser.error(f"--layers is {layers}; it must be at least 1")
    shard_bytes = args.shard or SHARD_BYTES[args.format]
    recipe = Recipe(args.size, layers, args.dtype, args.format, args.seed, shard_bytes)
    try:
        made = make_checkpoint(args.directory, recipe)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.directory}: OPT-{args.size}, {layers} layers, {'made' if made else 'complete already'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
