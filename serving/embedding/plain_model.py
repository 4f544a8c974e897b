"""Embedding models of the usual form, without the import of sentence_transformers.

It loads the trainer, evaluators and model cards too, for seconds of each start.

model = load_plain(path, device=torch.device("cpu"), dtype=torch.float32)  # None for another form
embeddings = model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Encoders that are called with ids and a mask, and whose last hidden state is what is pooled.
MODEL_TYPES = ("bert", "distilbert", "mpnet", "roberta", "xlm-roberta")
POOLINGS = ("cls_token", "mean_tokens", "lasttoken")  # as pooling_mode_cls_token in a Pooling's config.json
OTHER_POOLINGS = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "weightedmean")
TEXT_ONLY = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
    "do_lower_case": False,
    "processing_kwargs": {},
}


class TextTransformer(torch.nn.Module):  # type: ignore[misc]
    """Token ids to the last hidden state, as `token_embeddings`, (batch, seq, hidden)."""

    modality_config: ClassVar[dict[str, Any]] = {"text": {}}  # which kinds of input it takes

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"]
        hidden = self.model(input_ids=features["input_ids"], attention_mask=mask).last_hidden_state
        return {**features, "token_embeddings": hidden}


class Pooling(torch.nn.Module):  # type: ignore[misc]
    """Token embeddings to `sentence_embedding`, (batch, hidden). pooling_mode: mean, cls or lasttoken."""

    def __init__(self, pooling_mode: str) -> None:
        super().__init__()
        self.pooling_mode = pooling_mode

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tokens, mask = features["token_embeddings"], features["attention_mask"]
        if self.pooling_mode == "mean":
            total = (tokens * mask.unsqueeze(-1).to(tokens.dtype)).sum(1, dtype=torch.float32)
            embedding = (total / mask.sum(1, keepdim=True).clamp(min=1)).to(tokens.dtype)
        else:
            first, last = mask.argmax(1), mask.shape[1] - 1 - mask.flip(1).argmax(1)
            chosen = first if self.pooling_mode == "cls" else last
            embedding = tokens[torch.arange(len(tokens), device=tokens.device), chosen]
        return {**features, "sentence_embedding": embedding}


class Normalize(torch.nn.Module):  # type: ignore[misc]
    """`sentence_embedding` to length 1."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        embedding = torch.nn.functional.normalize(features["sentence_embedding"], dim=-1)
        return {**features, "sentence_embedding": embedding}


class PlainModel(torch.nn.Sequential):  # type: ignore[misc]
    """TextTransformer, Pooling and perhaps Normalize, with the attributes of SentenceTransformer that Encoder
    reads.
    """

    def __init__(
        self,
        modules: Iterable[torch.nn.Module],
        tokenizer: PreTrainedTokenizerBase,
        dimensions: int,
        prompts: dict[str, str],
        default_prompt_name: str | None,
    ) -> None:
        super().__init__(*modules)
        self.tokenizer, self.dimensions = tokenizer, dimensions
        self.max_seq_length: int | None = tokenizer.model_max_length
        self.prompts, self.default_prompt_name = prompts, default_prompt_name

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def get_embedding_dimension(self) -> int:
        return self.dimensions


@dataclass(frozen=True)
class Plan:
    """What the files of a model of the usual form say."""

    pooling: str
    normalize: bool
    max_seq_length: int | None
    prompts: dict[str, str]
    default_prompt_name: str | None


def read_plan(folder: Path) -> Plan | None:
    """What the files of the model in `folder` say, or None where one says anything that is not known here."""
    modules = _read(folder / "modules.json") or []
    kinds = [str(module.get("type", "")) for module in modules]
    names = [kind.rpartition(".")[2] for kind in kinds]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return None
    if modules[0].get("path") or not all(kind.startswith("sentence_transformers.") for kind in kinds):
        return None
    if any(set(module) - {"idx", "name", "path", "type"} for module in modules):
        return None
    normalize = _read(folder / modules[-1]["path"] / "config.json") if len(names) == 3 else None
    if any(value != "sentence_embedding" for value in (normalize or {}).values()):
        return None
    config = _read(folder / "config.json") or {}
    if config.get("model_type") not in MODEL_TYPES or config.keys() & {"auto_map", "quantization_config"}:
        return None
    configs = {path.name for path in folder.glob("sentence_*_config.json")}
    if configs - {"sentence_bert_config.json"} or (folder / "adapter_config.json").exists():
        return None
    transformer = _read(folder / "sentence_bert_config.json") or {}
    max_seq_length = transformer.pop("max_seq_length", None)
    if any(name not in TEXT_ONLY or TEXT_ONLY[name] != value for name, value in transformer.items()):
        return None
    pooling = _pooling(_read(folder / modules[1]["path"] / "config.json") or {})
    own = _read(folder / "config_sentence_transformers.json") or {}
    known = {"__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"}
    if pooling is None or own.keys() - known:
        return None
    if own.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        return None
    # As SentenceTransformer has them, where null is an empty prompt.
    prompts = {"query": "", "document": ""}
    prompts |= {name: prompt or "" for name, prompt in (own.get("prompts") or {}).items()}
    default = own.get("default_prompt_name")
    if default is not None and default not in prompts:
        return None
    return Plan(pooling, len(names) == 3, max_seq_length, prompts, default)


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _pooling(config: dict[str, Any]) -> str | None:
    """The one pooling of a Pooling's config.json (flags in its old form), if it is known here."""
    if not config.pop("include_prompt", True):
        return None
    config = {name: value for name, value in config.items() if not name.endswith("embedding_dimension")}
    if config.keys() == {"pooling_mode"}:
        return config["pooling_mode"] if config["pooling_mode"] in ("cls", "mean", "lasttoken") else None
    flags = {name.removeprefix("pooling_mode_"): flag for name, flag in config.items()}
    modes = [name for name, flag in flags.items() if flag]
    if flags.keys() - {*POOLINGS, *OTHER_POOLINGS} or len(modes) != 1 or modes[0] not in POOLINGS:
        return None
    return modes[0].partition("_")[0]


def load_plain(path: Path, *, device: torch.device, dtype: torch.dtype) -> PlainModel | None:
    """The model in the folder `path`, or None where only sentence_transformers knows what its files say."""
    plan = read_plan(path)
    if plan is None:
        return None
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    length = {} if plan.max_seq_length is None else {"model_max_length": plan.max_seq_length}
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, **length)
    if not length:
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    transformer = AutoModel.from_pretrained(path, config=config, dtype=dtype, local_files_only=True)
    modules: list[torch.nn.Module] = [TextTransformer(transformer), Pooling(plan.pooling)]
    if plan.normalize:
        modules.append(Normalize())
    model = PlainModel(modules, tokenizer, config.hidden_size, plan.prompts, plan.default_prompt_name)
    model.to(device).eval()
    return model
