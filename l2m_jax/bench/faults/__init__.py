"""What a run survives: kills, preemptions and other faults, each followed by the same command until it ends."""

from l2m_jax.bench.faults.campaign import run

__all__ = ["run"]
