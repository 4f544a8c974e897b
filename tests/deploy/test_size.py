"""`python -m deploy size`: weights to the byte, KV caches by hand and by vLLM's own count, pools, prices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.__main__ import main
from deploy.api import Gpu
from deploy.config import ROOT
from deploy.kv_cache import KVCache, UnknownArchitecture, kv_cache
from deploy.model_files import Model, read_model
from deploy.sizing import fits, need
from tests.deploy.stand_in import KEY, Account
from tests.hub import Hub
from tools.models import minilm

# 22,713,216 float32 parameters and 512 positions, int64.
MINILM = {"F32": 90_852_864, "I64": 4096}


def config(
    model_type: str, layers: int, hidden: int, heads: int, kv_heads: int | None = None, **more: Any
) -> Any:
    names = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    kv = {"num_key_value_heads": kv_heads} if kv_heads else {}
    return {"model_type": model_type, **names, **kv, **more}


LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
LLAMA_2 = config("llama", 32, 4096, 32, 32)
QWEN_7B = (28, 3584, 28, 4)


@pytest.mark.parametrize(
    ("name", "model", "per_token"),
    [  # bytes of a token at 2 bytes a number: 2 x layers x KV heads x head size x 2
        ("Llama 2 7B", LLAMA_2, 524_288),
        ("Llama 3 8B", config("llama", 32, 4096, 32, 8), 131_072),
        ("Mistral 7B v0.1", config("mistral", 32, 4096, 32, 8, sliding_window=4096), 131_072),
        ("Mixtral 8x7B", config("mixtral", 32, 4096, 32, 8), 131_072),
        ("Qwen2.5 7B", config("qwen2", *QWEN_7B), 57_344),
        ("Qwen3 8B", config("qwen3", 36, 4096, 32, 8, head_dim=128), 147_456),
        ("Qwen3 30B-A3B", config("qwen3_moe", 48, 2048, 32, 4, head_dim=128), 98_304),
        ("Gemma 7B", config("gemma", 28, 3072, 16, 16, head_dim=256), 458_752),
        ("Gemma 2 9B", config("gemma2", 42, 3584, 16, 8, head_dim=256), 344_064),
        (
            "Gemma 3 27B",
            {"model_type": "gemma3", "text_config": config("gemma3_text", 62, 5376, 32, 16, head_dim=128)},
            507_904,
        ),
        ("Phi 3 mini", config("phi3", 32, 3072, 32, 32, pad_token_id=0), 393_216),
        ("gpt-oss 20B", config("gpt_oss", 24, 2880, 64, 8, head_dim=64), 49_152),
        ("GPT-2", {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12}, 36_864),
        ("OPT 125M", config("opt", 12, 768, 12), 36_864),
        ("BLOOM 560M", {"model_type": "bloom", "n_layer": 24, "hidden_size": 1024, "n_head": 16}, 98_304),
        ("GPT-NeoX 20B", config("gpt_neox", 44, 6144, 64), 1_081_344),
        ("StarCoder2 3B", config("starcoder2", 30, 3072, 24, 2), 30_720),
        ("GLM-4 9B", config("glm", 40, 4096, 32, 2, head_dim=128), 40_960),
        ("LLaVA 1.5 7B", {"model_type": "llava", "text_config": LLAMA_2}, 524_288),
        (
            "Qwen2.5-VL 7B",
            {"model_type": "qwen2_5_vl", "text_config": config("qwen2_5_vl_text", *QWEN_7B)},
            57_344,
        ),
        # layers x (kv_lora_rank + qk_rope_head_dim) x 2
        ("DeepSeek-V2-Lite", config("deepseek_v2", 27, 2048, 16, 16, **LATENT), 31_104),
        ("DeepSeek-V3", config("deepseek_v3", 61, 7168, 128, 128, **LATENT), 70_272),
    ],
)
def test_kv_cache_of_a_token(name: str, model: dict[str, Any], per_token: int) -> None:
    assert kv_cache(model).per_token() == per_token


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({}, "model_type None is not one"),
        ({"model_type": "kimi_k9"}, "model_type kimi_k9 is not one"),
        (config("bert", 12, 768, 12), "type bert keeps"),
        ({"model_type": "mamba2"}, "type mamba2 keeps"),
        (config("jamba", 32, 4096, 32, 8), "type jamba keeps"),
        (config("qwen3_next", 48, 2048, 16, 2), "type qwen3_next keeps"),
        ({"model_type": "whisper"}, "type whisper keeps"),
        (config("deepseek_v3", 61, 7168, 128, 128, index_topk=2048), "index_topk of deepseek_v3"),
    ],
)
def test_what_is_not_known_is_not_guessed(model: dict[str, Any], why: str) -> None:
    with pytest.raises(UnknownArchitecture, match=why):
        kv_cache(model)


@pytest.mark.parametrize(
    ("model", "tokens", "in_flight", "concurrency"),
    [  # float32 in 1 GiB, blocks of 128: what vLLM 0.32 for CPUs logs as maximum concurrency of such a model
        (config("llama", 2, 64, 4, 2, head_dim=16), 512, 8192, "4096.00"),  # the project's tiny model
        (config("llama", 30, 576, 9, 3), 512, 8192, "45.50"),  # SmolLM2-135M
        (
            config(
                *("gemma3_text", 14, 64, 4, 2),
                head_dim=32,
                sliding_window=512,
                layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2 + ["sliding_attention"] * 2,
            ),
            4096,
            512,
            "95.26",
        ),
        (config("mistral", 4, 64, 4, 2, head_dim=32, sliding_window=512), 4096, 512, "455.11"),
    ],
)
def test_vllm_counts_the_same_sequences(
    model: dict[str, Any], tokens: int, in_flight: int, concurrency: str
) -> None:
    """vLLM rounds the memory down to whole blocks of all layers: at SmolLM2's, 0.03 % of it."""
    cache = kv_cache(model)
    sequence = cache.per_sequence(tokens, 4, in_flight=in_flight, block=128)
    blocks = 2**30 // (cache.per_token(4) * 128) if not cache.windowed else 0
    counted = blocks * 128 / tokens if blocks else 2**30 / sequence
    assert f"{counted:.2f}" == concurrency


def test_vllm_counts_the_same_tokens_of_a_latent_cache() -> None:
    """9709 blocks of 16 in 1 GiB, float32, three layers."""
    cache = kv_cache(config("deepseek_v2", 3, 64, 4, 4, **LATENT))
    assert 2**30 // (cache.per_token(4) * 16) == 9709


def test_weights_are_those_of_the_file_to_the_byte() -> None:
    folder = minilm()
    model = read_model(str(folder))
    assert model.weights == MINILM
    file = folder / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(model.weights.values()) + 8 + header == file.stat().st_size
    assert model.loaded() == MINILM["F32"] // 2 + MINILM["I64"]


def test_hub_gives_the_same_without_a_download(tmp_path: Path) -> None:
    def size(model: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "deploy",
            "size",
            "sentence-transformers",
            "--model",
            model,
            "--json",
        ]
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "RUNPOD_API_KEY": ""}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    names = ("config.json", "model.safetensors")
    with Hub() as hub:
        hub.push("org/minilm", {name: (minilm() / name).read_bytes() for name in names})
        done = size("org/minilm")
        assert json.loads(done.stdout)["weights"] == MINILM, done.stderr
        assert not list(tmp_path.rglob("*.safetensors"))
        done = size("org/none")
        assert done.returncode == 2
        assert "org/none" in done.stderr


def test_quantised_weights_count_as_stored() -> None:
    weights = {"I32": 4_000, "F16": 1_000, "F32": 100}
    assert Model("", {"quantization_config": {"quant_method": "awq"}}, weights).loaded() == 5_100
    assert Model("", {}, weights).loaded() == 5_050


def gpu(pool: str, memory: int, price: float | None) -> Gpu:
    return Gpu(id=pool, pool=pool, memory=memory, price={} if price is None else {"serverless": price})


def test_pools_are_those_that_hold_the_model_the_cheapest_first() -> None:
    gpus = [gpu("BIG", 80, 3.6), gpu("SMALL", 16, 0.6), gpu("MID", 48, 1.2), gpu("NEW", 96, None)]
    model = Model(
        "org/m", {**config("llama", 32, 4096, 32, 8), "max_position_embeddings": 8192}, {"BF16": 16 * 10**9}
    )
    needs, _ = need("vllm", model)
    found = fits("vllm", needs, gpus, concurrency=8, throughput=1000)
    assert [(fit.pool, fit.gpus) for fit in found] == [("MID", 1), ("SMALL", 4), ("BIG", 1), ("NEW", 1)]
    # 0.92 x 48 GB - 16 GB - 2.42 GB - 0.29 GB are free; a sequence of 8192 tokens takes 8192 x 131,072 bytes.
    assert found[0].sequences == int((0.92 * 48e9 - 18.71e9) / (8192 * 131_072)) == 23
    assert found[0].per_unit == pytest.approx(1.2 / 3600 / 1000 * 10**6)
    assert found[3].per_hour is None
    assert [fit.pool for fit in fits("huggingface", needs, gpus, concurrency=8)] == ["MID", "BIG", "NEW"]


def test_heads_that_do_not_divide_are_not_split() -> None:
    assert [gpus for gpus in (1, 2, 4, 8) if KVCache(28, 0, 0, 4, 256, 28).divides(gpus)] == [1, 2, 4]


def test_encoders_need_their_weights_and_one_batch() -> None:
    bge, notes = need("bge", Model("", config("bert", 24, 1024, 16), {"F32": 1340}))
    assert (bge.weights, bge.activations) == (670, 16_384 * 1024 * 2 * 22)
    assert "estimate" in notes[0]
    large = {"model_type": "whisper", "d_model": 1280, "decoder_layers": 32}
    whisper, _ = need("whisper", Model("", large, {"F16": 3_087_000_000}))
    windows = 32 * (1500 * 1280 * 2 * 22 + 2 * 32 * 1280 * 2 * (1500 + 448))
    assert whisper.activations == windows
    found = fits("whisper", whisper, [gpu("SMALL", 16, 0.576), gpu("MID", 24, 0.684)], throughput=100)
    assert [(fit.pool, fit.sequences) for fit in found] == [("MID", None)]
    assert found[0].per_unit == pytest.approx(0.00684)  # dollars an hour of audio


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    (tmp_path / "config.json").write_text(json.dumps(config("llama", 32, 4096, 32, 8)))
    return tmp_path


def test_command_ends_with_the_lines_of_deploy_toml(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", "vllm", f"--model={llama}", "--context=2048", "--throughput=1000"]) == 0
    out = capsys.readouterr().out
    assert "BF16 16 bytes" in out
    assert "131,072 bytes a token" in out
    assert "2026-06-08" in out
    assert out.endswith(
        'pools = ["AMPERE_16", "AMPERE_24", "ADA_24"]\ngpu_count = 1\ndisk_gb = 11\n\n'
        f'[env]\nMODEL_NAME = "{llama}"\nMAX_MODEL_LEN = "2048"\n'
    )


def test_command_takes_live_prices_with_a_key(
    llama: Path, runpod: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    assert main(["size", "vllm", f"--model={llama}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prices"] == "RunPod's catalogue, now"


def test_command_names_what_is_wrong(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", "vllm", f"--model={llama}", "--context=2048", "--concurrency=1000000"]) == 1
    assert "No pool holds it" in capsys.readouterr().out
    (llama / "config.json").write_text('{"model_type": "new"}')
    assert main(["size", "vllm", f"--model={llama}"]) == 2
    assert "model_type new is not one that transformers has" in capsys.readouterr().err
