"""Kernels compiled for GPUs that are not here, and what their machine code shows.

`compile_cases(cases)` compiles each `Case` for its chip, disassembles it and returns a `Compiled` for each, in order.
Triton cannot compile in a process that interprets, as the tests' does, so the work is done in two others; give it all
cases of a family at once.

A case is specialised as the launcher's would be: pointers and strides (arguments named `stride_…`) are multiples of 16
unless `unaligned` names them. Without that, loads turn scalar and every count is wrong.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexgen_triton.kernels.chips import CHIPS

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
CASES = 8  # of a process at least: its start takes as long as two or three of them

NVIDIA_MATRIX = re.compile(r"^(HMMA|HGMMA|QGMMA|UTC\w*MMA)")
AMD_MATRIX = re.compile(r"^v_mfma")
LOCAL_MEMORY = re.compile(r"^(LDL|STL)")  # what ptxas spills registers by


@dataclass(frozen=True)
class Case:
    """One kernel of a module, one configuration, one chip (a name in CHIPS)."""

    label: str
    module: str  # "flexgen_triton.kernels.matmul_q4"
    kernel: str
    chip: str
    signature: Mapping[str, str]  # of the run time arguments: {"x_ptr": "*fp16", "M": "i32"}
    constexprs: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    elements: int = 0  # weights, or K and V elements, that a program handles in one iteration of its inner loop
    unaligned: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.label}-{self.chip}"


@dataclass(frozen=True)
class Compiled:
    """Facts read from machine code. `loop` is the inner loop with the most matrix instructions, then the largest."""

    registers: int  # a thread
    stack: int  # bytes
    spills: int  # instructions that go to local memory (registers that do, on AMD)
    shared: int  # bytes a program
    matrix: bool
    loop: tuple[str, ...]
    loop_matrix: int  # matrix instructions in the loop: a multiple of what is expected shows that it was unrolled
    per_element: float  # the loop's instructions, of one thread, for each element that the thread handles

    @property
    def loop_instructions(self) -> int:
        return len(self.loop)


def compile_cases(cases: Sequence[Case], workers: int = WORKERS) -> list[Compiled]:
    """Compile and disassemble, in at most `workers` processes that share the cases alternately."""
    workers = min(workers, -(-len(cases) // CASES))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    env |= {
        "OMP_NUM_THREADS": "1",
        "TRITON_DISABLE_LINE_INFO": "1",
    }  # which takes as long as the code to write and read
    results: list[Compiled | None] = [None] * len(cases)
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for worker in range(workers):
            given, answer = Path(folder, f"given-{worker}"), Path(folder, f"answer-{worker}")
            given.write_bytes(pickle.dumps(list(cases[worker::workers])))
            command = [sys.executable, "-c", "import ahead_of_time; ahead_of_time.work()", str(given), str(answer)]
            process = subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            running.append((worker, answer, process))
        for worker, answer, process in running:
            _, error = process.communicate()
            if process.returncode:
                raise RuntimeError(f"compiling ahead of time failed:\n{error[-4000:]}")
            results[worker::workers] = pickle.loads(answer.read_bytes())
    return results


def work() -> None:
    """One worker: the cases of the first file named on the command line, their answers to the second."""
    given, answer = map(Path, sys.argv[-2:])
    answer.write_bytes(pickle.dumps([_compile(case) for case in pickle.loads(given.read_bytes())]))


def _compile(case: Case) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip = CHIPS[case.chip]
    fn = getattr(importlib.import_module(case.module), case.kernel)
    place = {name: n for n, name in enumerate(fn.arg_names)}
    assert place.keys() == case.signature.keys() | case.constexprs.keys(), (str(case), fn.arg_names)
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in fn.arg_names}
    aligned = [
        name
        for name, kind in case.signature.items()
        if (kind.startswith("*") or name.startswith("stride_")) and name not in case.unaligned
    ]
    try:
        built = triton.compile(
            ASTSource(
                fn,
                signature=signature,
                constexprs={(place[name],): value for name, value in case.constexprs.items()},
                attrs={(place[name],): [["tt.divisibility", 16]] for name in aligned if name not in case.constexprs},
            ),
            target=GPUTarget(chip.backend, chip.arch, chip.warp_size),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options},
        )
    except Exception as error:
        error.add_note(f"in {case}")
        raise
    shown = _nvidia(built.asm["cubin"]) if chip.backend == "cuda" else _amd(built.asm["amdgcn"])
    registers, stack, spills, instructions, labels = shown
    pattern = NVIDIA_MATRIX if chip.backend == "cuda" else AMD_MATRIX
    matrix = [bool(pattern.match(x)) for x in instructions]
    start, end = _inner_loop(instructions, labels, matrix)
    each = case.elements / (case.num_warps * chip.warp_size)  # elements of one thread
    return Compiled(
        registers,
        stack,
        spills,
        built.metadata.shared,
        any(matrix),
        tuple(instructions[start:end]),
        sum(matrix[start:end]),
        (end - start) / each if each else 0.0,
    )


def _nvidia(cubin: bytes) -> tuple[int, int, int, list[str], dict[str, int]]:
    """Registers, stack, spill instructions, instructions, and labels' places in them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        run = [str(tools / "nvdisasm"), "-c", "-ndf", file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    names = ("REG", "STACK", "LOCAL")  # a kernel may have small functions of its own beside it
    registers, stack, local = (max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in names)
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*\.(L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(found[1])
    return registers, max(stack, local), sum(map(bool, map(LOCAL_MEMORY.match, instructions))), instructions, labels


def _amd(text: str) -> tuple[int, int, int, list[str], dict[str, int]]:
    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\t([vs]_\w+|ds_\w+|buffer_\w+|global_\w+|flat_\w+|scratch_\w+)(.*?)(?:;.*)?$", line):
            instructions.append((found[1] + found[2]).strip())
    spills = figure("vgpr_spill_count") + figure("sgpr_spill_count")
    return figure("vgpr_count"), figure("private_segment_fixed_size"), spills, instructions, labels


def _inner_loop(instructions: list[str], labels: dict[str, int], matrix: list[bool]) -> tuple[int, int]:
    """Start and end: of the loops without another in them, the one with the most matrix instructions, then the largest.

    Loops of a few instructions wait for a barrier or pad the end of the code.
    """
    loops = set()
    for end, text in enumerate(instructions):
        branch = re.match(r"(?:BRA|s_c?branch).*?\.?(L_\w+|\.LBB\w+)", text)
        if branch and labels.get(branch[1], end + 1) < end - 8:
            loops.add((labels[branch[1]], end + 1))
    inner = [x for x in loops if not any(y != x and y[0] >= x[0] and y[1] <= x[1] for y in loops)]
    return max(inner, key=lambda x: (sum(matrix[slice(*x)]), x[1] - x[0]), default=(0, 0))
