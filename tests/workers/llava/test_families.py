"""The engine of the llava worker on the architectures that its README names, tiny and random.

Each treats images in its own way: tiles, a mask of their own, cross attention, positions in three dimensions.
Answers are token for token those of `generate`, and the same whatever runs beside them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

from serving.continuous_batching.generator import Generator
from serving.continuous_batching.kv_cache import supports_joining_batches
from serving.continuous_batching.sampling import SamplingParams
from tools.models.tiny_llava import processor

pytestmark = pytest.mark.engine

Read = Callable[[Sequence[Any], str], Any]  # images and a question -> the model's inputs
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}


def reader(made: Any, mark: str, *, nested: bool = False) -> Read:
    """Inputs by the processor `made`. mark: stands for an image. nested: it takes one list for each text."""

    def read(images: Sequence[Any], question: str) -> Any:
        batch = [images] if images and nested else images or None
        return made(text=mark * len(images) + question, images=batch, return_tensors="pt")

    return read


def tokenizer(image: str = "<image>", *more: str) -> Any:
    made = processor(size=30, patch=10).tokenizer
    made.add_special_tokens({"additional_special_tokens": [image, *more]})
    made.image_token, made.image_token_id = image, made.convert_tokens_to_ids(image)
    return made


def llava_next() -> tuple[Any, Any, Read]:
    text, grid = tokenizer(), [[30, 60], [60, 30], [60, 60]]
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}, image_grid_pinpoints=grid
    )
    made = hf.LlavaNextProcessor(
        image_processor=images, tokenizer=text, patch_size=10, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        text_config=hf.LlamaConfig(vocab_size=len(text), **TEXT), image_grid_pinpoints=grid,
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=30, patch_size=10, projection_dim=32),
        image_token_index=text.image_token_id, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip

    return hf.LlavaNextForConditionalGeneration(config), text, reader(made, "<image>\n")


def idefics3() -> tuple[Any, Any, Read]:
    text = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    made = hf.Idefics3Processor(image_processor=images, tokenizer=text, image_seq_len=4)
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(vocab_size=len(text), **TEXT), image_token_id=text.image_token_id,
        vision_config={**VISION, "image_size": 28, "patch_size": 7}, scale_factor=2, pad_token_id=3,
    )  # fmt: skip

    return hf.Idefics3ForConditionalGeneration(config), text, reader(made, "<image>", nested=True)


def gemma3() -> tuple[Any, Any, Read]:
    text = tokenizer("<image>", "<start>", "<end>")
    for name, mark in (("boi_token", "<start>"), ("eoi_token", "<end>")):
        setattr(text, name, mark)
        setattr(text, f"{name}_id", text.convert_tokens_to_ids(mark))
    images = hf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    made = hf.Gemma3Processor(image_processor=images, tokenizer=text, image_seq_length=4)
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(
            vocab_size=len(text), **TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=28, patch_size=7),
        mm_tokens_per_image=4, image_token_index=text.image_token_id,
        boi_token_index=text.boi_token_id, eoi_token_index=text.eoi_token_id,
    )  # fmt: skip

    return hf.Gemma3ForConditionalGeneration(config), text, reader(made, "<start>")


def mllama() -> tuple[Any, Any, Read]:
    text = tokenizer("<|image|>", "<|python_tag|>")
    images = hf.MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=2)
    made = hf.MllamaProcessor(image_processor=images, tokenizer=text)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = hf.MllamaConfig(
        text_config={
            **TEXT, "vocab_size": len(text), "num_hidden_layers": 3, "cross_attention_layers": [1],
            "rope_parameters": rope,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 4, "image_size": 28, "patch_size": 7, "max_num_tiles": 2,
            "intermediate_layers_indices": [0], "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        image_token_index=text.image_token_id,
    )  # fmt: skip

    return hf.MllamaForConditionalGeneration(config), text, reader(made, "<|image|>", nested=True)


def qwen2_5_vl() -> tuple[Any, Any, Read]:
    """Its processor needs torchvision, so its inputs are made here as that would make them."""
    text = tokenizer("<image>", "<vision>", "</vision>", "<video>")
    marks = [text.convert_tokens_to_ids(mark) for mark in ("<vision>", "<image>", "</vision>", "<video>")]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": len(text), "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "patch_size": 4,
            "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
        vision_start_token_id=marks[0], image_token_id=marks[1], vision_end_token_id=marks[2],
        video_token_id=marks[3],
    )  # fmt: skip

    def read(images: Sequence[Any], question: str) -> Any:
        sizes = [(2, 2) if image.width < 100 else (2, 4) for image in images]
        ids = [1]
        for height, width in sizes:
            ids += [marks[0], *[marks[1]] * (height * width // 4), marks[2]]
        input_ids = torch.tensor([ids + text(question, add_special_tokens=False)["input_ids"]])
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == marks[1]).int(),
        }
        if sizes:
            patches = [
                torch.full((height * width, 3 * 2 * 16), image.getpixel((0, 0))[0] / 255)
                for (height, width), image in zip(sizes, images, strict=True)
            ]
            inputs["pixel_values"] = torch.cat(patches)
            inputs["image_grid_thw"] = torch.tensor([[1, *size] for size in sizes])
        return inputs

    return hf.Qwen2_5_VLForConditionalGeneration(config), text, read


@pytest.mark.parametrize(
    ("family", "joining"),
    [(llava_next, True), (idefics3, True), (gemma3, False), (mllama, False), (qwen2_5_vl, False)],
)
async def test_answers_are_those_of_generate(
    family: Callable[[], tuple[Any, Any, Read]], joining: bool
) -> None:
    torch.manual_seed(0)
    model, text, read = family()
    model.eval().generation_config.update(eos_token_id=2, pad_token_id=3)
    assert supports_joining_batches(model) == joining
    generator = Generator(model, text)
    draw = random.Random(0)
    requests = []
    for number in range(14):
        images = [
            Image.new("RGB", draw.choice([(50, 50), (120, 50), (40, 90)]), (draw.randrange(255), 9, 9))
            for _ in range((1, 1, 2, 0)[number % 4])
        ]
        question = "".join(draw.choice("abc de ") for _ in range(draw.randrange(1, 30)))
        params = SamplingParams(draw.randrange(5, 40), (0.0, 0.0, 1.0)[number % 3], seed=number)
        requests.append((dict(read(images, question)), params))

    async def ask(number: int, after: float = 0.0) -> tuple[str, int]:
        await asyncio.sleep(after)
        async with aclosing(generator.stream(*requests[number], each=False)) as deltas:
            delta = await anext(deltas)
        return delta.text, delta.num_tokens

    alone = [await ask(number) for number in range(14)]
    assert await asyncio.gather(*(ask(number, 0.01 * number) for number in range(14))) == alone
    assert len(set(alone)) > 8, "the images and questions make a difference"
    for (inputs, params), answer in zip(requests, alone, strict=True):
        if not params.temperature:
            out = model.generate(**inputs, max_new_tokens=params.max_tokens, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :].tolist()
            assert answer == (text.decode(new, skip_special_tokens=True), len(new))
    generator.close()
