"""The smallest complete operator, to copy to himo_kernels/: y_i = s_i x_i and both gradients."""
