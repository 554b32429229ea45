"""Commands around a run: the installation, the memory of a step, the speed of reading data."""
