"""The version, apart from everything else so that a build reads it without importing torch."""

__version__ = "0.1.0.dev0"
