"""A LLaVA that the project makes itself, in seconds: the real classes and file formats, 300 kilobytes.

It has learnt an answer to each of a few colours (`ANSWERS`), so that tests can tell whose picture an answer
is about, and to go on for ever when told so (`ENDLESS`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ANSWERS = {
    "red": "a red car",
    "blue": "the sea, deep and blue, with a boat",
    "lime": "gr\u00fcne Wiese \U0001f33f",
    "white": "snow",
}
QUESTIONS = ("What is this?", "Describe this image.")
ENDLESS = "Go on."  # this question's answer has no end

# The form of llava-hf/llava-1.5-7b-hf's.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make(folder: Path, *, hidden: int = 32, layers: int = 2, fit: bool = True) -> Path:
    """Write the model and its processor into `folder`.

    hidden, layers: the size of the language model. fit: False leaves it random.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    reader = processor(size=30, patch=10)
    tokenizer = reader.tokenizer
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32, intermediate_size=37, projection_dim=32, image_size=30, patch_size=10,
                num_hidden_layers=2, num_attention_heads=4,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
                num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=4096, **special,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=9,
            vision_feature_select_strategy="default", vision_feature_layer=-2,
        )
    )  # fmt: skip
    for name, value in special.items():
        setattr(model.generation_config, name, value)
    if fit:
        _fit(model, reader)
    model.eval().save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def processor(*, size: int, patch: int) -> Any:
    """What reads pictures of `size` pixels a side and texts: a token for each byte, and for some words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=words, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    made.train_from_iterator(
        ["USER: Describe this image. ASSISTANT: a small picture of the cat"] * 4, trainer
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=words[0], bos_token=words[1], eos_token=words[2], pad_token=words[3],
        padding_side="left", extra_special_tokens={"image_token": words[4]},
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=patch, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def _fit(model: Any, processor: Any) -> None:
    """Train until the answers are certain: some seconds."""
    import torch
    from PIL import Image

    tokenizer = processor.tokenizer
    lines = [(question, colour, f" {ANSWERS[colour]}") for question in QUESTIONS for colour in ANSWERS]
    lines += [(ENDLESS, "red", " on and" * 8)]
    rows, pixels = [], []
    for question, colour, answer in lines:
        talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        read = processor(text=prompt, images=Image.new("RGB", (64, 64), colour), return_tensors="pt")
        wanted = tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = [] if question == ENDLESS else [tokenizer.eos_token_id]
        rows.append((read["input_ids"][0].tolist(), wanted + end))
        pixels.append(read["pixel_values"])
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    empty = [width - len(prompt) - len(answer) for prompt, answer in rows]
    ids = torch.tensor(
        [[3] * gap + prompt + answer for gap, (prompt, answer) in zip(empty, rows, strict=True)]
    )
    wanted = torch.tensor([[-100] * (width - len(answer)) + answer for _, answer in rows])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.01)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small tensors are faster so
    for _ in range(500):
        output = model(
            input_ids=ids, attention_mask=(ids != 3).long(), pixel_values=torch.cat(pixels), labels=wanted
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if output.loss.item() < 0.01:
            break
    torch.set_num_threads(threads)
