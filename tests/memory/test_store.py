"""Checksums find every flipped bit, manifests come back as they were, and only files within the format's rules pass."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_triton.memory.safetensors_format import (
    TensorEntry,
    pack_header,
    read_safetensors_header,
    write_safetensors,
)
from flexgen_triton.memory.store import CHUNK, MANIFEST, Store, StoreError
from flexgen_triton.plan.placement import ALIGN, Extent

TABLE = [("a.weight", "float16", (300, 1000)), ("a.bias", "float16", (7,)), ("b", "float16", (0, 4))]


def table_bytes() -> bytes:
    return os.urandom((300 * 1000 + 7) * 2)


def make_store(directory: Path, data: bytes, piece: int = 77777) -> Store:
    file = directory / "x.safetensors"
    pieces = (memoryview(data)[n : n + piece] for n in range(0, len(data), piece))
    size, checks = write_safetensors([file], TABLE, pieces)
    extents = {"x": (Extent("a.weight", 0, 300, 2000, 0, ALIGN), Extent("a.bias", 0, 1, 14, 0, ALIGN + 600000))}
    return Store((file,), (size,), extents, "float16", CHUNK, (checks,))


def test_a_written_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    data = table_bytes()
    store = make_store(tmp_path, data)
    found = safetensors.torch.load_file(store.files[0])
    assert {n: tuple(t.shape) for n, t in found.items()} == {n: s for n, _, s in TABLE}
    assert found["a.weight"].dtype == torch.float16
    assert found["a.weight"].view(torch.uint8).numpy().tobytes() == data[:600000]
    assert found["a.bias"].view(torch.uint8).numpy().tobytes() == data[600000:]
    assert read_safetensors_header(store.files[0]).entries["a.bias"] == TensorEntry(
        "F16", (7,), ALIGN + 600000, ALIGN + 600014
    )
    assert store.weight_bytes == len(data)


@pytest.mark.parametrize("count", [0, 1, 40, 200])
def test_headers_fill_whole_pages(count: int) -> None:
    header = pack_header([(f"tensor.{n}", "bfloat16", (n, 3)) for n in range(count)])
    assert len(header) % ALIGN == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert len(json.loads(header[8:])) == count + 1
    assert (len(header) > ALIGN) == (count > 40)


def test_too_few_bytes_for_the_tensors_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        make_store(tmp_path, table_bytes()[:-1])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store = make_store(tmp_path_factory.mktemp("s"), table_bytes(), data.draw(st.integers(1000, 700000)))
    content = bytearray(store.files[0].read_bytes())
    store.verify(0, 0, memoryview(content))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StoreError, match=rf"x.safetensors is damaged: bytes {at // CHUNK * CHUNK} to .*delete"):
        store.verify(0, 0, memoryview(content))
    chunk = at // CHUNK * CHUNK
    with pytest.raises(StoreError, match="damaged"):
        store.verify(0, chunk, memoryview(content)[chunk : chunk + CHUNK])


def test_parts_of_chunks_cannot_be_judged_but_whole_ones_beside_them_are(tmp_path: Path) -> None:
    store = make_store(tmp_path, table_bytes())
    content = bytearray(store.files[0].read_bytes())
    content[CHUNK + 5] ^= 1
    store.verify(0, 100, memoryview(content)[100 : 2 * CHUNK - 1])
    with pytest.raises(StoreError, match=f"bytes {CHUNK} to {2 * CHUNK}"):
        store.verify(0, 100, memoryview(content)[100 : 2 * CHUNK])


def test_a_file_without_checksums_passes(tmp_path: Path) -> None:
    Store((tmp_path / "x",), (10,), {}, "float16", ALIGN, (None,)).verify(0, 0, memoryview(b"anything"))


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    store = make_store(tmp_path, table_bytes())
    store.save(tmp_path)
    assert Store.load(tmp_path) == store


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def edit(path: Path) -> None:
    """Valid JSON that says something else."""
    text = path.read_text()
    assert "604096" in text
    path.write_text(text.replace("604096", "604097"))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        pytest.param(MANIFEST, edit, id="another offset in the manifest"),
        pytest.param(MANIFEST, flip, id="bit flip in the manifest"),
        pytest.param(MANIFEST, cut, id="truncated manifest"),
        pytest.param(MANIFEST, os.unlink, id="no manifest"),
        pytest.param(MANIFEST, lambda p: p.write_text("[]"), id="not a manifest"),
        pytest.param("x.safetensors", cut, id="truncated file"),
        pytest.param("x.safetensors", os.unlink, id="no file"),
    ],
)
def test_an_incomplete_store_is_not_loaded(tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    make_store(tmp_path, table_bytes()).save(tmp_path)
    harm(tmp_path / name)
    with pytest.raises(StoreError, match=f"delete {tmp_path}"):
        Store.load(tmp_path)


def test_another_version_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path, table_bytes()).save(tmp_path)
    monkeypatch.setattr("flexgen_triton.memory.store.STORE_VERSION", 0)
    with pytest.raises(StoreError, match="version"):
        Store.load(tmp_path)


# The format's rules


def raw_file(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def tensor(begin: int, end: int, dtype: Any = "F16", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 2] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = {"a": tensor(0, 4), "b": tensor(4, 10, shape=[3, 1]), "e": tensor(4, 4, shape=[0, 5])}


def test_a_file_within_the_rules_passes(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"k": "v"}, **GOOD}).encode() + b"   "
    found = read_safetensors_header(raw_file(tmp_path / "f", header, bytes(10))).entries
    start = 8 + len(header)
    assert found["b"] == TensorEntry("F16", (3, 1), start + 4, start + 10)
    assert set(found) == {"a", "b", "e"}


def test_sub_byte_types_are_counted_in_bits(tmp_path: Path) -> None:
    header = json.dumps({"a": tensor(0, 3, "F4", [6])}).encode()
    assert read_safetensors_header(raw_file(tmp_path / "f", header, bytes(3))).entries["a"].shape == (6,)


@pytest.mark.parametrize(
    ("header", "nbytes", "problem"),
    [
        pytest.param({"a": tensor(0, 4), "b": tensor(2, 6)}, 6, "an overlap between a and b", id="overlap"),
        pytest.param({"a": tensor(0, 4), "b": tensor(0, 4)}, 4, "an overlap", id="same bytes twice"),
        pytest.param({"a": tensor(0, 4), "b": tensor(6, 8)}, 8, "a hole between a and b", id="hole"),
        pytest.param({"a": tensor(2, 4)}, 4, "a hole between the header and a", id="hole at the start"),
        pytest.param(GOOD, 9, "truncated", id="truncated"),
        pytest.param(GOOD, 11, "instead of", id="bytes after the last tensor"),
        pytest.param({}, 3, "instead of", id="no tensors but data"),
        pytest.param({"a": tensor(0, 4, shape=[3])}, 4, "has 4 bytes for tensor a", id="size and shape differ"),
        pytest.param({"a": tensor(0, 4, "F32", [2])}, 4, "has 4 bytes for tensor a", id="size and dtype differ"),
        pytest.param({"a": tensor(4, 0, shape=[2])}, 4, "has -4 bytes for tensor a", id="backwards"),
        pytest.param({"a": tensor(0, 4, "F17")}, 4, "unknown dtype 'F17'", id="unknown dtype"),
        pytest.param({"a": tensor(0, 4, ["F16"])}, 4, "unknown dtype", id="dtype is a list"),
        pytest.param({"a": tensor(0, 4, shape=[-2])}, 4, "natural numbers", id="negative shape"),
        pytest.param({"a": tensor(0, 4, shape=[2.0])}, 4, "natural numbers", id="fractional shape"),
        pytest.param({"a": tensor(0, 4, shape=[True, 2])}, 4, "natural numbers", id="boolean shape"),
        pytest.param({"a": {**tensor(0, 4), "data_offsets": [0]}}, 4, "natural numbers", id="one offset"),
        pytest.param({"a": {**tensor(0, 4), "more": 1}}, 4, "other fields", id="unknown field"),
        pytest.param({"a": {"dtype": "F16", "shape": [2]}}, 4, "other fields", id="missing field"),
        pytest.param({"a": 5}, 0, "other fields", id="not a tensor"),
        pytest.param(b'{"a":1,"a":1}', 0, "a key of its header twice", id="duplicate tensor"),
        pytest.param(b'{"__metadata__":{"k":"1","k":"2"}}', 0, "a key of its header twice", id="duplicate metadata"),
        pytest.param(b"{nonsense}", 0, "not JSON", id="not JSON"),
        pytest.param(b'{"\xff":1}', 0, "not JSON", id="not UTF-8"),
        pytest.param(b"[" * 100000, 0, "not a JSON object", id="array"),
        pytest.param(b'{"a":' + b"[" * 100000, 0, "not JSON", id="deeply nested"),
        pytest.param(b" {}", 0, "not a JSON object", id="space before the header"),
        pytest.param(b"", 0, "not a JSON object", id="empty header"),
    ],
)
def test_each_broken_rule_is_named(tmp_path: Path, header: Any, nbytes: int, problem: str) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = raw_file(tmp_path / "model.safetensors", raw, bytes(nbytes))
    with pytest.raises(StoreError, match=problem) as caught:
        read_safetensors_header(path)
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).endswith("download or write it again")


@pytest.mark.parametrize("content", [b"", b"1234567", b"\x09\0\0\0\0\0\0\0{}", b"\xff" * 8 + b"{}"])
def test_a_file_shorter_than_its_header_is_truncated(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(StoreError, match=f"has {len(content)} bytes, too few for its header: truncated"):
        read_safetensors_header(tmp_path / "f")


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(tmp_path / "f", 1 << 30)  # sparse
    with pytest.raises(StoreError, match="header of 100000001 bytes; at most 100000000"):
        read_safetensors_header(tmp_path / "f")
