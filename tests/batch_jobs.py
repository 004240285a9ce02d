"""Jobs of `run-batch` for the tests: an input, an output, and the command between them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from flexgen_triton import demo
from flexgen_triton.commands.run_batch import command

ROOT = Path(__file__).parents[1]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
POLICY = ("--dtype", "float32", "--device", "cpu", "--gpu-batch-size", "16", "--num-gpu-batches", "2")
PROMPTS = demo.prompts()


def line(custom_id: object, url: str = COMPLETIONS, **body: object) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode()


def sampled(count: int) -> list[bytes]:
    """Requests without seeds, of many lengths."""
    return [
        line(
            f"request-{n}", prompt=PROMPTS[n % len(PROMPTS)][: 20 + 7 * (n % 9)], max_tokens=2 + n % 11, temperature=0.8
        )
        for n in range(count)
    ]


class Job:
    """An input, an output, and the command between them."""

    def __init__(self, directory: Path, lines: Sequence[bytes], offload: Path, model: str | Path = "demo") -> None:
        self.source, self.output = directory / "in.jsonl", directory / "out.jsonl"
        self.source.write_bytes(b"\n".join(lines) + b"\n")
        self.args = ["-i", self.source, "-o", self.output, "--model", model, "--offload-dir", offload, *POLICY]

    def run(self, *args: str) -> Result:
        """Run it in this process."""
        return CliRunner().invoke(command, [str(a) for a in (*self.args, *args)])

    def done(self, *args: str) -> dict[str | None, dict[str, Any]]:
        """Run it to its end; its records by custom_id."""
        result = self.run(*args)
        assert result.exit_code == 0, (result.output, result.exception)
        return self.records()

    def refused(self, *args: str) -> str:
        """Run it; it must fail at once, in one sentence, and write nothing."""
        before = self.output.read_bytes() if self.output.exists() else None
        result = self.run(*args)
        assert result.exit_code == 1 and isinstance(result.exception, ValueError), result.output
        assert (self.output.read_bytes() if self.output.exists() else None) == before
        assert "\n" not in str(result.exception)
        return str(result.exception)

    def start(self, limit: int | None = None, *, ready: bool = False) -> subprocess.Popen[str]:
        """Run it in a process of its own, which may write files of `limit` bytes, and may say when it is `ready`."""

        def prepare() -> None:
            for number in (signal.SIGINT, signal.SIGHUP):  # what runs in the background may have them ignored
                signal.signal(number, signal.SIG_DFL)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        code = "from flexgen_triton.commands.command_line import invoke\n"
        code += "from flexgen_triton.commands.run_batch import command\n"
        code += ('print("ready", flush=True); ' if ready else "") + "invoke(command)"
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, self.args)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    def written(self) -> int:
        """Whole lines in the output so far."""
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def records(self) -> dict[str | None, dict[str, Any]]:
        """The output's records by custom_id; of several with the same one, that of the first line."""
        assert self.output.read_bytes().endswith(b"\n")
        found = sorted((json.loads(raw) for raw in self.output.read_bytes().splitlines()), key=lambda r: r["id"])
        assert len({record["id"] for record in found}) == len(found)
        return {record["custom_id"]: record for record in reversed(found)}

    def answers(self) -> dict[str, str]:
        """The output's records, timeless."""
        return timeless(map(json.loads, self.output.read_bytes().splitlines()))


def timeless(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Records by what they answer, but for the time at which they were made and the digest, which is of that too."""
    found = {}
    for record in records:
        if record["response"]:
            assert abs(record["response"]["body"].pop("created") - time.time()) < 3600
        answered, _ = record.pop("id").rsplit("_", 1)
        assert answered not in found
        found[answered] = json.dumps(record)
    return found
