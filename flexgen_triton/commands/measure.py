"""`python -m flexgen_triton measure`: what this machine can do, measured or corrected, kept for planning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..plan.hardware import GIB, Curve, Hardware, HardwareError
from .console import console, print_table
from .options import DEVICE, OFFLOAD_DIR, Command
from .progress import Display

if TYPE_CHECKING:
    import torch

    from ..memory.stripes import Folders

KIB, MIB = 1 << 10, 1 << 20


@click.command(
    "measure",
    cls=Command,
    imports=("flexgen_triton.arguments", "flexgen_triton.machine.measure"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@OFFLOAD_DIR
@click.option(
    "--output", "profile_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the profile here."
)
@click.option(
    "--refine",
    "run_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Correct the profile there is by a run's `bench --json` instead of measuring.",
)
@click.option("--quick", is_flag=True, help="In seconds, coarsely.")
@DEVICE
def command(
    offload_dir: Sequence[Path], profile_file: Path | None, run_file: Path | None, quick: bool, device: str | None
) -> None:
    """Measure what this machine can do, and keep it for planning."""
    from ..arguments import as_device, as_folders
    from ..machine.measure import measure, profile_path, save_profile
    from ..memory import drives

    chosen, folders = as_device(device), as_folders(offload_dir)
    if run_file:
        found = refined(folders, chosen, run_file)
    else:
        with Display() as bars:
            found = measure(chosen, folders, quick=quick, progress=bars.phase)
    path = profile_file or profile_path(folders, chosen)
    save_profile(found, path)
    printed = console()
    print_hardware(printed, found)
    printed.print(f"profile: {path}", soft_wrap=True, markup=False)
    for folder in folders.paths:
        if told := drives.concern(folder, drives.storage(folder), is_direct=drives.takes_direct(folder)):
            click.echo(f"warning: {told}", err=True)


def refined(folders: Folders, device: torch.device, run_file: Path) -> Hardware:
    """The machine's profile, corrected by a run's figures; raises HardwareError where there is none yet."""
    from ..machine.measure import cached_profile, read_run, refine

    found = cached_profile(folders, device)
    if found is None:
        raise HardwareError(f"{folders.first} holds no profile of this machine to correct; measure it first")
    return refine(found, read_run(run_file))


def print_hardware(console: Console, hardware: Hardware) -> None:
    """A row per curve: the rate at each size."""
    console.print(f"[bold]{escape(hardware.name)}[/] ({escape(hardware.source)})")
    table = Table("", "", "by size", show_header=False)
    for name, unit, text in _rows(hardware):
        table.add_row(name, unit, text)
    print_table(console, table)


def _rows(h: Hardware) -> Iterator[tuple[str, str, str]]:
    """Rows of a machine's table: name, unit, rates."""
    sizes = {"GPU": h.gpu_bytes, "host": h.host_bytes, "disk": h.disk_bytes}
    yield "capacity", "GiB", _numbers({name: nbytes / GIB for name, nbytes in sizes.items() if nbytes})
    for kind, curve in h.matmul.items():
        yield f"product, {kind}", "GFLOP/s by rows", _rates(curve)
    yield "prompts' attention", "GFLOP/s by tokens", _rates(h.prefill_attention)
    for kind, curve in h.decode_attention.items():
        yield f"attention, {kind}", "GB/s of K and V", _rates(curve, in_bytes=True)
    if h.host_is_apart:
        for kind, curve in h.host_attention.items():
            yield f"the host's attention, {kind}", "GB/s of K and V", _rates(curve, in_bytes=True)
    yield "norms and the like", "GB/s", _rates(h.elementwise, in_bytes=True)
    yield "memory read", "GB/s", _numbers({"device": h.device_read / 1e9, "host": h.host_read / 1e9})
    links = {"h2d": h.h2d, "d2h": h.d2h, "h2d, pageable": h.h2d_pageable, "d2h, pageable": h.d2h_pageable}
    for name, curve in (links if h.host_is_apart else {"copies": h.h2d}).items():
        yield name, "GB/s", _rates(curve, in_bytes=True)
    yield "disk read", "GB/s", _rates(h.disk_read, in_bytes=True)
    yield "disk write", "GB/s", _rates(h.disk_write, in_bytes=True)
    for extent in dict.fromkeys(row[0] for row in h.disk_table):
        rates = {f"{threads:g}": rate / 1e9 for nbytes, threads, rate in h.disk_table if nbytes == extent}
        yield f"disk read by {_size(extent)}", "GB/s by threads", _numbers(rates)
    yield "disk rows", "thousand/s", f"{h.disk_rows / 1e3:.3g}"
    yield "overhead of an op", "µs", _numbers({lane: s * 1e6 for lane, s in h.overhead.items()})
    if h.correction:
        yield "correction", "measured / predicted", _numbers(h.correction)


def _rates(curve: Curve, *, in_bytes: bool = False) -> str:
    return _numbers({_size(size) if in_bytes else f"{size:g}": rate / 1e9 for size, rate in curve.points})


def _numbers(found: Mapping[str, float]) -> str:
    """ "1: 2.57  8: 20.3" """
    return "  ".join(f"{name}: {value:.3g}" for name, value in found.items())


def _size(nbytes: float) -> str:
    return f"{nbytes / MIB:.3g}M" if nbytes >= MIB else f"{nbytes / KIB:.3g}K"
