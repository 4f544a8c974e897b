"""A Florence-2 that the project makes itself, in seconds: the real classes and file formats, a few megabytes.

It has an answer to each task about a red and a blue picture (`ANSWERS`), so that tests can tell whose answer
came back; about anything else it talks nonsense. Nothing is trained: all weights stay random but the last
layer's, which solve the linear equations from the decoder's states to the wanted tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def locations(*bins: int) -> str:
    """Florence-2's tokens for coordinates in thousandths of the picture."""
    return "".join(f"<loc_{number}>" for number in bins)


TEXT = "a red car"
REGION = (100, 200, 500, 800)
_AT = locations(*REGION)
_QUAD = locations(10, 10, 90, 12, 90, 50, 10, 48)
_TRIANGLE = locations(279, 379, 282, 379, 290, 673)
# What the decoder says to a prompt about a red picture, and about a blue one.
ANSWERS = {
    "<OCR>": ("STOP", "Café 5 €"),
    "<OCR_WITH_REGION>": (f"STOP{_QUAD}", f"Café{_QUAD}5 €{locations(20, 20, 80, 21, 80, 60, 20, 59)}"),
    "<CAPTION>": ("a red sign", "the blue sign of a car park"),
    "<DETAILED_CAPTION>": ("a sign, all red", "a sign that is blue"),
    "<MORE_DETAILED_CAPTION>": ("a sign, red from edge to edge", "a blue sign"),
    "<OD>": (
        f"car{locations(100, 200, 500, 800)}",
        f"café{locations(1, 2, 300, 400)}dog{locations(10, 20, 30, 40)}{locations(500, 600, 700, 999)}",
    ),
    "<DENSE_REGION_CAPTION>": (f"red car{_AT}", f"blue dog{_AT}"),
    "<REGION_PROPOSAL>": (_AT, locations(0, 0, 999, 999)),
    f"<CAPTION_TO_PHRASE_GROUNDING>{TEXT}": (f"a red car{_AT}", f"a car{_AT}"),
    f"<REFERRING_EXPRESSION_SEGMENTATION>{TEXT}": (_TRIANGLE, _QUAD),
    f"<OPEN_VOCABULARY_DETECTION>{TEXT}": (f"car{_AT}", f"car<poly>{_TRIANGLE}</poly>"),
    f"<REGION_TO_SEGMENTATION>{_AT}": (_QUAD, _TRIANGLE),
    f"<REGION_TO_CATEGORY>{_AT}": ("car", "dog"),
    f"<REGION_TO_DESCRIPTION>{_AT}": ("red car", "blue dog"),
    f"<REGION_TO_OCR>{_AT}": ("STOP", "Café"),
}
COLOURS = ("red", "blue")


def make(
    folder: Path,
    *,
    image_size: int = 64,
    window: int = 4,
    channels: tuple[int, int, int, int] = (8, 8, 16, 16),
    layers: int = 1,
) -> Path:
    """Write the model and its processor into `folder`.

    image_size: pixels a side, a multiple of 32. window: of the vision tower's attention. channels: of its
    four stages. layers: of the language model's encoder, and of its decoder.
    """
    import torch
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration

    torch.manual_seed(0)
    width = 320  # more than there are tokens in all answers, or they could not be exact
    processor = _processor(image_size)
    tokenizer = processor.tokenizer
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = Florence2Config(
        vision_config={
            "depths": [1] * 4, "embed_dim": list(channels), "num_heads": [1, 1, 2, 2],
            "num_groups": [1, 1, 2, 2], "window_size": window, "projection_dim": width,
            "drop_path_rate": 0.0, "initializer_range": 0.3,
            "max_temporal_embeddings": 10, "max_position_embeddings": 10,
        },
        text_config=BartConfig(
            vocab_size=len(tokenizer), d_model=width, init_std=0.1,
            encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            max_position_embeddings=1024, tie_word_embeddings=False, **ids,
        ).to_dict(),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Florence2ForConditionalGeneration(config).eval()
    for name, value in {**ids, "forced_bos_token_id": 0, "forced_eos_token_id": 2}.items():
        setattr(model.generation_config, name, value)
    model.generation_config.update(num_beams=3, no_repeat_ngram_size=3)  # as in the real checkpoints
    _teach(model, processor, image_size)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _processor(image_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BartTokenizer, CLIPImageProcessorPil, Florence2Processor

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    )
    learned.train_from_iterator([answer for pair in ANSWERS.values() for answer in pair] * 4, trainer)
    bpe = json.loads(learned.to_str())["model"]
    tokenizer = BartTokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        extra_special_tokens={"image_token": "<image>"},
    )
    words = ("od", "ocr", "cap", "ncap", "dcap", "grounding", "seg", "region_cap", "proposal", "poly")
    pairs = [f"<{slash}{word}>" for word in words for slash in ("", "/")]
    tokenizer.add_tokens(
        [*pairs, "<sep>", "<and>", *map("<loc_{}>".format, range(1000))], special_tokens=True
    )
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    size = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    images.image_seq_length = (image_size // 32) ** 2 + 1
    kinds = "ocr phrase_grounding pure_text description_with_bboxes description_with_polygons polygons bboxes"
    rules: dict[str, Any] = {kind: {} for kind in f"{kinds} description_with_bboxes_or_polygons".split()}
    rules["phrase_grounding"] = {"banned_grounding_tokens": ["it", "the image", "the", "a"]}
    return Florence2Processor(image_processor=images, tokenizer=tokenizer, post_processor_config=rules)


def _teach(model: Any, processor: Any, image_size: int) -> None:
    """Set the last layer so that it gives ANSWERS, and soon an end to what it does not know."""
    import torch
    from PIL import Image

    # One number of the decoder's states is always 1: a token's weight for it is how likely it is in any case.
    norm = model.model.language_model.decoder.layers[-1].final_layer_norm
    states, targets = [], []
    with torch.inference_mode():
        norm.weight[0], norm.bias[0] = 0.0, 1.0
        for prompt, pair in ANSWERS.items():
            for colour, answer in zip(COLOURS, pair, strict=True):
                picture = Image.new("RGB", (image_size, image_size), colour)
                inputs = processor(text=prompt, images=picture, return_tensors="pt")
                tokens = [2, 0, *processor.tokenizer(answer, add_special_tokens=False)["input_ids"], 2]
                outputs = model.model(**inputs, decoder_input_ids=torch.tensor([tokens[:-1]]))
                states.append(outputs.last_hidden_state[0])
                targets += tokens[1:]
        rows = torch.cat(states).double()[:, 1:]
        wanted = torch.zeros(len(targets), model.lm_head.out_features, dtype=torch.double)
        wanted[torch.arange(len(targets)), targets] = 20.0
        wanted[:, 2] -= 15.0
        weights = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T.float()
        model.lm_head.weight.copy_(torch.cat([torch.zeros(len(weights), 1), weights], dim=1))
        model.lm_head.weight[2, 0] = 15.0
