"""`make run-<worker>` and `make serve-<worker>`: `python -m local`, with a model that is at hand.

That model is the one of tools/models.py, which needs no hub, account or GPU; MODEL_NAME in the environment
takes another.
"""

from __future__ import annotations

import os
import sys

from local.__main__ import main
from tools.models import local_env

if __name__ == "__main__":
    if not os.environ.get("MODEL_NAME"):
        os.environ.update(local_env(sys.argv[2]))
    sys.exit(main(sys.argv[1:]))
