"""Files that are not what their name says are refused in one sentence: nothing hangs, runs or is opened outside."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import socket
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from test_checkpoint import (
    assert_same,
    contents,
    expected,
    make_checkpoint,
    make_spec,
    refused,
    save_bin,
    save_safetensors,
    sharded_bin,
    sharded_safetensors,
    unindexed_safetensors,
)
from torch import Tensor

from flexgen_triton.jobs.job import files_digest
from flexgen_triton.memory.store import MANIFEST, Store, StoreError
from flexgen_triton.models.checkpoint import CheckpointError, open_store
from flexgen_triton.models.config import ModelError
from flexgen_triton.models.sources import BinWeights

SECONDS = 2.0
DEEP = "[" * 100_000

# Pickles that run code


class MakesDirectory:
    """A pickle that does something when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def zipped(file: Path, data: bytes) -> None:
    """An archive as torch.save makes it, with any pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")


PAYLOADS: dict[str, Callable[[Path, Any], None]] = {
    "torch.save": lambda file, bad: torch.save({"a": bad, "w": torch.zeros(3)}, file),
    "torch.save, protocol 4": lambda file, bad: torch.save({"a": bad}, file, pickle_protocol=4),
    "zip, protocol 0": lambda file, bad: zipped(file, pickle.dumps({"a": bad}, 0)),
    "zip, protocol 5": lambda file, bad: zipped(file, pickle.dumps({"a": bad}, 5)),
    "bare, protocol 0": lambda file, bad: file.write_bytes(pickle.dumps({"a": bad}, 0)),
    "bare, protocol 5": lambda file, bad: file.write_bytes(pickle.dumps({"a": bad}, 5)),
    "legacy": lambda file, bad: torch.save({"a": bad}, file, _use_new_zipfile_serialization=False),
}


class Everything(pickle.Unpickler):
    """Python's own way to load a pickle, which runs what it is told to."""

    def persistent_load(self, identity: Any) -> None:
        return None


def load_with_pickle(file: Path) -> None:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
            stream = io.BytesIO(archive.read(name))
    else:
        stream = io.BytesIO(file.read_bytes())
    while stream.tell() < len(stream.getvalue()):
        try:
            Everything(stream).load()
        except (pickle.UnpicklingError, EOFError, AttributeError):  # what follows it: storages, tensors without them
            return


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_pickle_that_asks_to_run_code_is_called_that(tmp_path: Path, payload: str) -> None:
    source, trace = tmp_path / "checkpoint", tmp_path / "trace"
    source.mkdir()
    file = source / "pytorch_model.bin"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of an unusual protocol
        PAYLOADS[payload](file, MakesDirectory(trace))
    with pytest.raises(CheckpointError) as caught:
        BinWeights([file])
    assert not trace.exists()
    assert str(caught.value).startswith(f"{file} asks to run code when it is loaded (posix.mkdir")
    assert "do not load it" in str(caught.value) and "safetensors from a source that you trust" in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # nor in a traceback
    for advice in ("weights_only", "truncated", "download it again", "current torch"):
        assert advice not in str(caught.value)
    load_with_pickle(file)
    assert trace.exists()  # it would have


def test_names_in_a_pickle_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"\x80\x04\x8c\x07\x1b[2Jbad\x94\x8c\x0c" + b"x\n" * 6 + b"\x94\x93.")
    with pytest.raises(CheckpointError, match=r"asks to run code .*\\x1b\[2Jbad\.x\\nx") as caught:
        BinWeights([file])
    assert str(caught.value).isprintable()


def test_a_damaged_pickle_never_ends_in_a_traceback(tmp_path: Path) -> None:
    file, trace, rng = tmp_path / "pytorch_model.bin", tmp_path / "trace", random.Random(5)
    kinds = []
    for save in list(PAYLOADS.values())[:3]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(file, MakesDirectory(trace))
        kinds.append(file.read_bytes())
    for _ in range(150):
        data = bytearray(rng.choice(kinds))
        for _ in range(rng.choice([1, 5])):
            data[rng.randrange(min(len(data), 1000))] = rng.randrange(256)
        file.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            BinWeights([file])
        except CheckpointError as error:
            words = str(error)
        else:
            words = ""
        assert "weights_only" not in words and "\n" not in words
    assert not trace.exists()


def quantised(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(weight.float(), 0.1, 0, torch.qint8)


def nested(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(weight.split([len(weight) - 1, 1])))


def compressed(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight.to_sparse_csr()


FORMS = [
    pytest.param(lambda w: w.to_sparse(), r"a sparse tensor; save what its to_dense\(\)", id="sparse"),
    pytest.param(compressed, r"a sparse tensor; save what its to_dense\(\)", id="sparse rows"),
    pytest.param(nested, "a nested tensor; save it as one", id="nested"),
    pytest.param(lambda w: w.to("meta"), "a meta tensor, which has a shape but no numbers; save", id="meta"),
    pytest.param(quantised, r"a quantised tensor; save what its dequantize\(\)", id="quantised"),
]


@pytest.mark.parametrize(("form", "words"), FORMS)
def test_a_tensor_that_is_no_block_of_numbers_is_named(
    tmp_path: Path, form: Callable[[Tensor], Tensor], words: str
) -> None:
    spec, name = make_spec(), "decoder.layers.1.fc2.weight"

    def save_one(directory: Path, weights: dict[str, Tensor]) -> None:
        save_bin(directory, {n: form(t) if name in n else t for n, t in weights.items()})

    source, _ = make_checkpoint(tmp_path, spec, save_one)
    with pytest.raises(CheckpointError, match=f"^{source} has {name} as {words}.*$"):
        open_store(spec, source, tmp_path / "offload")


def test_such_a_tensor_that_the_model_does_not_use_is_none_of_its_business(tmp_path: Path) -> None:
    spec = make_spec()

    def save_one(directory: Path, weights: dict[str, Tensor]) -> None:
        used = {n: torch.nn.Parameter(t) for n, t in weights.items()}
        save_bin(directory, used | {"more": nested(weights["model.unused"])})

    source, weights = make_checkpoint(tmp_path, spec, save_one)
    assert_same(contents(spec, open_store(spec, source, tmp_path / "offload")), expected(spec, weights))


# Files that are no files


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")  # a path of its own may be too long
    finally:
        os.close(here)


def link_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


KINDS = {
    "a FIFO, not a file": make_fifo,
    "a socket, not a file": make_socket,
    "a directory, not a file": Path.mkdir,
    "a device, not a file": link_device,
    "cannot be read": link_nowhere,
}
NAMES = {
    "model.safetensors": save_safetensors,
    "weights-00002-of-00003.safetensors": unindexed_safetensors,
    "model-00002-of-00003.safetensors": sharded_safetensors,
    "model.safetensors.index.json": sharded_safetensors,
    "pytorch_model.bin": save_bin,
    "pytorch_model-00002-of-00003.bin": sharded_bin,
    "pytorch_model.bin.index.json": sharded_bin,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    source, _ = make_checkpoint(tmp_path, make_spec(), NAMES[name])
    (source / name).unlink()
    KINDS[kind](source / name)
    start = time.monotonic()
    message = refused(tmp_path, source)
    assert time.monotonic() - start < SECONDS
    is_missing = kind == "cannot be read" and f"lacks 1 of 3 shards: {name}" in message
    assert name in message and (kind in message or is_missing)


def test_nor_does_a_job_wait_for_it_when_it_tells_models_apart(tmp_path: Path) -> None:
    make_fifo(tmp_path / "model.safetensors")
    start = time.monotonic()
    with pytest.raises(ModelError, match=f"^{tmp_path}/model.safetensors is no ordinary file"):
        files_digest(tmp_path)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_is_no_file_is_made_anew_at_once(tmp_path: Path, kind: str) -> None:
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save_bin)
    manifest = open_store(spec, source, tmp_path / "offload").files[0].parent / MANIFEST
    manifest.unlink()
    KINDS[kind](manifest)
    start = time.monotonic()
    assert_same(contents(spec, open_store(spec, source, tmp_path / "offload")), expected(spec, weights))
    assert time.monotonic() - start < SECONDS
    assert list((tmp_path / "offload").iterdir()) == [manifest.parent] and manifest.is_file()


# Indexes and manifests


@pytest.mark.parametrize(
    ("index", "words"),
    [
        pytest.param(DEEP, "is not an index of shards", id="deep"),
        pytest.param('{"weight_map": {"a": ' + DEEP, "is not an index of shards", id="deep inside"),
        pytest.param(json.dumps({"weight_map": {"a": "x" * 5000}}), "x{80}... of 5000 characters; download", id="long"),
        pytest.param(json.dumps({"weight_map": {"a": "\x1b[2J"}}), r"shards: \\x1b\[2J; download", id="escape"),
        pytest.param(json.dumps({"weight_map": {"a": "\ud800"}}), r"shards: \\ud800; download", id="surrogate"),
        pytest.param(json.dumps({"weight_map": {"a": "a\0b"}}), r"shards: a\\x00b; download", id="nul"),
    ],
)
def test_a_strange_index_is_refused_in_one_sentence(tmp_path: Path, index: str, words: str) -> None:
    source, _ = make_checkpoint(tmp_path, make_spec(), sharded_safetensors)
    (source / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=f"{words}[^\n]*$") as caught:
        open_store(make_spec(), source, tmp_path / "offload")
    assert len(str(caught.value)) < 600


def body(manifest: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(manifest.read_text())["store"]
    return found


def rewrite(manifest: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and give it the checksum that it must have."""
    changed = body(manifest)
    changed = change(changed) or changed
    check = xxhash.xxh3_64_hexdigest(json.dumps(changed).encode())
    manifest.write_text(json.dumps({"xxh3_64": check, "store": changed}))


def set_file(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda b: b["files"][1].update({field: value})


def set_extent(n: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(b: dict[str, Any]) -> None:
        b["extents"]["attention.0"][0][n] = value

    return change


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "without extents": lambda b: b.pop("extents") and None,
    "of no modules": lambda b: b.update(extents={}),
    "without a module": lambda b: b["extents"].pop("mlp.1") and None,
    "without files": lambda b: b.update(files=[]),
    "a list": lambda b: [b],
    "extents in a list": lambda b: b.update(extents=[]),
    "an extent of two fields": lambda b: b["extents"].update(embed=[["a", 1]]),
    "an extent of another file": set_extent(4, 2),
    "an extent of no file": set_extent(4, 99),
    "an extent of the last file but one": set_extent(4, -2),
    "another offset": set_extent(5, 8192),
    "an offset beyond the file": set_extent(5, 1 << 40),
    "a negative offset": set_extent(5, -4096),
    "a fractional offset": set_extent(5, 4096.0),
    "an offset in words": set_extent(5, "4096"),
    "rows in a list": set_extent(2, [1]),
    "a size in words": set_file("bytes", "8192"),
    "no checksums": set_file("xxh3_64", None),
    "checksums of fewer chunks": set_file("xxh3_64", ""),
    "checksums that are no base64": set_file("xxh3_64", "?"),
    "checksums that are a number": set_file("xxh3_64", 7),
    "another alignment": lambda b: b.update(align=4096),
    "alignment 0": lambda b: b.update(align=0),
    "another dtype": lambda b: b.update(dtype="bfloat16"),
    "dtype a number": lambda b: b.update(dtype=16),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_manifest_of_wrong_fields_is_made_anew(tmp_path: Path, damage: str) -> None:
    """Although its checksum is right."""
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save_bin)
    store = open_store(spec, source, tmp_path / "offload")
    manifest = store.files[0].parent / MANIFEST
    rewrite(manifest, MANIFESTS[damage])
    found = open_store(spec, source, tmp_path / "offload")
    assert found == store
    assert_same(contents(spec, found), expected(spec, weights))


@pytest.mark.parametrize(
    "text", [DEEP, '{"store": ' + DEEP, '{"store": {"a":' * 50_000], ids=["list", "store", "dicts"]
)
def test_a_deep_manifest_is_made_anew(tmp_path: Path, text: str) -> None:
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save_bin)
    manifest = open_store(spec, source, tmp_path / "offload").files[0].parent / MANIFEST
    manifest.write_text(text)
    assert_same(contents(spec, open_store(spec, source, tmp_path / "offload")), expected(spec, weights))


def absolute(store: Path, secret: Path) -> str:
    return str(secret)


def climbing(store: Path, secret: Path) -> str:
    return os.path.relpath(secret, store)


def inside_a_folder(store: Path, secret: Path) -> str:
    (store / "folder").mkdir()
    secret.rename(store / "folder" / "file")
    return "folder/file"


def a_link_outside(store: Path, secret: Path) -> str:
    (store / "link").symlink_to(secret)
    return "link"


def itself(store: Path, secret: Path) -> str:
    return "."


def nothing(store: Path, secret: Path) -> str:
    return ""


@pytest.mark.parametrize("name", [absolute, climbing, inside_a_folder, a_link_outside, itself, nothing])
def test_a_manifest_cannot_name_a_file_outside_of_its_store(tmp_path: Path, name: Callable[[Path, Path], str]) -> None:
    """A file of the right size and content, named by a manifest with a checksum that the store itself made."""
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save_bin)
    store = open_store(spec, source, tmp_path / "offload")
    directory, secret = store.files[0].parent, tmp_path / "secret"
    secret.write_bytes(store.files[1].read_bytes())
    named = name(directory, secret)

    class Named(type(secret)):  # type: ignore[misc]
        """A path that `Store.save` writes as it was chosen here."""

        @property
        def name(self) -> str:
            return named

    files = (store.files[0], Named(secret), *store.files[2:])
    Store(files, store.sizes, store.extents, store.dtype, store.align, store.checks).save(directory)
    assert body(directory / MANIFEST)["files"][1]["name"] == named
    with pytest.raises(StoreError, match=f"{MANIFEST} is missing or damaged"):
        Store.load(directory)
    found = open_store(spec, source, tmp_path / "offload")
    assert all(f.parent == directory and not f.is_symlink() for f in found.files)
    assert_same(contents(spec, found), expected(spec, weights))


def test_weights_of_other_names_are_read_all_the_same(tmp_path: Path) -> None:
    """A link to a file is as good as the file: the hub's cache is made of them."""
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save_safetensors)
    blob = (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(blob)
    assert_same(contents(spec, open_store(spec, source, tmp_path / "offload")), expected(spec, weights))
