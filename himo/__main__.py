"""python -m himo."""

import os
import sys

from himo.cli import main

status = main()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    from himo.parallel import end_process

    end_process(status)
sys.exit(status)
