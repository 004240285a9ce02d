"""Checksums of a checkpoint that is read in place are made once, kept, and cover every byte that is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from test_checkpoint import (
    assert_same,
    contents,
    expected,
    make_checkpoint,
    make_spec,
    save_bin,
    save_safetensors,
    sharded_safetensors,
)
from tiny_models import Tiny

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.memory.store import CHUNK, StoreError
from flexgen_triton.models import kept_checks
from flexgen_triton.models.checkpoint import CheckpointError, open_store

GAP = b"<a name that no file holds>"
DAMAGED = ["", "{}", "[" * 100_000, '{"store": {"version": 1, "files": []}, "xxh3_64": ""}', None]  # None: a FIFO


def kept_in(offload: Path) -> Path:
    """The one file there."""
    (found,) = offload.iterdir()
    return found


@pytest.mark.parametrize("save", [save_safetensors, sharded_safetensors])
def test_they_are_made_once_of_every_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., None]
) -> None:
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save)
    told: list[tuple[int, int]] = []
    store = open_store(spec, source, tmp_path / "offload", verify=True, progress=lambda *p: told.append(p))
    assert store.align == CHUNK and all(f.parent == source for f in store.files)
    for file, checks in zip(store.files, store.checks, strict=True):
        data = file.read_bytes()
        assert checks == b"".join(xxhash.xxh3_64_digest(data[n : n + CHUNK]) for n in range(0, len(data), CHUNK))
    assert told[-1] == (sum(store.sizes), sum(store.sizes))
    assert_same(contents(spec, store), expected(spec, weights))
    state = kept_in(tmp_path / "offload").stat()
    monkeypatch.setattr(kept_checks, "make", None)  # is not called again
    assert open_store(spec, source, tmp_path / "offload", verify=True) == store
    assert kept_in(tmp_path / "offload").stat().st_mtime_ns == state.st_mtime_ns
    assert open_store(spec, source, tmp_path / "offload").checks == (None,) * len(store.files)


def test_one_checkpoint_by_two_names_has_one_file_of_them(tmp_path: Path) -> None:
    spec = make_spec()
    source, _ = make_checkpoint(tmp_path, spec, sharded_safetensors)
    other = tmp_path / "other"
    other.mkdir()
    for file in source.iterdir():
        (other / file.name).symlink_to(file)
    open_store(spec, source, tmp_path / "offload", verify=True)
    open_store(spec, other, tmp_path / "offload", verify=True)
    assert kept_in(tmp_path / "offload").suffix == ".checks"


def test_converted_weights_need_none(tmp_path: Path) -> None:
    spec = make_spec()
    source, _ = make_checkpoint(tmp_path, spec, save_bin)
    assert open_store(spec, source, tmp_path / "offload", verify=True) == open_store(spec, source, tmp_path / "offload")
    assert kept_in(tmp_path / "offload").is_dir()


def touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def grow(file: Path) -> None:
    """The same tensors behind a longer header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :])


def copy_over(file: Path) -> None:
    shutil.copy2(file, file.with_name("copy"))
    file.with_name("copy").rename(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [(touch, "was written to"), (grow, "has .* bytes instead of .*: it was changed"), (copy_over, "was replaced")],
)
def test_files_in_another_state_are_refused_until_they_are_made_anew(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    spec = make_spec()
    source, weights = make_checkpoint(tmp_path, spec, save_safetensors)
    open_store(spec, source, tmp_path / "offload", verify=True)
    change(source / "model.safetensors")
    kept = kept_in(tmp_path / "offload")
    words = f"^{source}/model.safetensors {words}.* since its checksums were made; delete {kept} to make them anew$"
    with pytest.raises(CheckpointError, match=words):
        open_store(spec, source, tmp_path / "offload", verify=True)
    kept.unlink()
    assert_same(contents(spec, open_store(spec, source, tmp_path / "offload", verify=True)), expected(spec, weights))


@pytest.mark.parametrize("text", DAMAGED, ids=["empty", "no fields", "deep", "another checksum", "a FIFO"])
def test_damaged_ones_are_not_replaced_by_those_of_whatever_there_is(tmp_path: Path, text: str | None) -> None:
    spec = make_spec()
    source, _ = make_checkpoint(tmp_path, spec, save_safetensors)
    open_store(spec, source, tmp_path / "offload", verify=True)
    kept = kept_in(tmp_path / "offload")
    if text is None:
        kept.unlink()
        os.mkfifo(kept)
    else:
        kept.write_text(text)
    words = f"^{kept} cannot be read [^\n]*; delete it, and its checksums are made anew$"
    with pytest.raises(CheckpointError, match=words):
        open_store(spec, source, tmp_path / "offload", verify=True)


def test_those_of_other_files_are_refused(tmp_path: Path) -> None:
    spec = make_spec()
    source, _ = make_checkpoint(tmp_path, spec, save_safetensors)
    open_store(spec, source, tmp_path / "offload", verify=True)
    kept = kept_in(tmp_path / "offload")
    body = json.loads(kept.read_text())["store"]
    body["files"][0]["path"] = "/elsewhere"
    check = xxhash.xxh3_64_hexdigest(json.dumps(body).encode())
    kept.write_text(json.dumps({"xxh3_64": check, "store": body}))
    with pytest.raises(CheckpointError, match=f"^{kept} holds checksums of other files; delete it"):
        open_store(spec, source, tmp_path / "offload", verify=True)


def test_a_header_that_was_changed_is_found_although_its_tensors_are_as_asked(tmp_path: Path) -> None:
    """Two tensors of one shape are taken for each other when two names change places in the header alone."""
    spec = make_spec()
    source, _ = make_checkpoint(tmp_path, spec, save_safetensors)
    open_store(spec, source, tmp_path / "offload", verify=True)
    file = source / "model.safetensors"
    state, content = file.stat(), file.read_bytes()
    names = [f'"model.decoder.layers.{n}.fc1.weight"'.encode() for n in (0, 1)]
    assert all(content.count(name) == 1 for name in names)
    swapped = content.replace(names[0], GAP).replace(names[1], names[0]).replace(GAP, names[1])
    with file.open("r+b") as opened:
        opened.write(swapped)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    open_store(spec, source, tmp_path / "offload")  # nothing to be seen without checksums
    kept = kept_in(tmp_path / "offload")
    words = rf"^{file} is damaged: bytes 0 to \d+ do not match their checksum; download it again, or delete {kept} if"
    with pytest.raises(StoreError, match=words):
        open_store(spec, source, tmp_path / "offload", verify=True)


@pytest.mark.parametrize("percent", [(0, 0), (25, 35), (0, 100)], ids=str)
@pytest.mark.parametrize("copies", [False, True], ids=["in place", "copied"])
def test_tokens_are_the_same_from_a_model_of_many_chunks(
    tiny: Tiny, tmp_path: Path, percent: tuple[int, int], copies: bool
) -> None:
    """Chunks begin anywhere in a tensor, and the last one is short; rows, streams and resident weights agree."""
    assert (tiny.path / "model.safetensors").stat().st_size > 10 * CHUNK
    policy = Policy(4, 2, *percent, 0, 50, 0, 50)
    with LLM(
        str(tiny.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=copies, device="cpu", verify=True
    ) as llm:
        outputs = llm.generate(tiny.prompts, SamplingParams(max_tokens=4, ignore_eos=True, temperature=0))
    assert [o.outputs[0].token_ids for o in outputs] == [t[:4] for t in tiny.tokens]
