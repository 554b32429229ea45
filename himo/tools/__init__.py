"""Commands around a run: what is installed, what fits a GPU, how fast the data are read."""
