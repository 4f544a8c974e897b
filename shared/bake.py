"""`python -m shared.bake NAME [--revision R] --to /models` downloads a model into an image."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shared.errors import StartError
from shared.hub import HubUnreachable, ModelRequest
from shared.volume import download

TOKEN_FILE = Path("/run/secrets/HF_TOKEN")


def main(arguments: Sequence[str] | None = None) -> int:
    """Download a model into a folder of an image. The token is the secret or the variable HF_TOKEN."""
    parser = argparse.ArgumentParser(
        prog="python -m shared.bake", description="download a model into an image"
    )
    parser.add_argument("name", help="its id on the Hugging Face Hub")
    parser.add_argument("--revision", help="branch, tag or commit (main)")
    parser.add_argument("--to", type=Path, default=Path("/models"), help="folder of the models (/models)")
    parser.add_argument("--extra", action="append", default=[], help="glob pattern of additional files")
    options = parser.parse_args(arguments)
    token = TOKEN_FILE.read_text() if TOKEN_FILE.is_file() else os.environ.get("HF_TOKEN", "")
    request = ModelRequest(
        options.name, options.revision or None, token.strip() or None, tuple(options.extra)
    )
    os.environ["BAKED_MODEL_DIR"] = str(options.to)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        os.environ.pop(name, None)  # the base image's cache is empty at a start
    try:
        # What the libraries write to their home does not belong into the layer.
        with tempfile.TemporaryDirectory() as os.environ["HF_HOME"]:
            download(request, [options.to])
    except (StartError, HubUnreachable) as error:
        print(f"bake: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(options.to / ".locks", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
