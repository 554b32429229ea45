"""The smallest whole operator, to copy to himo_kernels/: y_i = s_i x_i, with both gradients."""
