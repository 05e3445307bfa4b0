"""Benchmarks: CoIN and its small sister CoIN-mini."""
