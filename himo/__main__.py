"""python -m himo."""

from himo.cli import entry

entry()
