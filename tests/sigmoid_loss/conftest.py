"""The tests of this folder use the targets and comparisons of the InfoNCE tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "info_nce"))
