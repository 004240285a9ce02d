"""The command: what it prints and writes, and that every mistake ends in one sentence and a non-zero exit."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import profile_file

from flexgen_triton.commands.bench import command, log_name, main
from flexgen_triton.plan.policy import CompressionConfig, Policy, PolicyError

ROOT = Path(__file__).parents[2]
SMALL = (
    "--model",
    "opt-125m",
    "--path",
    "_DUMMY_",
    "--prompt-len",
    "4",
    "--gen-len",
    "2",
    "--gpu-batch-size",
    "4",
    "--no-log",
)
KEYS = (
    "model device policy prompt_len gen_len num_prompts prefill_s prefill_tok_s decode_s decode_tok_s total_s "
    "total_tok_s peak_gpu_bytes peak_host_bytes model_bytes cache_bytes hidden_bytes placement lanes makespan_s bound_s"
)


MODELS = {"1.3b": "facebook/opt-1.3b --cut-gen-len 8"} | {
    size: f"facebook/opt-{size} --path _DUMMY_" for size in ("6.7b", "30b", "175b", "175b-stage")
}
FORMATS = "--compress-weight --compress-cache"
SUITE = {  # FlexGen's published commands: by model, percent | batch size x batches | other flags
    "1.3b": """
        100 0 100 0 100 0 | 16x1 |
        0 100 100 0 100 0 | 16x1 |
        100 0 0 100 100 0 | 16x1 | --cpu
        0 100 0 100 100 0 | 16x1 | --cpu
        0 0 100 0 100 0   | 16x1 |
        100 0 0 0 100 0   | 16x1 | --cpu
        50 50 100 0 100 0 | 16x1 |
        100 0 50 50 100 0 | 16x1 | --cpu
        100 0 0 0 100 0   | 16x1 | --cpu --attn-sparsity 0.1
        100 0 0 0 100 0   | 16x1 | --compress-cache
        100 0 100 0 100 0 | 16x2 |""",
    "6.7b": f"""
        100 0 100 0 100 0 | 4x1   | --overlap False --prompt-len 256 --gen-len 32
        100 0 100 0 100 0 | 2x1   | --overlap False
        100 0 100 0 100 0 | 1x1   | --overlap False --prompt-len 1024
        100 0 100 0 100 0 | 128x1 | --overlap False --prompt-len 256 --gen-len 32 {FORMATS}
        100 0 100 0 100 0 | 72x1  | --overlap False {FORMATS}
        100 0 100 0 100 0 | 28x1  | --overlap False {FORMATS} --prompt-len 1024""",
    "30b": """
        10 90 0 100 0 100 | 160x2 | --debug fewer_batch --cpu --prompt-len 256 --gen-len 32
        20 80 0 100 0 100 | 48x3  | --debug fewer_batch --cpu
        4 96 0 100 0 100  | 20x4  | --debug fewer_batch --cpu --prompt-len 1024
        0 100 0 100 0 100 | 128x8 | --debug fewer_batch --compress-cache --prompt-len 256 --gen-len 32
        0 100 0 100 0 100 | 64x8  | --debug fewer_batch --compress-cache
        0 100 0 100 0 100 | 20x12 | --debug fewer_batch --compress-cache --prompt-len 1024
        0 100 100 0 100 0 | 8x1   | --debug fewer_batch
        0 100 0 100 0 100 | 48x3  | --debug fewer_batch --cpu
        20 80 0 100 0 100 | 48x1  | --debug fewer_batch --cpu
        0 50 0 0 0 100    | 32x8  | --debug fewer_batch --cpu
        0 0 0 0 0 100     | 32x8  | --debug fewer_batch --cpu
        0 50 0 0 0 100    | 32x1  | --debug fewer_batch --cpu
        20 80 100 0 100 0 | 1x1   | --debug fewer_batch --cpu
        0 50 100 0 100 0  | 1x1   | --debug fewer_batch --cpu""",
    "175b": f"""
        0 50 0 0 0 100    | 64x8  | --debug fewer_batch --pin-weight 0 --cpu --prompt-len 256 --gen-len 32
        0 50 0 0 0 100    | 32x8  | --debug fewer_batch --pin-weight 0 --cpu
        0 50 0 0 0 100    | 12x12 | --debug fewer_batch --pin-weight 0 --cpu --prompt-len 1024
        0 100 0 100 0 100 | 96x3  | --debug fewer_batch --pin-weight 0 {FORMATS} --prompt-len 256 --gen-len 32
        0 100 0 100 0 100 | 48x3  | --debug fewer_batch --pin-weight 0 {FORMATS}
        0 100 0 100 0 100 | 12x4  | --debug fewer_batch --pin-weight 0 {FORMATS} --prompt-len 1024
        0 0 100 0 100 0   | 2x1   | --debug fewer_batch
        0 50 0 0 0 100    | 32x1  | --debug fewer_batch --pin-weight 0 --cpu
        0 50 0 0 0 100    | 32x8  | --debug fewer_batch --pin-weight 0 --cpu --overlap False
        0 50 0 0 0 100    | 32x8  | --debug fewer_batch --pin-weight 0
        20 80 0 100 0 100 | 48x3  | --debug fewer_batch --pin-weight 0 --cpu
        0 100 0 100 0 100 | 48x3  | --debug fewer_batch --pin-weight 0 --cpu
        20 80 0 100 0 100 | 48x1  | --debug fewer_batch --pin-weight 0 --cpu
        0 0 0 0 0 100     | 32x8  | --debug fewer_batch --pin-weight 0 --cpu
        20 80 100 0 100 0 | 1x1   | --debug fewer_batch --pin-weight 0 --cpu
        0 50 100 0 100 0  | 1x1   | --debug fewer_batch --pin-weight 0 --cpu
        0 50 0 0 0 100    | 32x8  | --debug breakdown --pin-weight 0 --cpu""",
    "175b-stage": """
        0 50 0 0 0 100    | 32x8  | --debug fewer_batch --pin-weight 0 --cpu
        0 100 0 100 0 100 | 32x6  | --debug fewer_batch --pin-weight 0 --cpu""",
}


def suite_commands() -> list[tuple[str, ...]]:
    """The flags of each of the published commands."""
    found = []
    for size, rows in SUITE.items():
        for row in rows.strip().splitlines():
            percent, batches, flags = (part.split() for part in row.split("|"))
            each, number = batches[0].split("x")
            shape = ("--gpu-batch-size", each, "--num-gpu-batches", number)
            found.append(("--model", *MODELS[size].split(), "--percent", *percent, *shape, *flags))
    return found


def bench(*args: str, cwd: Path, module: str = "bench") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hub")}
    command = [sys.executable, "-m", f"flexgen_triton.{module}", *in_folder(cwd), *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=250, check=False)


def in_folder(cwd: Path) -> tuple[str, ...]:
    """Options of every run: the folder to work in, and the machine's profile."""
    if not (cwd / "machine.json").exists():
        profile_file(cwd)
    return "--offload-dir", str(cwd / "offload"), "--hardware", "machine.json"


def refused(*args: str, cwd: Path) -> str:
    """Run what must fail, in this process; returns its one sentence."""
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(stderr):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["bench", *in_folder(cwd), *args])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code
    return sentence(stderr.getvalue())


def sentence(stderr: str) -> str:
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1, stderr
    return lines[0]


def test_figures_json_trace_and_log(tiny, tmp_path):
    shape = ("--prompt-len", "20", "--gen-len", "6", "--gpu-batch-size", "2", "--num-gpu-batches", "2")
    files = ("--json", "o.json", "--trace", "t.json", "--log-file", "run.log")
    done = bench(
        "--model",
        str(tiny.path),
        *shape,
        "--percent",
        "0",
        "50",
        "0",
        "50",
        "0",
        "50",
        *files,
        cwd=tmp_path,
        module="flex_opt",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert set(KEYS.split()) <= set(result)
    assert result["num_prompts"] == 4 and result["prompt_len"] == 20 and result["gen_len"] == 6
    assert result["total_tok_s"] == pytest.approx(4 * 6 / result["total_s"])
    assert result["decode_tok_s"] == pytest.approx(4 * 5 / result["decode_s"])
    assert sum(result["placement"]["weights"].values()) == result["model_bytes"]
    assert result["makespan_s"] >= 0.999 * max(
        use["busy_s"] for lanes in result["lanes"].values() for use in lanes.values()
    )
    moved = result["lanes"]["decode"]["disk_in"]
    assert moved["bytes"] > 0 and moved["ops"] > 0 and moved["busy_s"] > 0
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "compute" for e in events) == 6 * 2 * 8
    logged = read_log(tmp_path / "run.log")
    assert logged["total throughput"] == pytest.approx(result["total_tok_s"], abs=5e-4)
    assert logged["model size"] == pytest.approx(result["model_bytes"] / 2**30, abs=5e-4)
    assert logged["projected"] == result["projected"] == 0


def read_log(path: Path) -> dict[str, float]:
    """A log's figures, found as FlexGen's parser finds them: by line, tab, and the text around a number."""
    lines = path.read_text().splitlines()
    assert len(lines) == 5 and "\t" not in lines[0].split("hidden size (p): ")[1]
    figures = {}
    for line, names in zip(
        lines[:2], (("model size", "cache size", "hidden size (p)"), ("peak gpu mem",)), strict=True
    ):
        for name, part in zip(names, line.split("\t"), strict=False):
            start, end = f"{name}: ", " GB"
            assert part.startswith(start) and part.endswith(end)
            figures[name] = float(part[len(start) : -len(end)])
    figures["projected"] = {"True": 1.0, "False": 0.0}[lines[1].split("\t")[1].removeprefix("projected: ")]
    for phase, line in zip(("prefill", "decode", "total"), lines[2:], strict=True):
        seconds, rate = line.split("\t")
        assert seconds.startswith(f"{phase} latency:") and rate.startswith(f"{phase} throughput:")
        figures[f"{phase} latency"] = float(seconds[seconds.index(":") + 1 : seconds.index(" s")])
        figures[f"{phase} throughput"] = float(rate[rate.index(":") + 1 : rate.index(" to")])
    return figures


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A directory to work in, and no way to a hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_process(*args: str, cwd: Path) -> str:
    """Run what must succeed, in this process; returns what it prints."""
    done = CliRunner().invoke(command, [*in_folder(cwd), *args], catch_exceptions=False)
    assert done.exit_code == 0, (args, done.output)
    return done.output


@pytest.mark.grid(cover=[])
@pytest.mark.parametrize("first", range(5))
def test_every_published_command_of_flexgens_benchmark_is_understood(offline, first):
    """A fifth of them at a time."""
    commands = suite_commands()
    assert len(commands) == len(set(commands)) == 50
    for args in commands[first::5]:
        shape = f"{args[args.index('--gpu-batch-size') + 1]} x {args[args.index('--num-gpu-batches') + 1]} sequences"
        printed = " ".join(in_process(*args, "--dry-run", cwd=offline).split())
        assert shape in printed, args
        assert "32 token steps" in printed, args
        assert ("sequential" in printed) == ("--overlap" in args or "breakdown" in args), args
    assert [path.name for path in offline.iterdir()] == ["machine.json"]


def test_debug_modes_project_a_cut_run(tiny, offline):
    shape = ("--prompt-len", "4", "--gen-len", "40", "--gpu-batch-size", "2", "--num-gpu-batches", "2")
    logs = {}
    for mode in ("fewer_batch", "breakdown"):
        printed = in_process("--model", str(tiny.path), *shape, "--debug", mode, "--json", "o.json", cwd=offline)
        result = json.loads((offline / "o.json").read_text())
        assert "lanes" in printed and result["projected"] and result["gen_len"] == 40
        assert result["policy"]["overlap"] == (mode == "fewer_batch")
        assert result["lanes"]["decode"]["compute"]["ops"] < 40 * 2
        assert result["decode_s"] > 3 * result["makespan_s"]
        logs |= {path.name: read_log(path) for path in offline.glob("*.log")}
    assert len(logs) == 2 and all(log["projected"] for log in logs.values())


PERCENTS = st.tuples(*(st.integers(0, 100) | st.floats(0, 100),) * 2).filter(lambda pair: sum(pair) <= 100)
WEIGHTS = st.sampled_from([(False, CompressionConfig())]) | st.tuples(
    st.just(True),
    st.builds(
        CompressionConfig, group_size=st.sampled_from([32, 64, 128]), group_dim=st.integers(0, 1), enabled=st.booleans()
    ),
)
CACHES = st.sampled_from([(on, CompressionConfig(group_dim=2, enabled=e)) for on, e in ((0, 1), (1, 1), (1, 0))])


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy."""
    flags, weights, cache = draw(st.tuples(*(st.booleans(),) * 5)), draw(WEIGHTS), draw(CACHES)
    *schedule, keep_open = flags
    return Policy(
        *(draw(st.sampled_from([1, 2, 11, 12])) for _ in range(2)),
        *draw(PERCENTS),
        *draw(PERCENTS),
        *draw(PERCENTS),
        *schedule,
        draw(st.sampled_from([1, 1.0, 0.1]) | st.floats(0.001, 1)),
        *weights,
        *cache,
        draw(st.sampled_from([100, 10]) | st.floats(0, 100)),
        keep_open,
    )


@settings(max_examples=100)
@given(policies(), policies(), st.data())
def test_no_two_policies_share_a_logs_name(first, second, data):
    """Two at random, and two that differ in one field."""
    field = data.draw(st.sampled_from([f for f in Policy.__slots__ if not f.startswith(("comp_", "compress"))]))
    near = None
    with suppress(PolicyError):
        near = replace(first, **{field: getattr(second, field)})
    for other in (second, near):
        if other is not None:
            names = {log_name("facebook/opt-30b", p, prompt_len=512, gen_len=32) for p in (first, other)}
            assert len(names) == len({first, other}) and all("/" not in n and len(n) < 250 for n in names)


def test_the_longest_log_name_is_one_that_file_systems_take():
    """Every percentage with all its digits, every mark: two such policies that differ in the last digit."""
    shares = [100 / 7, 100 / 3] * 3
    compressed = {"compress_weight": True, "comp_weight_config": CompressionConfig(group_size=32, group_dim=1)}
    first = Policy(12, 11, *shares, False, False, False, True, 2 / 3, **compressed, compress_cache=True)
    names = [
        log_name("facebook/opt-30b", policy, prompt_len=512, gen_len=32)
        for policy in (first, replace(first, cpu_attention_percent=100 / 3))
    ]
    assert len(set(names)) == 2 and all(len(f"{name}.log") <= 255 for name in names)
    assert all(name.startswith("fo-opt-30b-gbs12-ngbs11-prompt512-gen32-percent-14.28") for name in names)
    long = [log_name(f"{'m' * 300}{n}", first, prompt_len=512, gen_len=32) for n in range(2)]
    assert len(set(long)) == 2 and all(len(f"{name}.log") <= 255 for name in long)


def test_a_cut_run_projects_the_rest(tiny, tmp_path):
    shape = ("--prompt-len", "8", "--gen-len", "40", "--cut-gen-len", "5", "--gpu-batch-size", "4")
    assert bench("--model", str(tiny.path), *shape, "--no-log", "--json", "o.json", cwd=tmp_path).returncode == 0
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["gen_len"] == 40
    assert result["total_s"] > 2 * result["makespan_s"]


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("Return the\nRaise an exception if the file\n\n")
    done = bench("--prompts", "p.txt", "--gen-len", "8", "--no-log", "--json", "o.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o.json").read_text())["num_prompts"] == 2
    assert "Raise an exception if the file" in done.stdout


def test_a_dry_run_touches_nothing(tmp_path):
    shape = ("--gpu-batch-size", "32", "--num-gpu-batches", "8", "--percent", "0", "50", "0", "0", "0", "100")
    done = bench("--model", "facebook/opt-175b", "--path", "_DUMMY_", *shape, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "weights" in done.stdout and "32 x 8" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


def test_random_weights_are_made_once(tmp_path):
    assert bench(*SMALL, cwd=tmp_path).returncode == 0
    stores = {p: p.stat().st_mtime_ns for p in (tmp_path / "offload").rglob("*") if p.is_file()}
    assert bench(*SMALL, cwd=tmp_path).returncode == 0
    assert stores == {p: p.stat().st_mtime_ns for p in (tmp_path / "offload").rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("percent", "words"),
    [
        ("100 1 100 0 100 0", "101 %"),
        ("50 -1 100 0 100 0", "between 0 and 100"),
        ("0 0 0 120 0 0", "between 0 and 100"),
        ("100 0 100 0", "6"),
    ],
)
def test_percentages(tiny, tmp_path, percent, words):
    assert words in refused("--model", str(tiny.path), "--percent", *percent.split(), cwd=tmp_path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--prompt-len 100 --gen-len 40", "128 positions"),
        ("--gpu-batch-size 0", "at least 1"),
        ("--cpu-cache-compute --cpu-attention-percent 101", "between 0 and 100"),
        ("--compress-weight --group-size 100", "group_size is 100; available is 32 or 64 or 128"),
        ("--attn-sparsity 0", "above 0 and at most 1"),
        ("--dtype int8", "dtype"),
    ],
)
def test_what_cannot_be_run(tiny, tmp_path, args, words):
    assert words in refused("--model", str(tiny.path), *args.split(), cwd=tmp_path)


def test_models_that_are_not_there(tiny, tmp_path):
    assert "not a directory" in refused("--model", str(tmp_path / "missing"), cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("--model", str(tmp_path / "empty"), cwd=tmp_path)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert "models only" in refused("--model", str(tmp_path / "bert"), cwd=tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny.path / "config.json").read_text())
    assert "no model.safetensors" in refused("--model", str(tmp_path / "bare"), "--prompt-len", "8", cwd=tmp_path)
    assert "no known size" in refused("--model", "opt-999b", "--path", "_DUMMY_", cwd=tmp_path)
    done = bench("--model", "nobody/nothing", cwd=tmp_path)  # offline, which is settled when a process starts
    assert done.returncode == 1 and "hub" in sentence(done.stderr)


def test_a_plan_that_exceeds_memory_names_one_that_fits(tmp_path):
    shape = ("--prompt-len", "2000", "--gen-len", "40", "--gpu-batch-size", "2000")
    sentence = refused("--model", "opt-125m", "--path", "_DUMMY_", *shape, cwd=tmp_path)
    assert "GiB" in sentence and "--gpu-batch-size" in sentence and "fits" in sentence


def test_a_damaged_store_is_refused_by_name(tmp_path):
    assert bench(*SMALL, cwd=tmp_path).returncode == 0
    damaged = max((tmp_path / "offload").rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    with damaged.open("r+b") as file:
        file.seek(damaged.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    for percent in ("0 0 100 0 100 0", "0 100 100 0 100 0"):
        assert damaged.name in refused(*SMALL, "--percent", *percent.split(), cwd=tmp_path)


def test_the_demo_runs_and_its_strategies_agree(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flexgen_triton.bench"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert "three strategies agree on all" in done.stdout
