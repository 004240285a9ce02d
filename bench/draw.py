"""Draw a stretch of a trace as an SVG: one row per lane, one bar per op, coloured by layer.

python -m flexgen_triton.bench … --trace trace.json && python bench/draw.py trace.json out.svg --start 1.0 --seconds 0.5
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WIDTH, ROW, LEFT = 960, 34, 90
COLOURS = ("#4878a8", "#d1713c", "#5a9a68", "#a0568c", "#b8963e", "#6a7fb0")


def bars(
    trace: dict[str, Any], start: float, seconds: float
) -> tuple[list[str], list[tuple[int, float, float, dict[str, Any]]]]:
    """Lane names from top to bottom, and (row, x, width in seconds, event) of the ops in the stretch."""
    events = [e for e in trace["traceEvents"] if e["ph"] == "X" and (e["args"]["bytes"] or e["name"] == "compute")]
    chosen = [e for e in events if e["ts"] / 1e6 < start + seconds and (e["ts"] + e["dur"]) / 1e6 > start]
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    tids = sorted({e["tid"] for e in chosen})
    found = []
    for e in chosen:
        low = max(e["ts"] / 1e6 - start, 0.0)
        high = min((e["ts"] + e["dur"]) / 1e6 - start, seconds)
        found.append((tids.index(e["tid"]), low, high - low, e))
    return [names[t] for t in tids], found


def svg(trace: dict[str, Any], start: float, seconds: float) -> str:
    lanes, found = bars(trace, start, seconds)
    height = ROW * len(lanes) + 40
    scale = (WIDTH - LEFT - 10) / seconds
    view = f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {view}>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    track = f'width="{WIDTH - LEFT - 10}" height="{ROW - 8}" fill="#f0f0f0"'
    for n, lane in enumerate(lanes):
        lines.append(f'<text x="8" y="{n * ROW + 26}">{lane}</text>')
        lines.append(f'<rect x="{LEFT}" y="{n * ROW + 8}" {track}/>')
    for row, x, width, e in found:
        place = (
            f'x="{LEFT + x * scale:.1f}" y="{row * ROW + 8}" width="{max(width * scale, 0.4):.1f}" height="{ROW - 8}"'
        )
        i, j, k = (e["args"][name] for name in "ijk")
        title = f"<title>{e['name']} i={i} j={j} k={k}, {e['dur'] / 1e3:.1f} ms</title>"
        lines.append(f'<rect {place} fill="{COLOURS[j % len(COLOURS)]}">{title}</rect>')
    lines.append(f'<text x="{LEFT}" y="{height - 10}">{seconds * 1e3:.0f} ms; a colour is a layer</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=float, default=0.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    arguments.out.write_text(svg(json.loads(arguments.trace.read_text()), arguments.start, arguments.seconds))


if __name__ == "__main__":
    main()
