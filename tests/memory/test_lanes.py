"""Lanes: in order each, waiting for each other by position, stopped by the first error."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from flexgen_triton.memory.lanes import Lanes, LaneStoppedError

CPU = torch.device("cpu")


@pytest.fixture
def lanes():
    spans = []
    made = Lanes("abc", device=CPU, on_done=lambda tag, start, end: spans.append((tag, start, end)))
    made.spans = spans
    yield made
    made.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("lane-")]


def test_a_lane_is_in_order_and_waits_for_others(lanes):
    seen = []
    first = lanes.submit("a", lambda: (time.sleep(0.05), seen.append("a0")), [], "a0")
    lanes.submit("b", lambda: seen.append("b0"), [("a", first)], "b0")
    lanes.submit("b", lambda: seen.append("b1"), [], "b1")
    lanes.submit("c", lambda: seen.append("c0"), [], "c0")
    lanes.finish()
    assert seen == ["c0", "a0", "b0", "b1"]
    assert {tag for tag, *_ in lanes.spans} == {"a0", "b0", "b1", "c0"}
    assert all(0 <= start <= end for _, start, end in lanes.spans)


def test_lanes_run_at_the_same_time(lanes):
    barrier = threading.Barrier(3, timeout=5)
    for name in "abc":
        lanes.submit(name, barrier.wait, [], name)
    lanes.finish()
    assert len(lanes.spans) == 3


def test_the_first_error_is_raised_with_its_tag_and_stops_the_rest(lanes):
    ran = []

    def fail():
        raise OSError("gone")

    position = lanes.submit("a", fail, [], "read(3)")
    lanes.submit("b", lambda: ran.append("b"), [("a", position)], "b0")
    with pytest.raises(OSError, match="gone") as caught:
        lanes.finish()
    assert any("read(3)" in note for note in caught.value.__notes__)
    with pytest.raises(OSError, match="gone"):
        lanes.submit("c", lambda: ran.append("c"), [], "c0")
    assert not ran


def test_submitting_waits_for_room():
    release = threading.Event()
    lanes = Lanes("a", device=CPU, on_done=lambda *_: None, window=4)
    for _ in range(4):
        lanes.submit("a", release.wait, [], "x")
    blocked = threading.Thread(target=lambda: lanes.submit("a", lambda: None, [], "y"))
    blocked.start()
    blocked.join(0.1)
    assert blocked.is_alive()
    release.set()
    blocked.join(5)
    assert not blocked.is_alive()
    lanes.finish()
    lanes.close()


def test_closing_while_work_waits_ends_at_once():
    lanes = Lanes("ab", device=CPU, on_done=lambda *_: None)
    lanes.submit("a", lambda: None, [("b", 7)], "never")
    lanes.close()
    with pytest.raises(LaneStoppedError):
        lanes.finish()


def test_wait_returns_when_that_work_is_done(lanes):
    done = []
    position = lanes.submit("a", lambda: (time.sleep(0.02), done.append(1)), [], "a0")
    lanes.submit("a", lambda: time.sleep(0.2), [], "a1")
    began = time.perf_counter()
    lanes.wait("a", position)
    assert done == [1]
    assert time.perf_counter() - began < 0.15


def test_whoever_waits_for_a_lane_is_asked_whether_to_go_on():
    """And what the answer raises is raised at once, however long the lane's work takes."""
    release, asked = threading.Event(), []

    def check():
        asked.append(threading.current_thread())
        if len(asked) == 4:
            raise KeyboardInterrupt

    with Lanes("a", device=CPU, check=check) as lanes:
        lanes.submit("a", release.wait, [], "long")
        with pytest.raises(KeyboardInterrupt):
            lanes.finish()
        release.set()
    assert asked == [threading.current_thread()] * 4
