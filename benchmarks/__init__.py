"""Microbenchmarks, their baselines and their results."""
