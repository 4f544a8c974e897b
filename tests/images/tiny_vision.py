"""Writes a checkpoint with random weights, some hundred kilobytes, whose processor needs torchvision.

    python tiny_vision.py qwen2_5_vl|smolvlm FOLDER

It runs inside the llava image, where torchvision is, and imports nothing of this project.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TEMPLATE = (
    "{{% for message in messages %}}{{{{ message['role'] }}}}: "
    "{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}\n{{% endfor %}}{{% if add_generation_prompt %}}assistant: {{% endif %}}"
)


def tokenizer(*marks: str, **named: str) -> Any:
    """A token for each byte, and the marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", *marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    made.add_special_tokens(words[: 4 + len(marks)])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", extra_special_tokens=named,
    )  # fmt: skip


def qwen2_5_vl() -> tuple[Any, Any]:
    import transformers as hf

    marks = {
        "vision_start": "<|vision_start|>",
        "image": "<|image_pad|>",
        "vision_end": "<|vision_end|>",
        "video": "<|video_pad|>",
    }
    text = tokenizer(*marks.values())
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=sizes),
        video_processor=hf.Qwen2VLVideoProcessor(size=sizes),
        tokenizer=text,
        chat_template=TEMPLATE.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": len(text), "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **{f"{name}_token_id": text.convert_tokens_to_ids(mark) for name, mark in marks.items()},
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    import transformers as hf

    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    text = tokenizer(*named.values(), *cells, **named)
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    processor = hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(**sizes),
        video_processor=hf.SmolVLMVideoProcessor(**sizes),
        tokenizer=text,
        image_seq_len=4,
        chat_template=TEMPLATE.format(image="<image>"),
    )
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(text), pad_token_id=3),
        vision_config={
            "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14,
        },
        image_token_id=text.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=3,
    )  # fmt: skip
    return hf.SmolVLMForConditionalGeneration(config), processor


def main(family: str, folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    model, processor = {"qwen2_5_vl": qwen2_5_vl, "smolvlm": smolvlm}[family]()
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
