"""The plan: every placement, buffer size and transfer of one round, decided before allocating anything.

Made from the model, the workload, the policy and where the weights lie on disk. Needs neither a GPU nor torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from .footprint import Footprint, footprint
from .generator import Generator
from .policy import Policy, PolicyError
from .schedule import Program, Work
from .spec import ATTEND, ModelSpec, Workload
from .traffic import Extents, Traffic
from .work import Arithmetic


class Plan(Traffic):
    """A round's traffic, the memory that it needs and the program that the schedule is made of. See `make_plan`."""

    @cached_property
    def footprint(self) -> Footprint:
        """Bytes of every tier, by what they are for."""
        return footprint(self)

    @cached_property
    def work(self) -> Callable[..., Work]:
        """The arithmetic of a computation: (i, j, k, stages, kind) -> Work."""
        return Arithmetic(self).work

    @cached_property
    def program(self) -> Program:
        return Program(
            weights=tuple(self.weight_traffic(n) for n in range(len(self.bundles))),
            bundles=tuple(stage.bundle for stage in self.stages),
            attends=tuple(stage.spec.kind == ATTEND for stage in self.stages),
            batch_steps=tuple(b.new_tokens for b in self.workload.batches),
            cache=self.cache_traffic,
            hidden=self.hidden_traffic,
            work=self.work,
            handoff=self.handoff,
            host_attends=self.host_attends,
            device_attends=self.device_attends,
            rings=self.footprint.rings,
            host_is_apart=self.host_is_apart,
            keeps_open=self.keeps_open,
            serial=not self.policy.overlap,
            pinned=self.policy.pin_weight,
        )

    @property
    def generator(self) -> Generator:
        return Generator(self.program)


def make_plan(
    model: ModelSpec,
    policy: Policy,
    workload: Workload,
    *,
    extents: Extents | None = None,
    align: int = 4096,
    host_is_apart: bool = True,
) -> Plan:
    """Plan one round; without `extents` the weights are planned as a store of our own would hold them.

    `host_is_apart` says that host memory must be copied to the device, as on a GPU. Raises PolicyError when a prompt
    and its new tokens exceed the model's positions.
    """
    for batch in workload.batches:
        longest, asked = max(zip(batch.prompt_lens, batch.new_tokens_each, strict=True), key=sum)
        if longest + asked > model.max_positions:
            raise PolicyError(
                f"a prompt of {longest} tokens and {asked} new ones need {longest + asked} positions, "
                f"{model.name} has {model.max_positions}; "
                f"at most {max(model.max_positions - longest, 0)} new tokens fit"
            )
    return Plan(
        model=model, policy=policy, workload=workload, extents=extents, align=align, host_is_apart=host_is_apart
    )
