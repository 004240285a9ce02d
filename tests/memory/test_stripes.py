"""Several offload directories are one disk: files striped over them read back as written, evenly spread."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import NEW_TOKENS, Tiny

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.memory.disk import DiskQueue, Read, Scan, Write
from flexgen_triton.memory.store import StoreError
from flexgen_triton.memory.stripes import STRIPE, Folders, StripedFile, part_bytes

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
SIZE = 7 * STRIPE


def folders_of(tmp_path: Path, num: int) -> Folders:
    folders = Folders.of([tmp_path / f"drive-{n}" for n in range(num)])
    folders.make()
    return folders


@pytest.fixture(scope="module")
def content() -> torch.Tensor:
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def queue() -> Iterator[DiskQueue]:
    with DiskQueue(2) as queue:
        yield queue


@pytest.fixture(scope="module", params=[2, 3, 5])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, queue, content) -> Iterator:
    with folders_of(tmp_path_factory.mktemp("drives"), request.param).scratch(SIZE) as file:
        queue.write([Write(file, 0, content)])
        yield file


near = st.builds(lambda stripe, d: max(stripe * STRIPE + d, 0), st.integers(0, 6), st.integers(-5000, 5000))


@given(ranges=st.lists(st.tuples(near, near), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_range_reads_back_as_written(queue, file, content, ranges):
    """Whatever stripes it crosses; what is checked of it is told by its place in the whole file."""
    asked = [(min(one, other), abs(one - other)) for one, other in ranges]
    buffers = [torch.empty(nbytes, dtype=torch.uint8) for _, nbytes in asked]
    seen: list[tuple[int, bytes]] = []
    reads = [
        Read(file, offset, buffer, lambda at, data: seen.append((at, bytes(data))))
        for (offset, _), buffer in zip(asked, buffers, strict=True)
    ]
    queue.read(reads)
    rows = queue.read_rows(file, [offset for offset, _ in asked], 5000)
    for (offset, nbytes), buffer, row in zip(asked, buffers, rows, strict=True):
        assert torch.equal(buffer, content[offset : offset + nbytes])
        assert torch.equal(row[: SIZE - offset], content[offset : offset + 5000])
    assert sum(len(data) for _, data in seen) == sum(nbytes for _, nbytes in asked)
    for at, data in seen:
        assert data == content[at : at + len(data)].numpy().tobytes()


@pytest.mark.parametrize("stripes", [(0, 1), (0.5, 1.5), (6.75, 7)], ids=str)
def test_a_scan_shows_what_lies_across_stripes(queue, file, content, stripes):
    low, high = (int(n * STRIPE) for n in stripes)
    seen = []
    queue.scan([Scan(file, low, high - low, lambda at, data: seen.append((at, bytes(data))))])
    assert seen == [(low, content[low:high].numpy().tobytes())]


def test_writes_change_only_their_range(tmp_path, content):
    with folders_of(tmp_path, 3).scratch(SIZE) as file, DiskQueue() as queue:
        queue.write([Write(file, 0, content)])
        low, high = STRIPE - 3, 4 * STRIPE + 5
        queue.write([Write(file, low, torch.zeros(high - low, dtype=torch.uint8))])
        found = torch.empty(SIZE, dtype=torch.uint8)
        queue.read([Read(file, 0, found)])
    expected = content.clone()
    expected[low:high] = 0
    assert torch.equal(found, expected)


@given(nbytes=st.integers(0, 1 << 40), num=st.integers(1, 9))
def test_parts_add_up_and_differ_by_a_stripe_at_most(nbytes, num):
    parts = [part_bytes(nbytes, num, n) for n in range(num)]
    assert sum(parts) == nbytes
    assert max(parts) - min(parts) <= STRIPE


def test_every_drive_holds_the_same_share(file):
    assert isinstance(file, StripedFile)
    assert len({part.size for part in file.parts}) == 1
    assert SIZE <= file.size < SIZE + len(file.parts) * STRIPE


def on_drives(folders: Folders) -> list[int]:
    """Bytes of this process's open files in each directory, those without a name too."""
    found = dict.fromkeys(folders.paths, 0)
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own descriptor
            at = Path(os.readlink(link)).parent
            if at in found:
                found[at] += link.stat().st_size
    return list(found.values())


@pytest.mark.parametrize("copies", [False, True], ids=["in place", "copies"])
def test_tokens_do_not_depend_on_the_number_of_drives(tiny: Tiny, tmp_path, copies):
    """Cache and hidden states on three drives, each of which holds a third of them while they are computed."""
    folders, policy = folders_of(tmp_path, 3), Policy(3, 2, 60, 40, 10, 20, 10, 20)
    with LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=folders.paths, copies=copies) as llm:
        stream = llm.stream((p, GREEDY) for p in tiny.prompts)
        first = next(stream)
        held = on_drives(folders)
        outputs = sorted([first, *stream], key=lambda o: o.request_id)
    assert [o.outputs[0].token_ids for o in outputs] == tiny.tokens
    assert min(held) == max(held) > 0
    assert not [f for p in folders.paths for f in p.iterdir()]


def test_directories_given_twice_or_not_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match="given twice"):
        Folders.of([tmp_path, tmp_path / "a" / ".."])
    with pytest.raises(ValueError, match="at least one"):
        Folders.of([])


def test_free_bytes_of_directories_on_one_drive_are_counted_once(tmp_path):
    several, one = folders_of(tmp_path, 4), Folders.of(tmp_path)
    assert several.free_bytes() == pytest.approx(one.free_bytes(), rel=0.01)


def test_a_file_that_does_not_fit_leaves_nothing_open(tmp_path):
    folders = folders_of(tmp_path, 3)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="bytes are needed in"):
        folders.scratch(1 << 60)
    assert len(os.listdir("/proc/self/fd")) == before


# Converted weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose layers have several stripes; its weights are random."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "ffn_dim": 2048, "vocab_size": 1000}
    (path / "config.json").write_text(json.dumps({"model_type": "opt", "dtype": "float32", **sizes}))
    return str(path)


def generated(model: str, policy: Policy, folders: Sequence[Path]) -> list[list[int]]:
    with LLM(model, path="_DUMMY_", policy=policy, offload_dir=folders) as llm:
        return [o.outputs[0].token_ids for o in llm.generate([[5, 6, 7], [8] * 20, [9, 10]], GREEDY)]


def test_weights_are_striped_and_found_again(model, tmp_path):
    """Whatever the order of the directories; tokens are those of one directory."""
    folders, policy = folders_of(tmp_path, 3), Policy(3, 1, 0, 20)
    expected = generated(model, policy, [tmp_path / "alone"])
    assert generated(model, policy, folders.paths) == expected
    parts = [sorted(p.rglob("*-of-3")) for p in folders.paths]
    for files in zip(*parts, strict=True):
        sizes = [f.stat().st_size for f in files]
        assert sizes == [part_bytes(sum(sizes), 3, n) for n in range(3)]
    assert min(sum(f.stat().st_size for f in files) for files in parts) > STRIPE
    times = [f.stat().st_mtime_ns for files in parts for f in files]
    assert generated(model, policy, folders.paths[::-1]) == expected
    assert [f.stat().st_mtime_ns for files in parts for f in files] == times


def test_a_damaged_or_lost_part_is_found(model, tmp_path):
    """Bytes are checked as in one directory; where a part is gone the store is made anew."""
    folders, policy = folders_of(tmp_path, 2), Policy(3, 1, 0, 0)
    expected = generated(model, policy, folders.paths)
    (part,) = (f for p in folders.paths for f in p.rglob("mlp.1.safetensors.2-of-2"))
    whole = part.read_bytes()
    part.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(StoreError, match="damaged"):
        generated(model, policy, folders.paths)
    part.unlink()
    assert generated(model, policy, folders.paths) == expected
    assert part.read_bytes() == whole


def test_weights_that_do_not_stream_are_read_where_they_lie(tiny: Tiny, tmp_path):
    folders = folders_of(tmp_path, 2)
    with LLM(str(tiny.path), policy=Policy(3, 2), dtype="float32", offload_dir=folders.paths) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(tiny.prompts, GREEDY)] == tiny.tokens
    assert not [f for p in folders.paths for f in p.iterdir()]
