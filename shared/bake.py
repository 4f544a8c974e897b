"""`python -m shared.bake NAME [--revision R] --to /models` downloads a model into an image."""

from __future__ import annotations

import sys

from shared.volume import main

if __name__ == "__main__":
    sys.exit(main(["bake", *sys.argv[1:]]))
