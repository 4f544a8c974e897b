"""`python -m deploy size <worker>`: which GPUs hold a model, how many sequences fit, and what they cost."""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict
from typing import Any

from deploy.api import Api, Gpu
from deploy.config import ROOT, ConfigError
from deploy.kv_cache import UnknownArchitecture
from deploy.model_files import Model, read_model
from deploy.sizing import GB, TOKENS, UNITS, Fit, Need, fits, need
from tools.workers import load_module, worker_names


def toml(worker: str, model: Model, found: list[Fit], context: int | None) -> str:
    """The lines for deploy.toml: at most three pools, with the GPU count of the cheapest."""
    count = found[0].gpus
    pools = [fit.pool for fit in found if fit.gpus == count][:3]
    disk = 10 + math.ceil(1.1 * sum(model.weights.values()) / GB)
    lines = [f"pools = {json.dumps(pools)}", f"gpu_count = {count}", f"disk_gb = {disk}", "", "[env]"]
    lines.append(f"MODEL_NAME = {json.dumps(model.name)}")
    if context:
        variable = "MAX_TOTAL_TOKENS" if worker == "tgi" else "MAX_MODEL_LEN"
        lines.append(f'{variable} = "{context}"')
    return "\n".join(lines)


def catalogue() -> tuple[list[Gpu], str]:
    """RunPod's GPUs, from its catalogue with a RUNPOD_API_KEY, else gpu-prices.json; and which of them."""
    if key := os.environ.get("RUNPOD_API_KEY", "").strip():
        return Api(key).gpus(), "RunPod's catalogue, now"
    table = json.loads((ROOT / "deploy" / "gpu-prices.json").read_text())
    return [Gpu.model_validate(gpu) for gpu in table["gpus"]], f"{table['source']}, {table['date']}"


def main(argv: list[str]) -> int:
    """Print what fits. Exit status: 0; 1 when no pool holds the model, or its architecture is not known.

    Raises ConfigError, ApiError.
    """
    parser = argparse.ArgumentParser(prog="python -m deploy size", description=__doc__)
    parser.add_argument("worker", choices=worker_names())
    parser.add_argument("--model", default=os.environ.get("MODEL_NAME"), help="id on the hub, or a folder")
    parser.add_argument("--revision", default=os.environ.get("MODEL_REVISION") or None)
    parser.add_argument(
        "--context", type=_count, help="tokens of a sequence; default: the model's own length"
    )
    parser.add_argument("--concurrency", type=_count, default=1, help="sequences that must fit (1)")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument(
        "--throughput", type=float, help="of one worker, a second: tokens, texts, pictures, or s of audio"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    worker = options.worker
    model = read_model(_model_name(worker, options.model), options.revision)
    context = options.context if worker in TOKENS else None
    try:
        needs, notes = need(worker, model, context, 1 if options.kv_cache_dtype == "fp8" else 2)
    except UnknownArchitecture as error:
        raise ConfigError(f"{model.name}: {error}") from None
    gpus, source = catalogue()
    found = fits(worker, needs, gpus, concurrency=options.concurrency, throughput=options.throughput)
    lines = toml(worker, model, found, context) if found else ""
    if options.json:
        print(json.dumps(_result(model, needs, found, notes, source, lines)))
    else:
        _print(worker, model, needs, found, notes, source, lines, options)
    return 0 if found else 1


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _model_name(worker: str, given: str | None) -> str:
    """Raises ConfigError where the worker has no default."""
    name = given or load_module(worker, "schemas").Settings.model_fields["model_name"].default
    if not isinstance(name, str):
        raise ConfigError(f"MODEL_NAME is not set, and {worker} has no default for it.")
    return f"sentence-transformers/{name}" if worker == "sentence-transformers" and "/" not in name else name


def _result(
    model: Model, needs: Need, found: list[Fit], notes: list[str], source: str, lines: str
) -> dict[str, Any]:
    cache = needs.cache
    return {
        "model": model.name,
        "weights": model.weights,
        "weights_loaded": needs.weights,
        "activations": needs.activations,
        "context": needs.context,
        "kv_cache_per_token": cache.per_token(needs.kv_bytes) if cache else None,
        "kv_cache_per_sequence": cache.per_sequence(needs.context, needs.kv_bytes) if cache else None,
        "fits": [asdict(fit) for fit in found],
        "notes": notes,
        "prices": source,
        "deploy.toml": lines,
    }


def _print(
    worker: str,
    model: Model,
    needs: Need,
    found: list[Fit],
    notes: list[str],
    source: str,
    lines: str,
    options: argparse.Namespace,
) -> None:
    stored = ", ".join(f"{dtype} {size:,}" for dtype, size in model.weights.items())
    print(f"{model.name}\n  weights       {stored} bytes; {needs.weights / GB:.2f} GB loaded")
    if needs.cache:
        per_token = needs.cache.per_token(needs.kv_bytes)
        per_sequence = needs.cache.per_sequence(needs.context, needs.kv_bytes)
        length = f"{per_sequence / GB:.2f} GB at {needs.context} tokens"
        print(f"  KV cache      {per_token:,} bytes a token; {length}")
    print(f"  activations   {needs.activations / GB:.2f} GB\n" + "".join(f"  {note}\n" for note in notes))
    unit = UNITS.get(worker, "M tokens" if worker in TOKENS else "M texts")
    if not found:
        print(f"No pool holds it with {options.concurrency} sequences. Try a shorter --context.")
        return
    print(f"  {'pool':14} {'GPUs':>4} {'GB':>4} {'sequences':>10} {'$/hour':>8} {'$/' + unit:>14}")
    for fit in found:
        cells = (_cell(fit.sequences, "d"), _cell(fit.per_hour, ".2f"), _cell(fit.per_unit, ".3g"))
        print(f"  {fit.pool:14} {fit.gpus:>4} {fit.memory_gb:>4} {cells[0]:>10} {cells[1]:>8} {cells[2]:>14}")
    print(f"\nPrices: {source}.")
    if not options.throughput:
        print(f"For dollars per {unit} give --throughput: benchmarks/results has figures of CPUs only.")
    print(f"\nFor deploy.toml:\n\n{lines}")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
