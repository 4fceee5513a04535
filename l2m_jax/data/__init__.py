"""Rows of instructions, their tokens on disk, and the packed batches made of them."""
