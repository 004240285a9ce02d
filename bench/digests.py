"""Every decision of the planner as a digest: what a change of the code may not change unless it says so.

    python bench/digests.py --out FILE.json           # now
    python bench/digests.py --against FILE.json       # exit code 1 and a row for each difference

Forty policies on three models, the smallest also in place: placements, the list of ops, the peak bytes of each tier,
and the seconds that the simulator predicts with a T4's rates. Names of lanes, ops and rings take no part, so that they
may be changed: an op is known by its position and by the memory it touches. `bench/results/digests.json` is the state
of the commit that it names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rows import ROOT, commit

sys.path.insert(0, str(ROOT))

from flexgen_triton.models.family import SIZES, model_spec
from flexgen_triton.plan.cost import seconds
from flexgen_triton.plan.hardware import Hardware, load_profile
from flexgen_triton.plan.placement import Tier
from flexgen_triton.plan.plan import Plan, make_plan
from flexgen_triton.plan.policy import CompressionConfig, Policy
from flexgen_triton.plan.predict import predict
from flexgen_triton.plan.schedule import Op
from flexgen_triton.plan.spec import Batch, Workload, stored_as

MODELS = ("opt-125m", "opt-30b", "opt-175b")
TOLERANCE = 0.02  # by which a prediction may differ
PLACES = {
    "all-gpu": (100, 0, 100, 0, 100, 0),
    "mixed": (20, 50, 30, 40, 30, 40),
    "host": (0, 100, 0, 100, 0, 100),
    "disk": (0, 0, 0, 0, 0, 0),
    "paper": (20, 80, 0, 100, 0, 100),
    "cache-on-disk": (50, 25, 0, 30, 50, 0),
}
GROUPS_OF_32 = CompressionConfig(group_size=32)
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "4-bit": {"compress_weight": True},
    "4-bit-cache": {"compress_cache": True},
    "host-attention": {"cpu_cache_compute": True},
    "half-attended": {"cpu_cache_compute": True, "cpu_attention_percent": 50, "keep_open_pages": True},
    "sparse": {"attn_sparsity": 0.1},
}
MORE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "joined": ("mixed", {"sep_layer": False}),
    "joined, attended": ("mixed", {"sep_layer": False, "cpu_cache_compute": True}),
    "pageable": ("mixed", {"pin_weight": False}),
    "serial": ("mixed", {"overlap": False}),
}


def policies() -> Iterator[tuple[str, Policy]]:
    """Forty policies: six placements with six changes each, and four more."""
    for (place, percent), (change, fields) in product(PLACES.items(), CHANGES.items()):
        yield f"{place} {change}".strip(), Policy(3, 2, *percent, **fields)
    for name, (place, fields) in MORE.items():
        yield name, Policy(3, 2, *PLACES[place], comp_weight_config=GROUPS_OF_32, compress_weight=True, **fields)


def workload(policy: Policy) -> Workload:
    """Prompts of unequal lengths, for as many sequences as the policy takes; one asks for fewer tokens."""
    lens = [200 - 37 * n for n in range(policy.gpu_batch_size)]
    batches = [Batch(tuple(lens), 6 - k) for k in range(policy.num_gpu_batches)]
    return Workload(tuple(batches))


class Numbers:
    """Gives every name the number of its first appearance."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def __call__(self, name: object) -> int:
        return self._known.setdefault(name, len(self._known))


def op_rows(ops: Iterable[Op], hardware: Hardware) -> Iterator[tuple[object, ...]]:
    """Yield all that each op's execution depends on, without names."""
    lane, ring, slot = Numbers(), Numbers(), Numbers()
    for op in ops:
        groups = (op.reads, op.writes, op.overwrites)
        slots = ([(ring(s.ring), slot((s.ring, s.number)), s.at, s.nbytes) for s in group] for group in groups)
        where = (lane(op.lane), op.i, op.k, op.part)
        yield (*where, *slots, op.bytes, op.pageable, f"{seconds(op, hardware):.9g}")


def digest(rows: Iterable[object]) -> str:
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(repr(row).encode())
    return hashed.hexdigest()[:16]


def placed(plan: Plan) -> Iterator[object]:
    for layer in (*plan.placements, plan.tables):
        for share in (layer.gpu, layer.host, layer.disk):
            yield [(r.file, r.offset, r.nbytes, r.at) for r in share.runs]
            yield [(s.tensor, s.row, s.rows, s.row_bytes, s.at) for s in share.segments]


def decisions(plan: Plan, hardware: Hardware) -> dict[str, object]:
    return {
        "placements": digest(placed(plan)),
        "ops": digest(op_rows(plan.generator, hardware)),
        "gpu_bytes": plan.footprint.total(Tier.GPU),
        "host_bytes": plan.footprint.total(Tier.HOST),
        "disk_bytes": plan.footprint.scratch_bytes,
        "predicted_s": predict(plan, hardware).total_s,
    }


def cases() -> Iterator[tuple[str, Plan, Hardware]]:
    """Every policy on every model, on a GPU; on the smallest model in place too."""
    apart = load_profile("t4")
    together = replace(apart, host_is_apart=False)
    for model, (name, policy) in product(MODELS, policies()):
        spec = stored_as(model_spec(SIZES[model], model, "float16"), policy)
        for hardware in (apart, together) if model == MODELS[0] else (apart,):
            plan = make_plan(spec, policy, workload(policy), host_is_apart=hardware.host_is_apart)
            yield f"{model}, {name}{'' if hardware.host_is_apart else ', in place'}", plan, hardware


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A line for every decision that is another one."""
    for case in sorted(set(old) ^ set(new)):
        yield f"{case}: only {'before' if case in old else 'now'}"
    for case in sorted(set(old) & set(new)):
        for key, value in old[case].items():
            now = new[case][key]
            close = key == "predicted_s" and abs(now / value - 1) <= TOLERANCE
            if now != value and not close:
                yield f"{case}: {key} {value} -> {now}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    found = {name: decisions(plan, hardware) for name, plan, hardware in cases()}
    print(f"{len(found)} plans")
    if args.out:
        args.out.write_text(json.dumps({"commit": commit(), "plans": found}, indent=1) + "\n")
    if not args.against:
        return 0
    different = list(differences(json.loads(args.against.read_text())["plans"], found))
    print("\n".join(different) or "all equal")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
