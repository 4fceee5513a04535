"""Instruction rows, their tokens on disk, and packed batches."""
