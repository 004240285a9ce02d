"""A batch's output file: no line lost, none twice, none torn, whatever happens; and nothing else's file touched."""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
import signal
import stat
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

from flexgen_triton.jobs.journal import MAX_LINE, Answers, Journal, Line, Passing, output_line, read_lines
from flexgen_triton.jobs.sidecar import JournalError, Sidecar

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("FLEXGEN_JOURNAL_KILLS", "12"))
JOB = {"model": "tiny", "seed": 0}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def lines(count: int) -> list[Line]:
    return list(read_lines(io.BytesIO(b"".join(b"line %d\n" % n for n in range(1, count + 1)))))


def answer_all(journal: Answers, given: Sequence[Line]) -> None:
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
        from flexgen_triton.jobs.journal import read_lines
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
    first = out.read_bytes().splitlines(keepends=True)[0]
    (begin, rest) = first.split(b'", ', 1)
    answered = f"000000001_{lines(1)[0].digest:016x}"
    seal = xxhash.xxh64_hexdigest(answered.encode() + rest)
    assert begin.decode() == f'{{"id": "batch_req_{answered}_{seal}' and rest == b'"answer": 1}\n'


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
    for version in (1, 9):
        fields = json.loads(sidecar.read_text()) | {"version": version}
        sidecar.write_text(json.dumps(fields))
        refuses(out, f"has version {version}, this program writes 2; name another output, or finish the job with the")


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
        (b'{"id": "batch_req_000000002', b'{"id": "batch_req_000000001', "line 2 of .* is not as this job wrote it"),
        (b'{"id": "batch_req_000000002', b"\x00" * 27, "line 2 of .* is not as this job wrote it"),
        (b'"answer": 2}', b'"answer": 2}\n', "line 3 of .* is not as this job wrote it"),
        (b'"answer": 2}', b'"answer": 5}', "line 2 of .* is not as this job wrote it; keep the 1 lines before it"),
        (b'"answer": 2}', b'"answer":  2}', "line 2 of .* is not as this job wrote it; keep the 1 lines before it"),
        (b'"answer": 2}', b'"answer": 2, "note": "x"}', "line 2 of .* is not as this job wrote it"),
        (b'"answer": 2}', b'"answer": 2}\r', "line 2 of .* is not as this job wrote it"),
    ],
    ids=[
        "torn inside",
        "short id",
        "other line",
        "zeros",
        "blank line",
        "edited",
        "a space",
        "more",
        "carriage return",
    ],
)
def test_an_output_that_was_changed_is_refused(out, old, new, words):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(3))
    out.write_bytes(out.read_bytes().replace(old, new))
    refuses(out, words)


def test_a_bit_of_any_byte_of_an_answer_that_changes_is_noticed(out):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(2))
    whole = out.read_bytes()
    end = whole.index(b"\n")
    for at in range(end):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        out.write_bytes(changed)
        with pytest.raises(JournalError, match="is not as this job wrote it; keep the 0 lines"):
            Journal(out, JOB)


def test_what_was_taken_out_or_moved_is_answered_anew_or_taken_as_it_is(out):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(3))
    first, _, last = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(last + first)
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(3))
    assert answers(out) == [3, 1, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (lines(1)[0], "line 4 of .* answers line 1 of the input once more; take it out"),
        (Line(0, 7, 1, b"x"), "line 4 of .* is not as this job wrote it; keep the 3 lines"),
        (Line(999_999_999, 7, 1, b"x"), "line 4 of .* is not as this job wrote it; keep the 3 lines"),
    ],
    ids=["twice", "line 0", "far"],
)
def test_answers_to_lines_that_cannot_be_are_refused(out, line, words):
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(3))
    with out.open("ab") as file:
        file.write(output_line(line, {"answer": 1}))
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


@pytest.mark.parametrize("begun", [False, True], ids=["just starting", "under way"])
def test_two_at_a_time_are_refused_whatever_they_call_the_output(out, begun):
    (out.parent / "there").mkdir()
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(1 if begun else 0))
        symlink, hard_link = out.with_name("symlink"), out.with_name("hard link")
        symlink.symlink_to(out)
        os.link(out, hard_link)
        for name in (out, symlink, hard_link, out.parent / "there" / ".." / out.name):
            refuses(name, "is being written by another process; wait for it, stop it, or name another output")
            refuses(name, "is being written by another process", JOB | {"seed": 5})
    with Journal(out, JOB) as journal:
        assert journal.done == begun


@pytest.mark.parametrize("begun_by", ["name", "link"])
def test_a_link_stands_for_the_file_it_leads_to(tmp_path, begun_by):
    """Output and sidecar lie together, where the file is, and the job goes on under either name."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    names = {"name": tmp_path / "a" / "out.jsonl", "link": tmp_path / "b" / "link"}
    names["link"].symlink_to(names["name"])  # which leads nowhere yet
    with Journal(names[begun_by], JOB) as journal:
        answer_all(journal, lines(2))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["out.jsonl", "out.jsonl.job"]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["link"] and names["link"].is_symlink()
    for name in names.values():
        with Journal(name, JOB) as journal:
            assert journal.done == 2


def test_an_output_that_is_replaced_while_it_is_opened_is_not_written_to_the_void(out, monkeypatch):
    """Between the opening of a file and the lock on it, the process that made it may have taken it away again."""
    flock, taken = fcntl.flock, []

    def late(file: int, flags: int) -> None:
        if not taken:
            taken.append(file)
            out.unlink()
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(2))
    assert answers(out) == [1, 2] and taken


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is no ordinary file; .* -o - writes them to standard output"),
        (lambda path: os.symlink("/dev/null", path), "is no ordinary file"),
        (os.mkdir, "is a directory; name a file in it"),
    ],
    ids=["pipe", "device", "directory"],
)
def test_an_output_that_is_no_file_is_refused(out, make, words):
    make(out)
    with pytest.raises(JournalError, match=words):
        Journal(out, JOB)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_an_output_that_was_not_there_is_gone_again_where_the_job_cannot_begin(tmp_path):
    out = tmp_path / ("x" * 253)  # there is no room for .job
    with pytest.raises(OSError, match="File name too long"):
        Journal(out, JOB)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(OSError, match="File name too long"):
        Journal(tmp_path / "link", JOB)
    assert [p.name for p in tmp_path.iterdir()] == ["link"]
    out.touch()  # one that was there stays
    with pytest.raises(OSError, match="File name too long"):
        Journal(out, JOB)
    assert out.exists()


# The sidecar: nobody else's file is followed, written or removed


def test_the_longest_name_that_leaves_room_for_the_sidecar_works(tmp_path):
    out = tmp_path / ("x" * 251)
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(1))
    with Journal(out, JOB) as journal:
        assert journal.done == 1


def test_no_name_beside_the_output_is_written_through_or_over(out):
    """A link or a file under the sidecar's name with .tmp, which jobs once wrote through, keeps what it has."""
    victim, other = out.with_name("victim"), out.with_name("out.jsonl.job.tmp")
    victim.write_text("precious")
    other.symlink_to(victim)
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(1))
    assert victim.read_text() == "precious" and other.is_symlink()
    out.unlink()
    out.with_name("out.jsonl.job").unlink()
    other.unlink()
    other.write_text("mine")
    with Journal(out, JOB) as journal:
        answer_all(journal, lines(1))
    assert other.read_text() == "mine"
    assert stat.S_ISREG(out.with_name("out.jsonl.job").lstat().st_mode)


def link_to_a_file(path: Path) -> None:
    path.with_name("victim").write_text(json.dumps({"version": 2, "fingerprint": JOB}))
    path.symlink_to(path.with_name("victim"))


@pytest.mark.parametrize(
    "make",
    [link_to_a_file, lambda path: path.symlink_to("nowhere"), os.mkfifo, os.mkdir],
    ids=["link", "link to nothing", "pipe", "directory"],
)
def test_a_sidecar_that_is_no_ordinary_file_is_refused(out, make):
    out.touch()
    make(out.with_name("out.jsonl.job"))
    before = sorted(p.name for p in out.parent.iterdir())
    refuses(out, "out.jsonl.job is no ordinary file, so no batch wrote it; move it away, or name another output")
    assert sorted(p.name for p in out.parent.iterdir()) == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_the_sidecar_has_the_permissions_that_the_umask_gives(out, umask):
    before = os.umask(umask)
    try:
        with Journal(out, JOB):
            pass
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.parent.iterdir()}
    assert modes == {0o666 & ~umask}


def test_leftovers_of_killed_jobs_are_swept_and_nothing_else(out):
    """A job that dies as it writes the sidecar leaves a file; the next one on this output removes it, and no other."""
    code = """
        import os, sys
        from pathlib import Path
        from flexgen_triton.jobs.journal import Journal
        os.fsync = lambda file: os.kill(os.getpid(), 9)
        Journal(Path(sys.argv[1]), {"model": "tiny", "seed": 0})
    """
    dead = subprocess.run([sys.executable, "-c", textwrap.dedent(code), out], cwd=ROOT, check=False)
    assert dead.returncode == -signal.SIGKILL
    (left,) = (p for p in out.parent.iterdir() if p.suffix == ".tmp")
    prefix, _ = left.name.rsplit("-", 1)
    other = Sidecar(out.with_name("other.jsonl"))
    kept = {
        out.with_name(f"{prefix}-mine.tmp"): "no such number",
        out.with_name(f"{prefix}-{'0' * 16}.tmp.txt"): "another ending",
        other.path.with_name(f"{other.prefix}-{'0' * 16}.tmp"): "another output's",
    }
    for path, text in kept.items():
        path.write_text(text)
    link, directory = (out.with_name(f"{prefix}-{digit * 16}.tmp") for digit in "12")
    link.symlink_to(out.with_name("victim"))
    out.with_name("victim").write_text("precious")
    directory.mkdir()
    with Journal(out, JOB):
        pass
    assert not left.exists() and {path: path.read_text() for path in kept} == kept
    assert link.is_symlink() and directory.is_dir() and out.with_name("victim").read_text() == "precious"


# Standard output


def test_answers_that_are_passed_on_are_whole_lines_and_flushed(tmp_path):
    with (tmp_path / "stream").open("wb") as stream:
        passing = Passing(stream, "standard output")
        answer_all(passing, lines(2))
        assert answers(tmp_path / "stream") == [1, 2] and passing.done == 2
        assert not passing.is_done(lines(1)[0])


def test_answers_that_cannot_be_passed_on_are_a_sentence(tmp_path):
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(JournalError) as caught:
        answer_all(Passing(full, "standard output"), lines(1))
    assert "standard output cannot be written past 0 lines: its disk is full" in str(caught.value)
    assert "name an output file, which keeps what is done" in str(caught.value)


# Disks and kills: processes of their own

WORKER = """
    import sys, time, resource
    from pathlib import Path
    from flexgen_triton.jobs.journal import Journal, read_lines
    from flexgen_triton.jobs.sidecar import JournalError
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
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    _, errors = worker(source, out).communicate(timeout=60)
    assert not errors and sorted(answers(out)) == list(range(1, 301))


def test_the_limit_of_a_line_is_8_mib():
    assert MAX_LINE == 8 << 20
