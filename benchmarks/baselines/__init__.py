"""What the benchmarks and the parity tests compare with."""
