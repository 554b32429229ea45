"""The charts of reports and benchmarks as SVG: scales, marks and their style.

A separate package that needs only the standard library: benchmarks run on machines without the
dependencies of `himo`, and `himo_kernels` draws nothing.
"""
