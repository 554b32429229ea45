"""python -m himo."""

import sys

from himo.cli import main

sys.exit(main())
