"""The system's errors: each is one sentence with the file's name and a way out, and an exit code of 1."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from batch_jobs import line

from flexgen_triton.commands.command_line import invoke
from flexgen_triton.commands.main import cli
from flexgen_triton.os_errors import sentence


def test_every_error_has_a_way_out_and_the_files_name(tmp_path):
    for number, name in errno.errorcode.items():
        said = sentence(OSError(number, os.strerror(number), str(tmp_path / "file")))
        assert "\n" not in said and "[Errno" not in said and not said.endswith("."), (name, said)
        assert "; " in said, (name, said)
        is_the_files = number not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
        assert said.startswith(str(tmp_path / "file")) == is_the_files, (name, said)


def test_words_of_our_own_are_kept_and_names_are_printable():
    assert sentence(OSError("mine; do this")) == "mine; do this"
    assert sentence(OSError(errno.ENOSPC, "5 bytes are needed; free some")) == "5 bytes are needed; free some"
    said = sentence(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a\nb\x1b[31m"))
    assert said.startswith("a\\nb\\x1b[31m ")
    long = sentence(OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x" * 5000))
    assert len(long) < 300 and long.startswith("...xxx")
    assert sentence(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))).startswith("a file cannot be written: its disk")


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Runs a command line, which must end in one sentence and leave no file; returns the sentence."""
    (tmp_path / "in.jsonl").write_bytes(line("a", prompt="Hello") + b"\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)

    def once(*args: str) -> str:
        before = sorted(tmp_path.iterdir())
        monkeypatch.setattr(sys, "argv", ["flexgen_triton", *args, "--offload-dir", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            invoke(cli)
        output, errors = capfd.readouterr()
        assert ended.value.code == 1 and output == "" and errors.count("\n") == 1, errors
        assert errors.startswith("error: ") and "[Errno" not in errors
        assert sorted(tmp_path.iterdir()) == before
        return errors.removeprefix("error: ").strip()

    return once


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none.jsonl", "none.jsonl is not there; check the path"),
        ("none/in.jsonl", "none/in.jsonl cannot be there: there is no directory none; make it, or check the path"),
        (".", ". is a directory; name a file of requests"),
        ("pipe", "pipe is no ordinary file; .* write it to a file, or give -i - and the requests on standard input"),
        ("loop", "loop is a symbolic link that leads nowhere or may not be followed here; name the file itself"),
        ("in.jsonl/x", "in.jsonl/x cannot be there: a part of its path is a file and no directory; check the path"),
        ("x" * 300, "x has a longer name than the file system takes"),
    ],
)
def test_an_input_that_cannot_be_read_is_a_sentence(run, source, words):
    matches(run("run-batch", "-i", source, "-o", "out.jsonl"), words)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("none/out.jsonl", "none/out.jsonl cannot be there: there is no directory .*none; make it, or check the path"),
        (".", "is a directory; name a file in it"),
        ("pipe", "pipe is no ordinary file; a job that can go on needs one .* -o - writes them to standard output"),
        ("loop", "loop is a symbolic link that leads nowhere or may not be followed here; name the file itself"),
        ("in.jsonl/x", "in.jsonl/x cannot be there: a part of its path is a file and no directory; check the path"),
        ("x" * 300, "x has a longer name than the file system takes .* give it a shorter one"),
        ("x" * 253, "x.job has a longer name than the file system takes .* give it a shorter one"),
        ("in.jsonl", "in.jsonl is the input too; name another output"),
    ],
)
def test_an_output_that_cannot_be_written_is_a_sentence(run, output, words):
    matches(run("run-batch", "-i", "in.jsonl", "-o", output), words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none.txt", "none.txt is not there; check the path"),
        (".", ". is a directory; name a file"),
        ("loop", "loop is a symbolic link that leads nowhere"),
        ("x" * 300, "x has a longer name than the file system takes"),
    ],
)
def test_prompts_that_cannot_be_read_are_a_sentence(run, source, words):
    matches(run("generate", "-f", source), words)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "in.jsonl may not be used by this user; change its permissions or its directory's"),
        (errno.EROFS, "in.jsonl lies on a file system that can only be read; name another place"),
        (errno.EIO, "in.jsonl cannot be read or written: its disk fails"),
        (errno.EMFILE, "too many files are open in this process; raise the limit that `ulimit -n` shows"),
        (errno.ENOSPC, "in.jsonl cannot be written: its disk is full; make room, or name another place"),
        (errno.EDQUOT, "in.jsonl cannot be written: its user's quota is used up; remove some files"),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_what_cannot_be_had_here_ends_in_the_same_way(run, monkeypatch, number, words):
    """Permissions (the tests may run as root), disks that are read-only or broken: the system's error, made by hand."""

    def fail(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "open", fail)
    for command in (("run-batch", "-o", "out.jsonl", "-i"), ("generate", "-f")):
        matches(run(*command, "in.jsonl"), words)


def test_standard_input_that_cannot_be_kept_is_a_sentence(run, monkeypatch):
    monkeypatch.setattr("shutil.copyfileobj", failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    said = run("run-batch", "-i", "-", "-o", "out.jsonl")
    matches(
        said, "standard input cannot be kept in /.*: its disk is full; choose another directory by TMPDIR, or write"
    )


def failing(error: OSError) -> Callable[..., None]:
    def fail(*args: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "args", [["run-batch", "-i", "-", "-o", "out.jsonl"], ["generate"]], ids=["run-batch", "generate"]
)
def test_standard_input_that_is_closed_is_a_sentence(run, monkeypatch, args):
    monkeypatch.setattr(sys, "stdin", None)
    matches(run(*args), "standard input is closed; ")


def matches(said: str, words: str) -> None:
    assert re.search(words, said), said
