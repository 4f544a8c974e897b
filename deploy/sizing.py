"""What a model needs of a GPU, and which of RunPod's pools hold it.

Weights come from the files' headers, the KV cache from config.json. What else a process takes is an estimate.
Memory counts as 10^9 bytes a GB: a GPU has a little more than its name says, and its driver takes some of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.api import Gpu
from deploy.kv_cache import KVCache, UnknownArchitecture, kv_cache, text_config
from deploy.model_files import Model
from deploy.prices import Prices

GB = 10**9
TOKENS = ("vllm", "tgi", "huggingface", "llava")
# Share of the GPU that vLLM takes (gpu_memory_utilization); TGI's is near it.
_ENGINE_SHARE = 0.92
# Share of what is free after loading that huggingface and llava give the KV cache (GPU_MEMORY_UTILIZATION).
_CACHE_SHARE = 0.7
# Peak of activations in vLLM 0.19 on an H100, and its memory outside torch on one GPU and on several: highest
# figures by kind in llm-d-planner 0.3.3, vllm_memory_constants.json.
_ACTIVATIONS = {"gemma": 4.23 * GB, "experts": 2.88 * GB, "other": 2.42 * GB}
_OUTSIDE, _OUTSIDE_PARALLEL = 0.29 * GB, 2.26 * GB
# CUDA's context and the libraries' kernels in one process.
_CONTEXT = 0.6 * GB
# Peak of an encoder's forward pass, in numbers for each token and hidden dimension: 19 to 22 measured with
# all-MiniLM-L6-v2 and multilingual-e5-small, 18 with Whisper base's encoder (CPU, float32, 4000 to 16000
# tokens).
_PEAK = 22
_EMBEDDING_TOKENS, _WHISPER_WINDOWS, _WHISPER_POSITIONS = 16_384, 32, 1500
# Florence-2's and XTTS' activations are not measured.
_NOT_MEASURED = 4 * GB
UNITS = {"florence2": "M pictures", "whisper": "audio hour", "xtts": "audio hour"}


@dataclass(frozen=True)
class Fit:
    """One way to run a model. gpus: of one worker. sequences: that fit beside each other, None where they are
    not counted. per_hour, per_unit: dollars, None where the price or the throughput is not known.
    """

    pool: str
    gpus: int
    memory_gb: int
    sequences: int | None
    per_hour: float | None
    per_unit: float | None


@dataclass(frozen=True)
class Need:
    """What a worker needs of one GPU, beside its share of the weights. activations: bytes, an estimate.

    cache: None where there is no KV cache that grows with the sequences, or where it is not known.
    """

    weights: int
    activations: int
    cache: KVCache | None
    context: int
    kv_bytes: int = 2

    def sequences(self, worker: str, memory: int, gpus: int) -> int | None:
        """How many fit into `gpus` of `memory` bytes; 0 when the model does not; None without a cache."""
        fixed = self.weights / gpus + self.activations
        if worker in ("vllm", "tgi"):
            fixed += _OUTSIDE if gpus == 1 else _OUTSIDE_PARALLEL
            free = _ENGINE_SHARE * memory - fixed
        else:
            free = memory - fixed - _CONTEXT
        if free <= 0:
            return 0
        if self.cache is None:
            return None
        if not self.cache.divides(gpus):
            return 0
        share = 1 if worker in ("vllm", "tgi") else _CACHE_SHARE
        return int(share * free / self.cache.per_sequence(self.context, self.kv_bytes, gpus))


def need(worker: str, model: Model, context: int | None = None, kv_bytes: int = 2) -> tuple[Need, list[str]]:
    """What `worker` needs for `model`, and sentences about what is an estimate or not known.

    context: tokens of a sequence; default: the model's own. Raises UnknownArchitecture.
    """
    weights, notes = model.loaded(), []
    if "unknown" in model.weights:
        notes.append("Its weights are not safetensors: they count as stored.")
    if worker in ("florence2", "xtts"):
        notes.append(f"Activations of {worker} are not measured: {_NOT_MEASURED // GB} GB are kept for them.")
        return Need(weights, _NOT_MEASURED, None, 0), notes
    text = text_config(model.config)
    if worker in TOKENS:
        longest = getattr(text, "max_position_embeddings", 0) or 0
        context = context or longest
        if longest and context > longest:
            notes.append(f"{context} tokens are more than the model's own {longest}.")
        try:
            cache = kv_cache(model.config)
        except UnknownArchitecture as error:
            notes.append(f"The KV cache is not computed: {error} Sequences are not counted.")
            cache = None
        if cache and not context:
            raise UnknownArchitecture("config.json does not name a context length: give --context.")
        kind = "gemma" if text.model_type.startswith("gemma") else "other"
        experts = any(
            getattr(text, name, 0) for name in ("num_experts", "num_local_experts", "n_routed_experts")
        )
        activations = _ACTIVATIONS["experts" if experts else kind]
        notes.append(f"Activations, {activations / GB:.1f} GB, are an estimate.")
        return Need(weights, int(activations), cache, context, kv_bytes), notes
    hidden = text.hidden_size
    if worker == "whisper":
        windows = _WHISPER_WINDOWS * _WHISPER_POSITIONS
        # Keys and values of the audio and of the text, 448 tokens, in every layer of the decoder.
        kept = 2 * model.config["decoder_layers"] * hidden * 2 * _WHISPER_WINDOWS * (_WHISPER_POSITIONS + 448)
        notes.append(f"Activations are an estimate, for a batch of {_WHISPER_WINDOWS} windows of 30 s.")
        return Need(weights, windows * hidden * 2 * _PEAK + kept, None, 0), notes
    notes.append(f"Activations are an estimate, for a batch of {_EMBEDDING_TOKENS} tokens.")
    return Need(weights, _EMBEDDING_TOKENS * hidden * 2 * _PEAK, None, 0), notes


def fits(
    worker: str, need: Need, gpus: list[Gpu], *, concurrency: int = 1, throughput: float | None = None
) -> list[Fit]:
    """Each pool that holds the model and `concurrency` sequences, with the fewest GPUs; the cheapest first.

    throughput: units a second of one worker: tokens, texts, pictures, or seconds of audio.
    """
    prices = Prices(gpus).by_pool
    memory = {gpu.pool: min(g.memory for g in gpus if g.pool == gpu.pool) for gpu in gpus if gpu.pool}
    counts = (1, 2, 4, 8) if worker in ("vllm", "tgi") else (1,)
    found = []
    for pool, size in memory.items():
        for count in counts:
            sequences = need.sequences(worker, size * GB, count)
            if sequences is None or sequences >= concurrency:
                hourly = prices[pool] * count if pool in prices else None
                per_unit = None
                if hourly is not None and throughput:
                    per_unit = (
                        hourly / throughput * (1 if UNITS.get(worker) == "audio hour" else 10**6 / 3600)
                    )
                found.append(Fit(pool, count, size, sequences, hourly, per_unit))
                break
    return sorted(found, key=lambda fit: (fit.per_hour is None, fit.per_hour, fit.gpus))
