"""A batch's output file: no line lost, none twice, none torn, whatever happens; and nothing else's file touched."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from flexgen_triton.journal import MAX_LINE, Journal, JournalError, Line, read_lines

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("FLEXGEN_JOURNAL_KILLS", "12"))
JOB = {"model": "tiny", "seed": 0}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def lines(count: int) -> list[Line]:
    return list(read_lines(io.BytesIO(b"".join(b"line %d\n" % n for n in range(1, count + 1)))))


def answer_all(journal: Journal, given: Sequence[Line]) -> None:
    for line in given:
        if not journal.is_done(line):
            journal.append(line, {"answer": line.number})


def answers(path: Path) -> list[int]:
    return [json.loads(line)["answer"] for line in path.read_bytes().split(b"\n")[:-1]]


# The input


@given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b""))), st.booleans(), st.integers(1, 10))
def test_lines_are_the_inputs_whatever_their_length(texts, ends, limit):
    raw = b"\n".join(texts) + (b"\n" if ends and texts else b"")
    found = list(read_lines(io.BytesIO(raw), limit))
    expected = raw.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    assert [line.digest for line in found] == [xxhash.xxh64_intdigest(e) for e in expected]
    assert [line.size for line in found] == [len(e) for e in expected]
    assert [line.raw for line in found] == [e if len(e) <= limit else None for e in expected]


def test_a_line_too_long_is_not_held(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from flexgen_triton.journal import read_lines
        with open(sys.argv[1], "rb") as file:
            found = [(line.size, line.raw is None) for line in read_lines(file)]
        (peak,) = (line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
        print(found, peak)
    """
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b"\nshort\n")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found, peak = done.stdout.rsplit(" ", 1)
    assert found == str([(200 << 20, True), (5, False)])
    assert int(peak) < 80 << 10  # KiB, Python's own among them


# Going on


def test_a_job_goes_on_where_it_stopped(out):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(3))
        assert journal.done == 3
    with Journal(out, JOB) as journal:
        assert journal.done == 3
        assert [journal.is_done(line) for line in lines(5)] == [True] * 3 + [False] * 2
        answer_all(journal, lines(5))
    assert answers(out) == [1, 2, 3, 4, 5]
    assert json.loads(out.read_text().splitlines()[0])["id"] == f"batch_req_000000001_{lines(1)[0].digest:016x}"


def test_answers_may_come_in_any_order(out):
    given = lines(40)
    random.Random(0).shuffle(given)
    for n in range(0, 40, 7):
        with Journal(out, JOB) as journal:
            answer_all(journal, given[: n + 7])
    assert answers(out) == [line.number for line in given]


def test_cut_anywhere_it_loses_the_torn_line_only(out):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(3))
    whole = out.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        out.write_bytes(whole[:size])
        with Journal(out, JOB) as journal:
            assert journal.done == sum(end <= size for end in ends)
            answer_all(journal, lines(3))
        assert out.read_bytes() == whole


def test_a_digest_of_zero_counts_as_done(out):
    line = Line(1, 0, 1, b"x")
    with Journal(out, JOB) as journal:
        journal.append(line, {"answer": 1})
    with Journal(out, JOB) as journal:
        assert journal.is_done(line)


def test_an_append_interrupted_midway_leaves_whole_lines(out):
    """A signal's exception may come between two writes of one line; closing takes back what the first one wrote."""
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(2))
        with out.open("ab") as file:
            file.write(b'{"id": "batch_req_000000003_00')
    assert answers(out) == [1, 2] and out.read_bytes().endswith(b"\n")


def test_a_job_without_answers_may_be_begun_anew_in_another_way(out):
    with Journal(out, JOB):
        pass
    with Journal(out, JOB | {"seed": 1}) as journal:
        answer_all(journal, lines(1))
    with pytest.raises(JournalError, match="begun with seed 1, this is 0"):
        Journal(out, JOB)


def test_what_is_known_late_is_kept_and_compared(out):
    with Journal(out, JOB) as journal:
        journal.confirm({"weights": "in 4 bits"})
        journal.confirm({"weights": "in 4 bits"})
        answer_all(journal, lines(1))
    with Journal(out, JOB) as journal:
        journal.confirm({"weights": "in 4 bits"})
        with pytest.raises(JournalError, match="begun with weights in 4 bits, this is uncompressed"):
            journal.confirm({"weights": "uncompressed"})


# Refusals: nothing is written


def refuses(out: Path, words: str, fingerprint: dict[str, object] = JOB) -> None:
    before = out.read_bytes()
    with pytest.raises(JournalError, match=words) as caught:
        Journal(out, fingerprint)
    assert out.read_bytes() == before and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"mine\n", b"no line end", b"\x00" * 100], ids=["a line", "torn", "zeros"])
def test_a_file_that_no_batch_wrote_is_left_alone(out, content):
    out.write_bytes(content)
    refuses(out, "no batch wrote it; name another output")


@pytest.mark.parametrize("content", ["", "mine", "[]", "{}", '{"version": 1}', "[" * 100_000], ids=range(6))
def test_a_sidecar_that_no_batch_wrote_is_left_alone(out, content):
    out.touch()
    sidecar = out.with_name("out.jsonl.job")
    sidecar.write_text(content)
    refuses(out, "is not what a batch writes")
    assert sidecar.read_text() == content


def test_another_versions_sidecar_is_refused(out):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(1))
    sidecar = out.with_name("out.jsonl.job")
    sidecar.write_text(sidecar.read_text().replace('"version": 1', '"version": 9'))
    refuses(out, "has version 9, this program writes 1")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"model": "large"}, "begun with model tiny, this is large"), ({"seed": 3}, "begun with seed 0, this is 3")],
    ids=["model", "seed"],
)
def test_another_job_on_the_same_output_is_refused(out, change, words):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(2))
    refuses(out, words, JOB | change)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"answer": 2}', b'"answer": 2', "line 2 of .* is not as this job wrote it; keep the 1 lines before it"),
        (b'{"id": "batch_req_000000002', b'{"id": "batch_req_2', "line 2 of .* is not as this job wrote it"),
        (b'{"id": "batch_req_000000002', b'{"id": "batch_req_999999999', "line 2 of .* is not as this job wrote it"),
        (b'{"id": "batch_req_000000002', b'{"id": "batch_req_000000000', "line 2 of .* is not as this job wrote it"),
        (b'{"id": "batch_req_000000002', b'{"id": "batch_req_000000001', "line 2 of .* answers line 1 of the input"),
        (b'{"id": "batch_req_000000002', b"\x00" * 27, "line 2 of .* is not as this job wrote it"),
        (b'"answer": 2}', b'"answer": 2}\n', "line 3 of .* is not as this job wrote it"),
    ],
    ids=["torn inside", "short id", "far id", "line 0", "twice", "zeros", "blank line"],
)
def test_an_output_that_was_changed_is_refused(out, old, new, words):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(3))
    out.write_bytes(out.read_bytes().replace(old, new))
    refuses(out, words)


def test_an_input_that_was_changed_is_refused(out):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(3))
    other = list(read_lines(io.BytesIO(b"line 1\nline two\nline 3\n")))
    with Journal(out, JOB) as journal:
        assert journal.is_done(other[0])
        with pytest.raises(JournalError, match="line 2 of the input is not the one"):
            journal.is_done(other[1])
        journal.check_end(3)
        with pytest.raises(JournalError, match="answers line 3, the input has 2 lines"):
            journal.check_end(2)


def test_two_at_a_time_are_refused(out):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(1))
        refuses(out, "is being written by another process")
        link = out.with_name("other name")
        link.symlink_to(out)
        refuses(link, "is being written by another process")
    with Journal(out, JOB):
        pass


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/null", path)], ids=["pipe", "device"])
def test_an_output_that_is_no_file_is_refused(out, make):
    make(out)
    with pytest.raises(JournalError, match="is no ordinary file"):
        Journal(out, JOB)


# Disks and kills: processes of their own

WORKER = """
    import sys, time, resource
    from pathlib import Path
    from flexgen_triton.journal import Journal, JournalError, read_lines
    source, out, pause, limit = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with open(source, "rb") as file, Journal(out, {"model": "tiny"}, sync_s=0.05) as journal:
            print(journal.done, flush=True)
            waiting = []
            for line in read_lines(file):
                if not journal.is_done(line):
                    waiting.append(line)
                if len(waiting) == 7:  # answers come in another order than lines
                    for each in waiting[::-2] + waiting[1::2]:
                        journal.append(each, {"answer": each.number, "text": "x" * (each.digest % 100_000)})
                        time.sleep(pause)
                    waiting = []
            for each in waiting:
                journal.append(each, {"answer": each.number, "text": "x" * (each.digest % 100_000)})
    except JournalError as error:
        sys.exit(str(error))
"""


def worker(source: Path, out: Path, *, pause: float = 0, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), source, out, str(pause), str(limit)]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=-1, stderr=-1, text=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(b"line %d\n" % n for n in range(1, 301)))
    return path


def test_killed_at_any_instant_it_loses_and_repeats_nothing(tmp_path, source):
    whole = tmp_path / "whole.jsonl"
    _, errors = worker(source, whole).communicate(timeout=60)
    assert not errors and len(answers(whole)) == 300

    out, chance, kills, torn = tmp_path / "out.jsonl", random.Random(0), 0, 0
    while kills < KILLS:
        process = worker(source, out, pause=0.002)
        assert process.stdout is not None
        before = process.stdout.readline()
        time.sleep(chance.uniform(0, 1.2 / KILLS))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert not errors and int(before) <= 300
        if process.returncode == 0:
            break
        kills += 1
        torn += not out.read_bytes().endswith(b"\n")
    _, errors = worker(source, out).communicate(timeout=60)
    assert not errors and kills >= min(KILLS, 4)
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    print(f"{kills} kills, {torn} torn lines")


def test_a_full_disk_leaves_whole_lines_and_the_job_goes_on(tmp_path, source):
    out = tmp_path / "out.jsonl"
    _, errors = worker(source, out, limit=3_000_000).communicate(timeout=60)
    done = len(answers(out))
    assert 0 < done < 300 and 2_900_000 < out.stat().st_size <= 3_000_000 and out.read_bytes().endswith(b"\n")
    assert errors.count("\n") == 1 and f"the {done} lines done are kept" in errors and "file too large" in errors
    _, errors = worker(source, out).communicate(timeout=60)
    assert not errors and sorted(answers(out)) == list(range(1, 301))


def test_a_disk_without_room_for_the_sidecar_is_refused(tmp_path, source):
    out = tmp_path / "out.jsonl"
    _, errors = worker(source, out, limit=10).communicate(timeout=60)
    assert errors.count("\n") == 1 and "out.jsonl.job cannot be written" in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"] and not out.read_bytes()
    _, errors = worker(source, out).communicate(timeout=60)
    assert not errors and sorted(answers(out)) == list(range(1, 301))


def test_the_limit_of_a_line_is_8_mib():
    assert MAX_LINE == 8 << 20
