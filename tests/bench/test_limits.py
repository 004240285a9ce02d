"""A command under a memory limit, and a checkpoint that is made in little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import limits
import pytest
import torch
from limits import drop_page_cache, parse_bytes, run_limited
from make_checkpoint import MARKER, Recipe, cut_shards, make_checkpoint
from safetensors import safe_open

MIB = 2**20
SCRIPTS = Path(limits.__file__).parent
needs_group = pytest.mark.skipif(not limits.can_limit(), reason="no memory group can be made here")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def allocate(mib: int) -> list[str]:
    return python(f"x = bytearray({mib} << 20); print(len(x))")


def groups() -> list[Path]:
    return [path for parent, _ in limits._parents() for path in parent.glob("bench-*")]


def recipe(**changes: object) -> Recipe:
    given: dict[str, object] = {"size": "350m", "layers": 1, "dtype": "bfloat16", "format": "safetensors", "seed": 0}
    return Recipe(**{**given, "shard_bytes": 64 * MIB, **changes})  # type: ignore[arg-type]


@needs_group
def test_a_process_over_its_limit_is_killed_and_said_to_be() -> None:
    run = run_limited(allocate(400), 100 * MIB, timeout_s=60)
    assert (run.returncode, run.oom_killed, run.limited) == (limits.KILLED, True, True)
    assert run.peak_bytes is not None and 90 * MIB < run.peak_bytes <= 100 * MIB


@needs_group
def test_a_process_under_its_limit_ends_as_it_would_with_its_peak() -> None:
    run = run_limited(allocate(200), 400 * MIB, timeout_s=60)
    assert (run.returncode, run.stdout, run.oom_killed, run.limited) == (0, f"{200 * MIB}\n", False, True)
    assert run.peak_bytes is not None and 200 * MIB < run.peak_bytes < 260 * MIB


@needs_group
def test_a_killed_child_is_seen_when_its_parent_lives_on() -> None:
    code = f"import subprocess, sys; print(subprocess.run({allocate(400)!r}).returncode)"
    run = run_limited(python(code), 100 * MIB, timeout_s=60)
    assert (run.returncode, run.stdout, run.oom_killed) == (0, "-9\n", True)


@needs_group
def test_page_cache_counts_and_is_reclaimed_at_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "cold"
    file.write_bytes(bytes(150 * MIB))
    read = python(f"f = open({str(file)!r}, 'rb')\nwhile f.read(1 << 20): pass")
    drop_page_cache(tmp_path)
    roomy = run_limited(read, 400 * MIB, timeout_s=60)
    assert roomy.peak_bytes is not None and roomy.peak_bytes > 150 * MIB
    drop_page_cache(file)
    tight = run_limited(read, 64 * MIB, timeout_s=60)
    assert tight.returncode == 0 and tight.peak_bytes is not None and tight.peak_bytes <= 64 * MIB


@needs_group
def test_without_a_limit_the_peak_is_still_measured() -> None:
    run = run_limited(allocate(150), None, timeout_s=60)
    assert (run.returncode, run.limited) == (0, False)
    assert run.peak_bytes is not None and run.peak_bytes > 150 * MIB


@needs_group
@pytest.mark.parametrize(
    "code", ["pass", "raise SystemExit(3)", "import os; os.abort()"], ids=["ends", "fails", "dies"]
)
def test_the_group_is_removed_however_the_command_ends(code: str) -> None:
    before = groups()
    run_limited(python(code), 100 * MIB, timeout_s=60)
    assert groups() == before


@needs_group
def test_a_process_left_behind_does_not_keep_the_group() -> None:
    before = groups()
    left = python("import time; time.sleep(600)")
    run = run_limited(python(f"import subprocess; subprocess.Popen({left!r}, start_new_session=True)"), 100 * MIB)
    assert run.returncode == 0 and run.seconds < 60
    assert groups() == before


@needs_group
def test_the_group_is_removed_when_the_caller_fails() -> None:
    before = groups()
    with pytest.raises(ZeroDivisionError), limits.memory_group(100 * MIB):
        _ = 1 / (len(groups()) - len(before) - 1)  # one group more than before
    assert groups() == before


@needs_group
def test_a_script_that_is_told_to_end_ends_its_command_and_removes_the_group() -> None:
    before = groups()
    command = python("import time; print('on', flush=True); time.sleep(600)")
    script = [sys.executable, str(SCRIPTS / "limits.py"), "--memory", "100MB", "--", *command]
    with subprocess.Popen(script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        process.terminate()
        assert process.wait(timeout=60) == 143
    assert groups() == before


def test_a_command_that_runs_too_long_is_ended() -> None:
    run = run_limited(python("import time; print('on', flush=True); time.sleep(600)"), None, timeout_s=1)
    assert (run.returncode, run.stdout) == (limits.TIMED_OUT, "on\n") and 1 <= run.seconds < 30


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", 143)],
    ids=["exit", "signal"],
)
def test_a_commands_own_end_is_handed_on(code: str, expected: int) -> None:
    assert run_limited(python(code), None, timeout_s=60).returncode == expected


def test_a_missing_command_is_127() -> None:
    run = run_limited(["no-such-command"], None, timeout_s=60)
    assert run.returncode == 127 and "no-such-command" in run.stderr


def test_much_output_on_both_streams_is_kept() -> None:
    run = run_limited(python("import sys; print('o' * 10**6); print('e' * 10**6, file=sys.stderr)"), None, timeout_s=60)
    assert (len(run.stdout), len(run.stderr)) == (10**6 + 1, 10**6 + 1)


def test_where_no_group_can_be_made_it_runs_without_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_parents", lambda: iter(()))
    with pytest.warns(UserWarning, match="without a memory limit"):
        run = run_limited(allocate(200), 100 * MIB, timeout_s=60)
    assert (run.returncode, run.oom_killed, run.limited) == (0, False, False)
    assert run.peak_bytes is not None and run.peak_bytes > 200 * MIB


def test_a_system_whose_memory_controller_is_off_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_parents", lambda: iter([(tmp_path / "missing", limits.V2)]))
    assert not limits.can_limit()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1600MB", 1_600_000_000), ("1.5GiB", 3 * 2**29), ("6g", 6 * 10**9), ("64 KiB", 65536), ("123", 123), ("5B", 5)],
)
def test_sizes_are_read_in_tens_and_in_twos(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1.5.2G", "12 parsecs", "5I"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of bytes"):
        parse_bytes(text)


def command_line(*args: str) -> subprocess.CompletedProcess[str]:
    script = str(SCRIPTS / "limits.py")
    return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, timeout=120, check=False)


@needs_group
def test_the_command_line_says_killed_for_memory_and_exits_137() -> None:
    run = command_line("--memory", "100MB", "--", *allocate(400))
    assert run.returncode == 137 and "killed for memory" in run.stderr and "100 MB" in run.stderr


def test_the_command_line_hands_on_output_flags_and_exit_code() -> None:
    run = command_line("--", *python("import sys; print(sys.argv[1:]); raise SystemExit(5)"), "--memory", "x")
    assert (run.returncode, run.stdout) == (5, "['--memory', 'x']\n")


@needs_group
def test_a_checkpoint_is_made_in_less_memory_than_it_has(tmp_path: Path) -> None:
    """Four blocks of OPT-2.7B are 0.9 GB with their table."""
    script = [sys.executable, str(SCRIPTS / "make_checkpoint.py"), "2.7b", str(tmp_path / "m"), "--layers", "4"]
    run = run_limited(script, 600 * MIB, timeout_s=300)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 850 * MIB


def test_a_checkpoint_is_what_transformers_expects(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    make_checkpoint(tmp_path / "m", recipe())
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype="auto", output_loading_info=True
    )
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert set(loading["missing_keys"]) <= {"lm_head.weight"}
    assert model.dtype == torch.bfloat16 and not model.config.do_layer_norm_before
    assert all(0 < p.float().std() < 0.2 for p in model.parameters())


@pytest.mark.parametrize("shard_bytes", [10**9, 8 * MIB], ids=["one file", "shards"])
def test_weights_do_not_depend_on_format_or_shards(tmp_path: Path, shard_bytes: int) -> None:
    make_checkpoint(tmp_path / "safe", recipe())
    make_checkpoint(tmp_path / "bin", recipe(format="bin", shard_bytes=shard_bytes))
    files = list((tmp_path / "bin").glob("*.bin"))
    assert len(files) > 1 if shard_bytes < 10**9 else len(files) == 1
    state = {name: t for file in files for name, t in torch.load(file, weights_only=True).items()}
    for file in (tmp_path / "safe").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                assert torch.equal(tensors.get_tensor(name), state.pop(name)), name
    assert not state


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_checkpoint(tmp_path / str(seed), recipe(seed=seed, shard_bytes=10**9))
    one, other = ((tmp_path / str(seed) / "model.safetensors").read_bytes() for seed in (0, 1))
    assert len(one) == len(other) and one != other


def test_a_complete_checkpoint_is_reused_and_another_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    assert make_checkpoint(directory, recipe())
    made = (directory / MARKER).stat().st_mtime_ns
    assert not make_checkpoint(directory, recipe())
    assert (directory / MARKER).stat().st_mtime_ns == made
    with pytest.raises(FileExistsError, match="is not this checkpoint"):
        make_checkpoint(directory, recipe(seed=1))
    shard = next(directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FileExistsError, match="is not this checkpoint"):
        make_checkpoint(directory, recipe())


def test_a_checkpoint_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("make_checkpoint.drop_page_cache", lambda path: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        make_checkpoint(tmp_path / "m", recipe())
    assert not list(tmp_path.iterdir())


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    tensors = [("a", (10,)), ("b", (100,)), ("c", (10,)), ("d", (15,))]
    assert [[name for name, _ in shard] for shard in cut_shards(tensors, 2, 50)] == [["a"], ["b"], ["c", "d"]]
