"""Damaged or changed weights end in StoreError or in the tokens of undamaged ones, never in other tokens.

Longer: FLEXGEN_FLIPS=200 python -m pytest -n 0 tests/memory/test_damage.py -k flip -s
"""

from __future__ import annotations

import os
import random
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Tiny

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton import llm as llm_module
from flexgen_triton.memory import disk as disk_module
from flexgen_triton.memory.disk_files import Bytes
from flexgen_triton.memory.store import CHUNK, Store, StoreError
from flexgen_triton.models.checkpoint import CheckpointError

FLIPS = int(os.environ.get("FLEXGEN_FLIPS", "2"))
SEED = int(os.environ.get("FLEXGEN_SEED", "20"))
CALLS_AFTER = 10
NEW = 3
GREEDY = SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0)
TIED, UNTIED = "pre-norm, 3 heads of 64", "heads of 128, untied"
PLACES = {  # percent of the weights on the device and on the host, and whether host memory is apart
    "disk": (0, 0, False),
    "half": (30, 20, False),
    "host": (0, 100, False),
    "device": (100, 0, False),
    "disk, copied": (0, 0, True),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Case:
    """A checkpoint of one model, and what it generates."""

    source: Path
    offload: Path
    tiny: Tiny
    verify: bool = False
    prompts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = self.tiny.prompts[:4]

    def open(self, place: str, progress: Callable[[str, int, int], None] | None = None) -> LLM:
        gpu, host, copies = PLACES[place]
        policy = Policy(2, 2, gpu, host, 100, 0, 100, 0)
        more = {"verify": True} if self.verify else {}
        return LLM(
            str(self.source),
            policy=policy,
            dtype="float32",
            offload_dir=self.offload,
            copies=copies,
            device="cpu",
            progress=progress,
            **more,
        )

    def tokens(self, llm: LLM) -> list[list[int]]:
        return [o.outputs[0].token_ids for o in llm.generate(self.prompts, GREEDY)]

    @property
    def wanted(self) -> list[list[int]]:
        return [t[:NEW] for t in self.tiny.tokens[:4]]

    def outcome(self, place: str) -> str:
        """Run, and say how it ended; however it did, no other tokens come out, now or later."""
        try:
            opened = self.open(place)
        except (StoreError, CheckpointError) as error:
            self.sentence(error)
            return "refused at the start"
        with opened as llm:
            try:
                found = self.tokens(llm)
            except StoreError as error:
                assert_never_answers(llm, self.prompts, self.sentence(error))
                return "refused in the run"
            assert found == self.wanted
            return "the same tokens"

    @staticmethod
    def sentence(error: Exception) -> str:
        assert "\n" not in str(error)
        return str(error)


def assert_never_answers(llm: LLM, prompts: list[list[int]], sentence: str) -> None:
    """Ten more calls, with other prompts too, and a stream: each raises the same sentence."""
    for n in range(CALLS_AFTER):
        with pytest.raises(StoreError, match=f"^{re.escape(sentence)}$"):
            llm.generate([prompts[n % len(prompts)], [5 + n]], GREEDY)
    with pytest.raises(StoreError, match=f"^{re.escape(sentence)}$"):
        list(llm.stream([([7], GREEDY)]))


def copy_of(tiny: Tiny, target: Path) -> Path:
    shutil.copytree(tiny.path, target)
    return target


@pytest.fixture(scope="module")
def converted(tiny_models: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """A tied and an untied model whose weights were converted into a store."""
    cases = {}
    for name in (TIED, UNTIED):
        root, tiny = tmp_path_factory.mktemp("converted"), tiny_models[name]
        source = root / "checkpoint"
        source.mkdir()
        shutil.copy(tiny.path / "config.json", source)
        torch.save(load_file(tiny.path / "model.safetensors"), source / "pytorch_model.bin")
        cases[name] = Case(source, root / "offload", tiny)
        assert cases[name].outcome("disk") == "the same tokens"
    return cases


@pytest.fixture(scope="module")
def verified(tiny_models: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model that is read in place, of which checksums were kept."""
    root, tiny = tmp_path_factory.mktemp("verified"), tiny_models[UNTIED]
    case = Case(copy_of(tiny, root / "checkpoint"), root / "offload", tiny, verify=True)
    assert case.outcome("disk") == "the same tokens"
    return case


def store_of(case: Case) -> Path:
    (found,) = [p for p in case.offload.iterdir() if p.is_dir()]
    return found


def files_of(case: Case) -> list[Path]:
    """All that must be trusted: a store's manifest and files, or a checkpoint and the checksums kept of it."""
    if case.verify:
        return [case.source / "model.safetensors", *case.offload.glob("*.checks")]
    return sorted(store_of(case).iterdir())


# Flipped bits


Place = tuple[Path, int]  # file and byte


def flip(path: Path, at: int, bit: int) -> None:
    """Change one bit, and nothing that a look at the file's state could tell."""
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def anywhere(case: Case, rng: random.Random) -> Place:
    """A byte of any file, each as likely as the others."""
    file = rng.choice(files_of(case))
    return file, rng.randrange(file.stat().st_size)


def in_a_used_row(case: Case, rng: random.Random) -> Place:
    """A byte of a row of the token or position table that the prompts look up."""
    store = Store.load(store_of(case))
    prompt = rng.choice(case.prompts)
    table, row = rng.choice(
        [("tokens.weight", rng.choice(prompt)), ("positions.weight", 2 + rng.randrange(len(prompt)))]
    )
    (extent,) = {e for es in store.extents.values() for e in es if e.tensor == table and e.row <= row < e.row + e.rows}
    at = extent.offset + (row - extent.row) * extent.row_bytes + rng.randrange(extent.row_bytes)
    return store.files[extent.file], at


def sweep(cases: list[Case], choose: Callable[[Case, random.Random], Place]) -> Counter[str]:
    """FLIPS times: flip one bit, run under every placement, put it back. Returns how the runs ended."""
    rng = random.Random(SEED)
    found: Counter[str] = Counter()
    rebuilt = 0
    for n in range(FLIPS):
        case = cases[n % len(cases)]
        pristine = {p: p.read_bytes() for p in files_of(case)}
        (path, at), bit = choose(case, rng), rng.randrange(8)
        for place in PLACES:
            flip(path, at, bit)
            try:
                found[case.outcome(place)] += 1
            except BaseException as error:
                error.add_note(f"bit {bit} of byte {at} of {path.name}, weights on {place}, seed {SEED}, flip {n}")
                raise
            if path.read_bytes() == pristine[path]:
                rebuilt += 1
            else:
                flip(path, at, bit)
        assert {p: p.read_bytes() for p in files_of(case)} == pristine
    print(f"\nseed {SEED}: {FLIPS} flips under {len(PLACES)} placements: {dict(found)}, {rebuilt} rebuilt")
    assert sum(found.values()) == FLIPS * len(PLACES)
    return found


def test_a_bit_flipped_anywhere_in_a_store_changes_no_token(converted: dict[str, Case]) -> None:
    sweep(list(converted.values()), anywhere)


def test_a_bit_flipped_in_a_row_that_is_looked_up_is_found(converted: dict[str, Case]) -> None:
    found = sweep(list(converted.values()), in_a_used_row)
    assert not found["the same tokens"]


def test_a_bit_flipped_since_checksums_were_kept_changes_no_token(verified: Case) -> None:
    sweep([verified], anywhere)


# One record of what was found right


@pytest.mark.parametrize("place", ["disk", "disk, copied"])
def test_rows_on_disk_cost_each_chunk_once(
    converted: dict[str, Case], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A chunk is read to be checked at most once, and not at all if it was streamed before."""
    scanned: list[tuple[str, int]] = []
    scan = disk_module.Scan.run

    def noted(self: disk_module.Scan, bounce: Bytes) -> None:
        scanned.extend((self.file.name, at) for at in range(self.offset, self.offset + self.nbytes, CHUNK))
        scan(self, bounce)

    monkeypatch.setattr(disk_module.Scan, "run", noted)
    case = converted[UNTIED]
    with case.open(place) as llm:
        assert case.tokens(llm) == case.wanted
        first = len(scanned)
        assert case.tokens(llm) == case.wanted
    table = store_of(case) / "embed.safetensors"
    assert {name for name, _ in scanned} == {str(table)}
    assert 0 < first == len(scanned) == len(set(scanned)) <= -(-table.stat().st_size // CHUNK)


def test_a_wrong_chunk_is_not_taken_for_a_right_one(converted: dict[str, Case]) -> None:
    """A chunk that was wrong once stays so for this engine, and the bytes put right are right for the next one."""
    case = converted[TIED]
    victim = store_of(case) / "attention.1.safetensors"
    flip(victim, 10_000, 3)
    with case.open("disk") as llm:
        with pytest.raises(StoreError, match=r"attention\.1\.safetensors is damaged: bytes 0 to .* delete") as caught:
            case.tokens(llm)
        flip(victim, 10_000, 3)
        assert_never_answers(llm, case.prompts, str(caught.value))
    assert case.outcome("disk") == "the same tokens"


# Files that change


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(bytes(9))


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.rename(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


CHANGES = [
    pytest.param(overwrite, "was written to since it was opened", id="overwritten"),
    pytest.param(replace, "was replaced by another file since it was opened", id="replaced"),
    pytest.param(truncate, "has .* instead of .*: it was changed since it was opened", id="truncated"),
    pytest.param(os.unlink, "is gone since it was opened", id="removed"),
]


@pytest.fixture
def in_place(tiny: Tiny, tmp_path: Path) -> Case:
    return Case(copy_of(tiny, tmp_path / "checkpoint"), tmp_path / "offload", tiny)


@pytest.mark.parametrize("place", ["disk", "host"])
@pytest.mark.parametrize(("harm", "words"), CHANGES)
def test_a_file_that_changes_between_two_calls_is_named(
    in_place: Case, harm: Callable[[Path], None], words: str, place: str
) -> None:
    """Also where all weights are in memory: they are of the same checkpoint as what is still read."""
    victim = in_place.source / "model.safetensors"
    with in_place.open(place) as llm:
        assert in_place.tokens(llm) == in_place.wanted
        harm(victim)
        with pytest.raises(StoreError, match=f"^{victim} {words}.*; open the model again$") as caught:
            in_place.tokens(llm)
        assert_never_answers(llm, in_place.prompts, str(caught.value))


@pytest.mark.parametrize("place", ["disk", "disk, copied"])
@pytest.mark.parametrize("harm", [overwrite, truncate])
def test_a_file_that_changes_under_a_run_ends_it(in_place: Case, harm: Callable[[Path], None], place: str) -> None:
    victim = in_place.source / "model.safetensors"

    def after_a_step(phase: str, done: int, total: int) -> None:
        if phase == "generate" and done == 1:
            harm(victim)

    with in_place.open(place, progress=after_a_step) as llm:
        with pytest.raises(
            (StoreError, OSError), match=f"{victim} (was written to|has .* changed|ends at .* truncated)"
        ):
            in_place.tokens(llm)
        with pytest.raises(StoreError, match=str(victim)) as caught:
            in_place.tokens(llm)
        assert_never_answers(llm, in_place.prompts, str(caught.value))


@pytest.mark.parametrize(("harm", "words"), CHANGES)
def test_a_file_that_changes_before_it_is_opened_is_named(
    in_place: Case, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None], words: str
) -> None:
    """Tensors were found by its header, so it must be the file whose header was read."""
    victim, find = in_place.source / "model.safetensors", llm_module.open_store

    def find_and_harm(*args: object, **more: object) -> Store:
        store = find(*args, **more)
        harm(victim)
        return store

    monkeypatch.setattr(llm_module, "open_store", find_and_harm)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreError, match=f"^{victim} {words.replace('opened', '(opened|found)')}"):
        in_place.open("disk")
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)


def test_a_model_of_a_relative_path_runs_wherever_the_process_goes(
    in_place: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    in_place.source = Path("checkpoint")
    with in_place.open("disk") as llm:
        monkeypatch.chdir("/")
        assert in_place.tokens(llm) == in_place.wanted
