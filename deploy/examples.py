"""How an endpoint is called: a curl command and a Python program, to paste."""

from __future__ import annotations

import json
from typing import Any

from deploy.api import Endpoint
from deploy.config import ROOT
from local.examples import native_command, openai_example, openai_routes


def test_input(worker: str) -> Any:
    return json.loads((ROOT / "workers" / worker / "test_input.json").read_text())


def usage(worker: str, endpoint: Endpoint) -> str:
    """The address and the examples; the key is in RUNPOD_API_KEY."""
    folder = ROOT / "workers" / worker
    urls = endpoint.request_urls
    http = endpoint.type == "LOAD_BALANCER"
    url = urls["base"] if http else urls["runSync"].removesuffix("/runsync")
    openai = f"{url}/v1" if http else f"{url}/openai/v1"
    path = (folder / "test_input.json").relative_to(ROOT)
    curl = native_command(url=url, test_input=path)
    curl = curl.replace("'Authorization: Bearer local'", '"Authorization: Bearer $RUNPOD_API_KEY"')
    parts = [f"Address: {url}", curl]
    routes = openai_routes(folder / "handler.py")
    if program := openai_example(routes, url=openai, test_input=path, mode="http" if http else "queue"):
        program = program.replace('api_key="local"', 'api_key=os.environ["RUNPOD_API_KEY"]')
        parts.append(f"import os\n{program}")
    return "\n\n".join(parts)
