"""What the benchmarks share; also used by tests/gpu."""
