"""Things that processes share are made by one of them, and are never seen unfinished."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from made_once import made_once


def make_slowly(part: Path) -> None:
    (part / "first").write_text(str(os.getpid()))
    time.sleep(0.2)
    (part / "second").write_text(str(os.getpid()))


def read(folder: Path) -> tuple[str, str]:
    made_once(folder, make_slowly)
    return (folder / "first").read_text(), (folder / "second").read_text()


def test_processes_that_ask_at_once_find_what_one_of_them_made(tmp_path):
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(read, [tmp_path / "shared" / "model"] * 3))
    assert len(set(found)) == 1
    first, second = found[0]
    assert first == second


def test_what_failed_half_way_is_made_anew(tmp_path):
    def fail(part: Path) -> None:
        (part / "first").write_text("half")
        raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        made_once(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists()
    assert read(tmp_path / "model") == (str(os.getpid()), str(os.getpid()))
