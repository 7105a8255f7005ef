"""Least time of a phase on a target: matrix products, memory and connections each at their published speed."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from jaxrlhf.plan import Phase
from jaxrlhf.plan.costs import Rates, least_seconds
from jaxrlhf.plan.hlo import Collective, Figures
from jaxrlhf.plan.targets import Target

# Bytes that a device must send per byte of the whole array, in a group of n devices, as a multiple of (n - 1) / n. Both
# are reached by rings (https://doi.org/10.1016/j.jpdc.2008.09.002, "Bandwidth optimal all-reduce algorithms")
_SENT = {"all-reduce": 2.0}


class Sent(NamedTuple):
    """Bytes that one device sends at least: to devices of its island, and to others over the network."""

    near: float
    far: float


class Least(NamedTuple):
    """Seconds that a phase takes at least."""

    products: float
    near: float
    far: float

    @property
    def total(self) -> float:
        """The three run beside each other at best."""
        return max(self)


def sent(collective: Collective, islands: tuple[int, ...]) -> Sent:
    """Bytes that a device sends in a collective, once. `islands` has the island of each device of the mesh.

    Members of the group in one island share what crosses the network and exchange it among themselves.
    """
    members = Counter(islands[i] for i in collective.group)
    apart = len(members)
    if len(collective.group) == 1:
        return Sent(0, 0)
    if collective.kind in ("collective-permute", "collective-broadcast"):
        return Sent(0, collective.bytes) if apart > 1 else Sent(collective.bytes, 0)
    whole = _SENT.get(collective.kind, 1.0) * collective.bytes
    mates = min(members.values())
    return Sent(whole * (mates - 1) / mates, whole * (apart - 1) / apart / mates)


def traffic(figures: Figures, islands: tuple[int, ...]) -> Sent:
    """Bytes that one device sends in a phase."""
    each = [(c.times, sent(c, islands)) for c in figures.collectives]
    return Sent(sum(times * one.near for times, one in each), sum(times * one.far for times, one in each))


def least(phase: Phase, target: Target) -> Least:
    """Least time of a phase. Without the HLO of its programs, products are shared evenly and nothing is sent."""
    one = target.accelerator
    rates = Rates(defaultdict(lambda: one.flops["float32"], one.flops), one.bandwidth)
    if phase.texts is None:
        return Least(least_seconds(phase.products, rates, phase.devices), 0, 0)
    moved = traffic(phase.figures, phase.islands)
    return Least(least_seconds(phase.figures.products, rates, 1), moved.near / one.link, moved.far / one.network)


def utilisation(phases: Iterable[Phase], seconds: float, devices: int, target: Target) -> float:
    """Model FLOPs utilisation (https://arxiv.org/abs/2204.02311) of phases that take `seconds`: the FLOPs of the traced
    matrix products, recomputation included, over those of the devices at their bfloat16 peak."""
    flops = sum(p.flops * p.times for phase in phases for p in phase.products)
    return flops / (seconds * devices * target.accelerator.flops["bfloat16"]) if seconds else 0.0
