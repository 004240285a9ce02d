"""Every kind of checkpoint yields the same tensors, once; what cannot be used is refused in one sentence."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from flexgen_triton.memory.arena import peak_rss, reset_peak_rss, rss
from flexgen_triton.memory.store import MANIFEST, Store
from flexgen_triton.models import checkpoint, parts, sources
from flexgen_triton.models.checkpoint import CheckpointError, open_store
from flexgen_triton.plan.placement import ALIGN, packed_layout
from flexgen_triton.plan.spec import ModelSpec, ModuleSpec, StageSpec, State, TensorSpec

HIDDEN, FFN, VOCAB = 48, 80, 101


def matrix(name: str, rows: int, columns: int, *sources: str, row: int = 0) -> TensorSpec:
    return TensorSpec(name, (rows, columns), sources, (rows // len(sources),) * len(sources), row=row)


def vector(name: str, *sources: str) -> TensorSpec:
    return TensorSpec(name, (HIDDEN * len(sources),), sources, (HIDDEN,) * len(sources))


def one_stage(kind: str, index: int, *tensors: TensorSpec) -> ModuleSpec:
    return parts.module(kind, index, StageSpec(kind, tensors))


def block(n: int) -> list[ModuleSpec]:
    at = f"decoder.layers.{n}"
    qkv = [f"{at}.self_attn.{p}_proj" for p in "qkv"]
    attention = (
        vector("norm.weight", f"{at}.attn_norm.weight"),
        matrix("qkv.weight", 3 * HIDDEN, HIDDEN, *(f"{s}.weight" for s in qkv)),
        vector("qkv.bias", *(f"{s}.bias" for s in qkv)),
    )
    mlp = (
        matrix("fc1.weight", FFN, HIDDEN, f"{at}.fc1.weight"),
        matrix("fc2.weight", HIDDEN, FFN, f"{at}.fc2.weight"),
    )
    stage = StageSpec("project", attention, state=State(3, 16))
    return [parts.module("attention", n, stage), one_stage("mlp", n, *mlp)]


def make_spec(dtype: str = "float16", blocks: int = 2) -> ModelSpec:
    """An embedding, decoder layers, and an output projection cut over two modules."""
    head = [
        one_stage("head", n, matrix("tokens.weight", high - low, HIDDEN, "decoder.tokens.weight", row=low))
        for n, (low, high) in enumerate(pairwise((0, 60, VOCAB)))
    ]
    embed = one_stage("embed", 0, matrix("positions.weight", 30, HIDDEN, "decoder.positions.weight"))
    modules = [m.stored_as(dtype) for m in (embed, *(m for n in range(blocks) for m in block(n)), *head)]
    return ModelSpec("someone/Tiny model", "opt", dtype, HIDDEN, blocks, 3, VOCAB, 28, tuple(modules))


def make_weights(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Checkpoint tensors under their plain names, and one that the model does not use."""
    generator = torch.Generator().manual_seed(11)
    shapes = {**sources.source_shapes(spec), "unused": (5, 5)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def expected(spec: ModelSpec, weights: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """(module, tensor) -> its rows, concatenated and cut, in the model's dtype."""
    found = {}
    for module in spec.modules:
        for t in module.tensors:
            whole = torch.cat([weights[s] for s in t.sources])
            found[module.name, t.name] = whole[t.row : t.row + t.shape[0]].to(getattr(torch, spec.dtype))
    return found


def contents(spec: ModelSpec, store: Store) -> dict[tuple[str, str], Tensor]:
    """The same read by the store's extents, as the engine would; every byte is checked where there are checksums."""
    data = [f.read_bytes() for f in store.files]
    for n, content in enumerate(data):
        assert len(content) == store.sizes[n]
        store.verify(n, 0, memoryview(content))
    found = {}
    for module in spec.modules:
        for t in module.tensors:
            extents = sorted((e for e in store.extents[module.name] if e.tensor == t.name), key=lambda e: e.row)
            assert extents[0].row == t.row
            for a, b in pairwise(extents):
                step = a.rows if len(t.shape) > 1 else a.row_bytes // spec.itemsize
                assert b.row == a.row + step
            raw = bytearray(b"".join(data[e.file][e.offset : e.end] for e in extents))
            found[module.name, t.name] = torch.frombuffer(raw, dtype=getattr(torch, spec.dtype)).view(t.shape)
    return found


def assert_same(found: dict[tuple[str, str], Tensor], wanted: dict[tuple[str, str], Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


# Ways in which a checkpoint may lie on disk


def save_safetensors(directory: Path, weights: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(weights, directory / "model.safetensors")


def save_bin(directory: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, directory / "pytorch_model.bin")


def save_sharded(
    directory: Path, weights: dict[str, Tensor], stem: str, suffix: str, save: Callable[[Any, Path], None], index: bool
) -> None:
    names, table = list(weights), {}
    for n in range(3):
        shard = f"{stem}-{n + 1:05d}-of-00003.{suffix}"
        save({name: weights[name] for name in names[n::3]}, directory / shard)
        table.update(dict.fromkeys(names[n::3], shard))
    if index:
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def sharded_safetensors(directory: Path, weights: dict[str, Tensor]) -> None:
    save_sharded(directory, weights, "model", "safetensors", safetensors.torch.save_file, index=True)


def unindexed_safetensors(directory: Path, weights: dict[str, Tensor]) -> None:
    save_sharded(directory, weights, "weights", "safetensors", safetensors.torch.save_file, index=False)


def sharded_bin(directory: Path, weights: dict[str, Tensor]) -> None:
    save_sharded(directory, weights, "pytorch_model", "bin", torch.save, index=True)


def unindexed_bin(directory: Path, weights: dict[str, Tensor]) -> None:
    save_sharded(directory, weights, "pytorch_model", "bin", torch.save, index=False)


def transposed_bin(directory: Path, weights: dict[str, Tensor]) -> None:
    save_bin(directory, {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in weights.items()})


SAFE = [save_safetensors, sharded_safetensors, unindexed_safetensors]
BIN = [save_bin, sharded_bin, unindexed_bin, transposed_bin]
PREFIXES = ["", "model.", "model.model."]


def make_checkpoint(
    tmp_path: Path,
    spec: ModelSpec,
    save: Callable[[Path, dict[str, Tensor]], None],
    dtype: torch.dtype = torch.float16,
    prefix: str = "model.",
) -> tuple[Path, dict[str, Tensor]]:
    source = tmp_path / "checkpoint"
    source.mkdir()
    weights = make_weights(spec, dtype)
    save(source, {prefix + name: t for name, t in weights.items()})
    return source, weights


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("save", SAFE)
def test_safetensors_of_the_same_dtype_are_read_where_they_lie(
    tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None], prefix: str
) -> None:
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save, prefix=prefix)
    store = open_store(spec, source, tmp_path / "offload")
    assert_same(contents(spec, store), expected(spec, weights))
    assert not (tmp_path / "offload").exists()
    assert all(f.parent == source for f in store.files)
    assert store.align == ALIGN
    assert store.weight_bytes == spec.weight_bytes


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("save", BIN)
def test_a_bin_checkpoint_is_converted_to_the_same_tensors(
    tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None], prefix: str
) -> None:
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save, prefix=prefix)
    store = open_store(spec, source, tmp_path / "offload")
    assert_same(contents(spec, store), expected(spec, weights))
    assert store.extents == {m.name: tuple(e) for m, e in zip(spec.modules, packed_layout(spec.modules), strict=True)}


@pytest.mark.parametrize("save", [save_safetensors, save_bin])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", ["float32", "float16", "bfloat16"])
def test_every_dtype_becomes_every_other(
    tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None], dtype: torch.dtype, to: str
) -> None:
    spec = make_spec(to)
    source, weights = make_checkpoint(tmp_path, spec, save, dtype)
    assert_same(contents(spec, open_store(spec, source, tmp_path / "offload")), expected(spec, weights))


def test_large_tensors_are_converted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 1000)
    monkeypatch.setattr(sources, "MAPPED_BYTES", 5000)
    spec = make_spec("bfloat16")
    for save in (save_safetensors, sharded_bin):
        root = tmp_path / save.__name__
        root.mkdir()
        source, weights = make_checkpoint(root, spec, save, torch.float32)
        assert_same(contents(spec, open_store(spec, source, root / "offload")), expected(spec, weights))


def test_a_converted_module_is_a_file_that_safetensors_reads(tmp_path: Path) -> None:
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save_bin)
    store = open_store(spec, source, tmp_path / "offload")
    assert [f.name for f in store.files] == [f"{m.name}.safetensors" for m in spec.modules]
    found = safetensors.torch.load_file(store.files[1])
    wanted = expected(spec, weights)
    assert {name: t.tolist() for name, t in found.items()} == {
        name: t.tolist() for (module, name), t in wanted.items() if module == "attention.0"
    }


def test_safetensors_are_preferred_to_bin(tmp_path: Path) -> None:
    spec = make_spec()
    source, _ = make_checkpoint(tmp_path, spec, save_safetensors)
    (source / "pytorch_model.bin").write_bytes(b"never opened")
    open_store(spec, source, tmp_path / "offload")


def test_a_module_of_many_tensors_has_a_header_of_several_pages(tmp_path: Path) -> None:
    tensors = tuple(matrix(f"a rather long name of tensor {n}.weight", 2, 3, f"t{n}") for n in range(60))
    spec = replace(make_spec(), modules=(one_stage("embed", 0, *tensors).stored_as("float16"),))
    source, weights = make_checkpoint(tmp_path, spec, save_bin)
    store = open_store(spec, source, tmp_path / "offload")
    assert store.extents["embed"][0].offset > ALIGN
    assert store.extents["embed"][0].offset % ALIGN == 0
    assert_same(contents(spec, store), expected(spec, weights))


@pytest.mark.parametrize("shift", [1, 2])
def test_tensors_between_their_elements_are_not_read_in_place(tmp_path: Path, shift: int) -> None:
    """Old writers did not pad the header; float16 may then begin at an odd byte."""
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save_safetensors)
    file = source / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    padding = b" " * shift
    file.write_bytes((length + shift).to_bytes(8, "little") + content[8 : 8 + length] + padding + content[8 + length :])
    store = open_store(spec, source, tmp_path / "offload")
    assert_same(contents(spec, store), expected(spec, weights))
    assert (store.files[0].parent == source) == (shift == 2)


# Random weights


def test_random_weights_are_random_repeatable_and_stored_alike(tmp_path: Path) -> None:
    spec = make_spec()
    first = open_store(spec, None, tmp_path, seed=1)
    found = contents(spec, first)
    for (_, name), t in found.items():
        values = t.float()
        assert len(values.unique()) > values.numel() // 4, name
        mean = 1.0 if name == "norm.weight" else 0.0
        assert abs(float(values.mean()) - mean) < 5 * 0.02 / values.numel() ** 0.5, name
        assert 0.5 * 0.02 < float(values.std()) < 1.5 * 0.02, name
    again = contents(spec, open_store(spec, None, tmp_path / "other", seed=1))
    assert_same(again, found)
    second = contents(spec, open_store(spec, None, tmp_path, seed=2))
    assert not any(torch.equal(second[key], t) for key, t in found.items())
    assert len(list(tmp_path.glob("Tiny-model-*"))) == 2


def test_rows_of_a_random_table_do_not_depend_on_how_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 1000)
    spec = make_spec()
    whole_head = one_stage("head", 0, matrix("tokens.weight", VOCAB, HIDDEN, "decoder.tokens.weight"))
    whole = replace(spec, modules=(*spec.modules[:-2], whole_head.stored_as(spec.dtype)))
    cut, uncut = contents(spec, open_store(spec, None, tmp_path)), contents(whole, open_store(whole, None, tmp_path))
    parts = torch.cat([cut["head.0", "tokens.weight"], cut["head.1", "tokens.weight"]])
    assert torch.equal(parts, uncut["head.0", "tokens.weight"])


# Once


def test_progress_ends_at_the_whole_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    spec = make_spec()
    source, _ = make_checkpoint(tmp_path, spec, save_bin)
    told: list[tuple[int, int]] = []
    first = open_store(spec, source, tmp_path / "offload", progress=lambda *p: told.append(p))
    assert told[-1] == (spec.weight_bytes, spec.weight_bytes)
    assert told == sorted(told)
    assert len(told) == len(spec.modules)
    told.clear()
    times = [f.stat().st_mtime_ns for f in first.files]
    assert open_store(spec, source, tmp_path / "offload", progress=lambda *p: told.append(p)) == first
    assert told == []
    assert [f.stat().st_mtime_ns for f in first.files] == times
    (only,) = (tmp_path / "offload").iterdir()  # no lock, no temporary directory
    assert only.stat().st_mode & 0o777 == 0o700


def change_time(source: Path) -> None:
    os.utime(source / "pytorch_model.bin", ns=(1, 1))


def retrain(source: Path) -> None:
    """Other weights under the same name, of the same size and with the same time."""
    file = source / "pytorch_model.bin"
    stat = file.stat()
    weights = torch.load(file, weights_only=True)
    torch.save({name: t + 1 for name, t in weights.items()}, file)
    assert file.stat().st_size == stat.st_size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(("change", "stores"), [(change_time, 2), (retrain, 2), (lambda source: None, 1)])
def test_another_checkpoint_is_another_store(tmp_path: Path, change: Callable[[Path], None], stores: int) -> None:
    spec = make_spec()
    source, _ = make_checkpoint(tmp_path, spec, save_bin)
    open_store(spec, source, tmp_path / "offload")
    change(source)
    store = open_store(spec, source, tmp_path / "offload")
    assert len(list((tmp_path / "offload").iterdir())) == stores
    weights = {sources.plain_name(n): t for n, t in torch.load(source / "pytorch_model.bin").items()}
    assert_same(contents(spec, store), expected(spec, weights))


@pytest.mark.parametrize("harm", ["manifest gone", "manifest cut", "file cut", "file gone", "all gone"])
def test_a_damaged_store_is_rebuilt(tmp_path: Path, harm: str) -> None:
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save_bin)
    store = open_store(spec, source, tmp_path / "offload")
    directory = store.files[0].parent
    victim = directory / MANIFEST if "manifest" in harm else store.files[2]
    if harm == "all gone":
        shutil.rmtree(directory)
        directory.mkdir()
    elif "gone" in harm:
        victim.unlink()
    else:
        os.truncate(victim, victim.stat().st_size - 1)
    again = open_store(spec, source, tmp_path / "offload")
    assert again == store
    assert_same(contents(spec, again), expected(spec, weights))
    assert list((tmp_path / "offload").iterdir()) == [directory]


def refuse_locks(fd: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "no locks here")


def convert_in_child(ready: Any, source: Path, offload: Path, locks: bool, answers: Any) -> None:
    calls = []
    if not locks:
        checkpoint.fcntl.flock = refuse_locks
    ready.wait(120)
    store = open_store(make_spec(), source, offload, progress=lambda *p: (time.sleep(0.05), calls.append(p)))
    answers.put((len(calls), [str(f) for f in store.files]))


@pytest.mark.grid(cover=[])
@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_processes_that_convert_at_once_agree(tmp_path: Path, locks: bool) -> None:
    """With locks one converts and the other waits; without, both do and the first to be done wins."""
    spec, offload, count = make_spec(), tmp_path / "offload", len(make_spec().modules)
    source, weights = make_checkpoint(tmp_path, spec, save_bin)
    spawn = multiprocessing.get_context("spawn")
    ready, answers = spawn.Barrier(2), spawn.Queue()
    children = [spawn.Process(target=convert_in_child, args=(ready, source, offload, locks, answers)) for _ in range(2)]
    for child in children:
        child.start()
    found = [answers.get(timeout=120) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert found[0][1] == found[1][1]
    assert sorted(calls for calls, _ in found) == ([0, count] if locks else [count, count])
    assert list(offload.iterdir()) == [Path(found[0][1][0]).parent]
    assert_same(contents(spec, open_store(spec, source, offload)), expected(spec, weights))


def convert_and_die(source: Path, offload: Path) -> None:
    open_store(make_spec(), source, offload, progress=lambda done, total: os._exit(9) if done > total // 2 else None)


def test_a_conversion_that_dies_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    spec, offload = make_spec(), tmp_path / "offload"
    source, weights = make_checkpoint(tmp_path, spec, save_bin)
    child = multiprocessing.get_context("spawn").Process(target=convert_and_die, args=(source, offload))
    child.start()
    child.join(120)
    assert child.exitcode == 9
    (left,) = offload.glob("*.tmp-*")
    assert (left / "embed.safetensors").exists()
    assert_same(contents(spec, open_store(spec, source, offload)), expected(spec, weights))
    assert len(list(offload.iterdir())) == 1


def test_only_dead_directories_of_our_own_are_swept(tmp_path: Path) -> None:
    dead = tmp_path / ".opt-1b-0123456789abcdef.tmp-x"
    busy = tmp_path / ".opt-2b-0123456789abcdef.tmp-x"
    foreign = tmp_path / ".editor.tmp-x"
    for directory in (dead, busy, foreign):
        directory.mkdir()
    fd = os.open(tmp_path / ".opt-2b-0123456789abcdef.lock", os.O_CREAT | os.O_RDWR)
    checkpoint.fcntl.flock(fd, checkpoint.fcntl.LOCK_EX)
    open_store(make_spec(), None, tmp_path)
    os.close(fd)
    assert not dead.exists()
    assert busy.exists()
    assert foreign.exists()


def test_an_interrupted_conversion_cleans_up(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(make_spec(), None, tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 256 KiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_disk_too_small_is_refused_with_numbers(small_disk: Path) -> None:
    spec = make_spec(blocks=20)
    with pytest.raises(
        CheckpointError, match=r"needs \d+ bytes in .*small to be converted, which has 262144 free; free \d+"
    ):
        open_store(spec, None, small_disk)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_meanwhile_leaves_nothing(small_disk: Path) -> None:
    def fill(done: int, total: int) -> None:
        with (small_disk / "other").open("wb", buffering=0) as other, suppress(OSError):
            while True:
                other.write(bytes(4096))

    with pytest.raises(CheckpointError, match=r"Tiny model could not be converted: \d+ bytes are needed in .*0 free"):
        open_store(make_spec(), None, small_disk, progress=fill)
    assert [p.name for p in small_disk.iterdir()] == ["other"]
    (small_disk / "other").unlink()
    open_store(make_spec(), None, small_disk)


@pytest.mark.parametrize("call", ["posix_fallocate", "write", "fsync"])
def test_any_call_that_finds_the_disk_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    count = 0
    real = getattr(os, call)

    def full(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match=r"Tiny model could not be converted: .*No space left"):
        open_store(make_spec(), None, tmp_path)
    assert list(tmp_path.iterdir()) == []


# Mistakes


def refused(tmp_path: Path, source: Path, spec: ModelSpec | None = None) -> str:
    """The one sentence with which a source is refused; nothing may be left behind."""
    offload = tmp_path / "offload"
    with pytest.raises(CheckpointError) as caught:
        open_store(spec or make_spec(), source, offload)
    assert not offload.exists() or list(offload.iterdir()) == []
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    assert "is not a directory" in refused(tmp_path, tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "is not a directory" in refused(tmp_path, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "only nothing; download" in refused(tmp_path, tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "only config.json; download" in refused(tmp_path, tmp_path / "empty")


@pytest.mark.parametrize("save", [save_safetensors, save_bin])
def test_a_missing_tensor_is_named(tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None]) -> None:
    def save_less(directory: Path, weights: dict[str, Tensor]) -> None:
        save(directory, {n: t for n, t in weights.items() if "layers.1.fc2" not in n})

    source, _ = make_checkpoint(tmp_path, make_spec(), save_less)
    assert "has no tensor decoder.layers.1.fc2.weight among its 20" in refused(tmp_path, source)


@pytest.mark.parametrize("save", [save_safetensors, save_bin])
def test_the_wrong_config_is_recognised(tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None]) -> None:
    spec = make_spec()
    source, _ = make_checkpoint(tmp_path, spec, save)
    fewer = replace(spec, modules=spec.modules[:-1])  # asks for the first 60 rows of the table only
    assert "has decoder.tokens.weight of shape [101, 48], its config asks for [60, 48]" in refused(
        tmp_path, source, fewer
    )


@pytest.mark.parametrize("save", [save_safetensors, save_bin])
def test_quantised_checkpoints_are_refused(tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None]) -> None:
    def save_some(directory: Path, weights: dict[str, Tensor]) -> None:
        save(directory, {n: t.to(torch.int8) if "fc1" in n else t for n, t in weights.items()})

    source, _ = make_checkpoint(tmp_path, make_spec(), save_some)
    message = refused(tmp_path, source)
    assert "decoder.layers.0.fc1.weight of dtype" in message
    assert "unquantised" in message


@pytest.mark.parametrize("save", [save_safetensors, save_bin])
def test_numbers_too_large_for_float16_are_refused(
    tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None]
) -> None:
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save, torch.float32)
    name = "decoder.layers.1.fc2.weight"
    for value, fits in ((65519.0, True), (-65520.0, False)):
        weights[name][3, 3] = value
        save(source, weights)
        if fits:
            store = open_store(spec, source, tmp_path / "fits")
            assert contents(spec, store)["mlp.1", "fc2.weight"][3, 3] == 65504.0
        else:
            assert f"{name} has values up to 6.55e+04, too large for float16; use bfloat16" in refused(tmp_path, source)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("save", [save_safetensors, sharded_safetensors, save_bin, sharded_bin])
def test_a_truncated_file_is_named(
    tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None], share: float
) -> None:
    source, _ = make_checkpoint(tmp_path, make_spec(), save)
    victim = sorted(p for p in source.iterdir() if p.suffix != ".json")[-1]
    os.truncate(victim, int(victim.stat().st_size * share))
    message = refused(tmp_path, source)
    assert str(victim) in message
    assert "truncated" in message or "damaged" in message


@pytest.mark.parametrize("save", [sharded_safetensors, sharded_bin])
def test_a_missing_shard_is_named(tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None]) -> None:
    source, _ = make_checkpoint(tmp_path, make_spec(), save)
    victim = next(p for p in source.iterdir() if "00002" in p.name)
    victim.unlink()
    assert f"lacks 1 of 3 shards: {victim.name}" in refused(tmp_path, source)


@pytest.mark.parametrize(
    "index", ["nonsense", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 5}}']
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str) -> None:
    source, _ = make_checkpoint(tmp_path, make_spec(), sharded_safetensors)
    (source / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refused(tmp_path, source)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    source, _ = make_checkpoint(tmp_path, make_spec(), unindexed_safetensors)
    shutil.copy(source / "weights-00001-of-00003.safetensors", source / "copy.safetensors")
    assert "both have tensor" in refused(tmp_path, source)


def test_a_legacy_bin_is_refused(tmp_path: Path) -> None:
    def save_legacy(directory: Path, weights: dict[str, Tensor]) -> None:
        torch.save(weights, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)

    source, _ = make_checkpoint(tmp_path, make_spec(), save_legacy)
    assert "legacy" in refused(tmp_path, source)


class Bomb:
    """A pickle that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_pickle_runs(tmp_path: Path, zipped: bool) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    file, trace = source / "pytorch_model.bin", tmp_path / "exploded"
    if zipped:
        torch.save({"a": Bomb(trace)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": Bomb(trace)}))
    assert str(file) in refused(tmp_path, source)
    assert not trace.exists()


@pytest.mark.parametrize("save", [save_bin, save_safetensors])
def test_memory_stays_at_a_few_pieces(tmp_path: Path, save: Callable[[Path, dict[str, Tensor]], None]) -> None:
    """A checkpoint of 96 MiB in one tensor, read through mappings of at most 8 MiB."""
    shape = (6 << 10, 4 << 10)
    table = one_stage("embed", 0, matrix("table.weight", *shape, "table.weight"))
    spec = replace(make_spec(), modules=(table.stored_as("float16"),))
    source = tmp_path / "checkpoint"
    source.mkdir()
    save(source, {"table.weight": torch.full(shape, 0.5, dtype=torch.float32)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", 1 << 20)
        patch.setattr(sources, "MAPPED_BYTES", 8 << 20)
        reset_peak_rss()
        before = rss()
        open_store(spec, source, tmp_path / "offload")
    assert peak_rss() - before < prod(shape) * 4 // 2
