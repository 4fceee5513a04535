"""How long programs take at best: the roofline of the target, never what a kernel really reaches."""

from l2m_jax.plan.hlo import Collective
from l2m_jax.plan.programs import Program
from l2m_jax.plan.targets import Target

BASIS = (
    "roofline: the largest of matrix products at the card's peak, memory traffic at its bandwidth and kernel starts, "
    "plus collectives at the link's bandwidth; no kernel reaches its roof, and no card has been timed against it"
)


def wire_bytes(collective: Collective, devices: int) -> float:
    """Bytes that a device sends for one collective on a ring."""
    share = (devices - 1) / devices
    return collective.bytes * share * (2 if collective.kind == "all-reduce" else 1)


def collective_seconds(program: Program, target: Target, devices: int) -> float:
    return sum(c.count * wire_bytes(c, devices) for c in program.module.collectives) / target.link


def seconds(program: Program, target: Target, devices: int) -> float:
    """One run of the program."""
    module = program.module
    roofs = (program.flops / target.peak, module.traffic / target.bandwidth, module.kernels * target.launch)
    return max(roofs) + collective_seconds(program, target, devices)
