"""Measurements: throughput and memory, ours and the peers'."""
