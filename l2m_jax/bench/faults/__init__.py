"""Faults: what may go wrong during a run, and what must be there after it."""
