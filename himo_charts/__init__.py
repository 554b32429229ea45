"""The charts of reports and benchmarks as SVG: scales, marks and their style.

A package of its own, of the standard library alone: benchmarks run where torch, triton and numpy
are installed and what `himo` needs is not, and `himo_kernels` computes and draws nothing.
"""
