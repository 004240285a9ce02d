"""Commands begin quickly and stop quietly: only what a command needs is imported, and Ctrl-C meanwhile is no traceback.

FLEXGEN_INTERRUPTS=30 runs the sweep: each command interrupted at so many instants of its first seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from machines import profile_file

from flexgen_triton import interrupts
from flexgen_triton.commands.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
HEAVY = ("torch", "transformers", "scipy", "numba", "rich", "triton", "numpy")
ROUNDS = 5
INTERRUPTS = int(os.environ.get("FLEXGEN_INTERRUPTS", "0"))
LAST_S = 6.0  # of the sweep's instants
MODULE = ("-m", "flexgen_triton")
BENCH = ("-m", "flexgen_triton.bench", "--offload-dir", "off", "--hardware", "machine.json", "--prompt-len", "4")
GENERATE = (*MODULE, "generate", "--offload-dir", "off", "--hardware", "machine.json", "Return the")
LONG = {  # commands that go on for longer than the sweep
    "bench": (*BENCH, "--gen-len", "250", "--num-prompts", "4000", "--no-log"),
    "the demo": (*MODULE, "bench", "--offload-dir", "off"),
    "generate": (*GENERATE, "--max-tokens", "250", "--n", "1000", "--ignore-eos"),
    "run-batch": (*MODULE, "run-batch", "--offload-dir", "off", "--hardware", "machine.json", "-i", "in", "-o", "out"),
    "plan": (*MODULE, "plan", "--model", "opt-175b", "--hardware", "t4"),
    "measure": (*MODULE, "measure", "--offload-dir", "off"),
}


def seconds(*args: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *args], env=ENV, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def imported(*args: str) -> set[str]:
    """The heavy packages that a run of the package with these arguments imports."""
    code = (
        "import sys, runpy, json\n"
        f"sys.argv = ['flexgen_triton', *{args!r}]\n"
        "try:\n    runpy.run_module('flexgen_triton', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as done:\n    assert not done.code\n"
        f"print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_nothing_heavy():
    assert not imported("--help")


@pytest.mark.parametrize("command", ["generate", "measure"])
def test_help_of_a_command_imports_no_torch(command):
    assert imported(command, "--help") <= {"rich"}


def test_the_package_imports_nothing_heavy():
    code = f"import sys, flexgen_triton; sys.exit(any(n in sys.modules for n in {HEAVY!r}))"
    assert subprocess.run([sys.executable, "-c", code], env=ENV, check=False).returncode == 0


def test_help_and_import_take_little_longer_than_python_itself():
    """The least of several, in turn: other work on the machine only adds."""
    runs = [
        (seconds("-c", "pass"), seconds("-c", "import flexgen_triton"), seconds(*MODULE, "--help"))
        for _ in range(ROUNDS)
    ]
    nothing, package, helped = map(min, zip(*runs, strict=True))
    assert package - nothing < 0.3
    assert helped - nothing < 1.0


def test_the_list_of_commands_says_what_they_say_themselves():
    context = click.Context(cli)
    for name, entry in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(1000) == entry.help
    assert cli.get_command(context, "bench_") is None


# Ctrl-C


@pytest.fixture
def folder(tmp_path) -> Path:
    profile_file(tmp_path)
    body = {"prompt": "Return the", "max_tokens": 200, "n": 100, "ignore_eos": True}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in").write_text("".join(json.dumps({**line, "custom_id": str(n)}) + "\n" for n in range(1000)))
    return tmp_path


def started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """A process that Ctrl-C reaches, even where these tests themselves run in the background and ignore it."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def check(status: int, stderr: list[str]) -> None:
    assert status == interrupts.INTERRUPTED, stderr
    lines = [line for line in stderr if line.strip()]
    assert len(lines) <= 1 and sum(map(len, lines)) < 100, stderr


@pytest.mark.parametrize(
    ("args", "module"),
    [(GENERATE, "click.globals"), (GENERATE, "torch.torch_version"), (BENCH, "click.globals"), (BENCH, "torch.fx")],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_ctrl_c_while_a_module_is_imported(folder, args, module):
    """The interpreter itself says how far it is; one that is told to stop after `module` is in the midst of others."""
    command = [sys.executable, "-X", "importtime", *args]
    said = []
    with started(command, folder) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if not line.startswith("import time:"):
                said.append(line)
            elif line.split("|")[-1].strip() == module:
                process.send_signal(signal.SIGINT)
    check(process.returncode, said)


def test_ctrl_c_is_left_to_the_library_when_nothing_is_loading():
    before = signal.getsignal(signal.SIGINT)
    interrupts.loading()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    interrupts.loaded()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts.loading()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not INTERRUPTS, reason="a sweep of minutes: FLEXGEN_INTERRUPTS=30")
@pytest.mark.parametrize("name", LONG)
@pytest.mark.timeout(3600)
def test_ctrl_c_at_any_instant(folder, name):
    found = []
    first = min(seconds("-c", "pass") for _ in range(ROUNDS))
    for n in range(INTERRUPTS):
        process = started([sys.executable, *LONG[name]], folder)
        at = first + (LAST_S - first) * n / max(INTERRUPTS - 1, 1)
        time.sleep(at)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=120)[1]
        found.append((round(at, 2), process.returncode, stderr))
    print(f"\n{name}: {len(found)} instants, exit codes {sorted({status for _, status, _ in found})}")
    for at, status, stderr in found:
        if status != interrupts.INTERRUPTED or "Traceback" in stderr or len(stderr.strip().splitlines()) > 1:
            print(f"  {at} s: {status} {stderr[-1500:]}")
    # before the package's first line it is the interpreter that is interrupted
    ours = [f for f in found if "init_import_site" not in f[2] and ("Traceback" not in f[2] or f"{ROOT}/" in f[2])]
    assert len(ours) >= len(found) - 2
    assert all(status == interrupts.INTERRUPTED and "Traceback" not in stderr for _, status, stderr in ours)
