"""Florence-2 across jobs: answers that wait together are generated in one batch, whatever their tasks.

engine = load_engine(path, name)
prompts = engine.prepare(image_bytes, ["OD"])
answers = [engine.decode(*pair) for pair in zip(prompts, await engine.generate(prompts))]
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    StoppingCriteriaList,
)

from serving.dynamic_batching import DynamicBatcher
from serving.image import encode_image, load_image
from shared import startup
from shared.device import pick_device
from shared.errors import StartError, invalid

from .regions import draw_regions, location_tokens, parse_answer

MAX_TOKENS = 1024  # of an answer, unless the request sets its own limit
ANNOTATED_SIDE = 1536  # pixels: the PNG of any such image fits into a job's result
# The vision tower needs the most memory: at 768 x 768 pixels many times what generation needs.
VISION_BATCH = 8


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as the model takes it."""

    pixels: torch.Tensor  # (3, height, width) of the processor
    width: int  # pixels of the image itself
    height: int
    thumbnail: Image | None = None  # to draw on, where the job asks for it


@dataclass(eq=False)
class Prompt:
    """One task about one picture."""

    picture: Picture
    task: str
    tokens: list[int]
    num_beams: int
    max_tokens: int
    abandoned: bool = False  # nobody waits for the answer


@dataclass(frozen=True)
class Generated:
    """The tokens of one answer."""

    tokens: list[int]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class DecodedAnswer:
    """One answer as text and regions."""

    raw_output: str
    parsed: dict[str, Any]  # under the task's prompt, in pixels of the image
    annotated: str | None  # PNG in base64


class Engine:
    """The model and its processor. Prompts with equal `num_beams` share batches."""

    def __init__(self, model: Any, processor: Any, *, max_batch_size: int) -> None:
        """max_batch_size: sequences in one batch; an answer takes num_beams of them."""
        self.model, self.processor = model, processor
        self.max_positions: int = model.config.text_config.max_position_embeddings
        # A token forced onto the end of a truncated answer would make it look complete.
        model.generation_config.forced_eos_token_id = None
        self._reserved_tokens = frozenset(processor.tokenizer.added_tokens_encoder)
        self.batcher: DynamicBatcher[Prompt, Generated] = DynamicBatcher(
            self._generate_batch,
            budget=max_batch_size,
            length=lambda prompt: prompt.num_beams,
            key=lambda prompt: prompt.num_beams,
        )

    def prepare(
        self,
        data: bytes,
        tasks: Sequence[str],
        *,
        text: str = "",
        region: Sequence[float] | None = None,
        num_beams: int = 3,
        max_tokens: int | None = None,
        annotate: bool = False,
        param: str = "image",
    ) -> list[Prompt]:
        """A prompt for each task about the image in `data`, which came in the field `param`.

        text, region: for the tasks that take one. Blocks. Raises JobError for data that is not an image, a
        region outside of it, a text with tokens of the model's own, and for a text or an answer too long.
        """
        image = load_image(data, param=param)
        width, height = image.size
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        if annotate:
            image.thumbnail((ANNOTATED_SIDE, ANNOTATED_SIDE))
        picture = Picture(pixels, width, height, image if annotate else None)

        limit = self.max_positions
        max_tokens = max_tokens or min(MAX_TOKENS, limit)
        if max_tokens > limit:
            message = f"{max_tokens}, and the model generates at most {limit}."
            raise invalid("max_tokens", message, "too_long")
        if reserved := [token for token in self._reserved_tokens if token in text]:
            raise invalid("text", f"{reserved[0]!r} is one of the model's own tokens.")
        prompts = []
        for task in tasks:
            place = location_tokens(region, width, height) if region and task.startswith("REGION_TO") else ""
            tokens = self.prompt_tokens(task, place or text)
            if len(tokens) > limit:
                length = f"{len(tokens)} tokens with the image's {self.processor.num_image_tokens}"
                raise invalid("text", f"{length}, and the model takes {limit}. Shorten it.", "too_long")
            prompts.append(Prompt(picture, task, tokens, num_beams, max_tokens))
        return prompts

    def prompt_tokens(self, task: str, argument: str = "") -> list[int]:
        """Token ids as the processor makes them of `<TASK>` and the argument after it."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        templates = processor.task_prompts_without_inputs | processor.task_prompts_with_input
        text = tokenizer.bos_token + templates[f"<{task}>"].format(input=argument) + tokenizer.eos_token
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [processor.image_token_id] * processor.num_image_tokens + ids

    async def generate(self, prompts: Sequence[Prompt]) -> list[Generated]:
        """The answers to `prompts`, in their order. When the call is cancelled, their generation stops."""
        try:
            return await self.batcher.submit(prompts)
        finally:
            for prompt in prompts:
                prompt.abandoned = True

    def _generate_batch(self, prompts: list[Prompt]) -> list[Generated]:
        """The answers to prompts of one num_beams, on the engine thread."""
        model, num_beams = self.model, prompts[0].num_beams
        limits = [prompt.max_tokens for prompt in prompts]
        config = copy.deepcopy(model.generation_config)
        config.update(
            do_sample=False,
            num_beams=num_beams,
            early_stopping=num_beams > 1 and config.early_stopping,
            max_length=None,
            max_new_tokens=max(limits),
        )

        def finished(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            """Whether each sequence may stop. ids: (batch * num_beams, decoded tokens)"""
            generated = ids.shape[1] - 1
            done = [
                prompt.abandoned or generated >= limit for prompt, limit in zip(prompts, limits, strict=True)
            ]
            return torch.tensor(done, device=ids.device).repeat_interleave(len(ids) // len(done))

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # All beams of an answer attend to the same picture: copying its keys and values at every step, as
        # generate() does, took more than half of the time.
        cache.cross_attention_cache.reorder_cache = lambda _: None
        with torch.inference_mode():
            embeddings, mask = self._embed(prompts)
            sequences = model.generate(
                encoder_outputs=model.get_encoder()(inputs_embeds=embeddings, attention_mask=mask),
                attention_mask=mask,
                past_key_values=cache,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([finished]),
            ).tolist()
        answers = []
        for sequence, limit in zip(sequences, limits, strict=True):
            tokens = sequence[1 : 1 + limit]  # without the decoder's start token
            if config.eos_token_id in tokens:
                answers.append(Generated(tokens[: tokens.index(config.eos_token_id) + 1], "stop"))
            else:
                answers.append(Generated(tokens, "length"))
        return answers

    def _embed(self, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's input, (batch, seq, hidden), and its mask, (batch, seq); padded on the right."""
        model = self.model
        # A picture that several prompts are about runs through the vision tower once.
        pictures = list({id(prompt.picture): prompt.picture for prompt in prompts}.values())
        index = {id(picture): number for number, picture in enumerate(pictures)}
        features = []
        for start in range(0, len(pictures), VISION_BATCH):
            pixels = torch.stack([picture.pixels for picture in pictures[start : start + VISION_BATCH]])
            features.append(model.get_image_features(pixels.to(model.device, model.dtype)).pooler_output)
        longest = max(len(prompt.tokens) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
            mask[row, : len(prompt.tokens)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        embeddings = model.get_input_embeddings()(ids)
        # (pictures, image tokens, hidden) -> (batch, image tokens, hidden)
        images = torch.cat(features)[[index[id(prompt.picture)] for prompt in prompts]]
        is_image = (ids == self.processor.image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(is_image, images.to(embeddings.dtype)), mask

    def decode(self, prompt: Prompt, generated: Generated) -> DecodedAnswer:
        """The answer as text, parsed and, if the picture has a thumbnail, drawn. Blocks."""
        picture, size = prompt.picture, (prompt.picture.width, prompt.picture.height)
        text = self.processor.decode(generated.tokens, skip_special_tokens=False)
        raw = re.sub("</?s>|<pad>", "", text).strip()
        parsed = parse_answer(self.processor, raw, prompt.task, size)
        answer = parsed[f"<{prompt.task}>"]
        if picture.thumbnail is None or isinstance(answer, str):
            return DecodedAnswer(raw, parsed, None)
        return DecodedAnswer(raw, parsed, encode_image(draw_regions(picture.thumbnail, answer, *size)))


def load_engine(
    path: Path, name: str, *, device: str = "auto", dtype: str = "auto", max_batch_size: int = 96
) -> Engine:
    """The model in the folder `path`, which errors call `name`. Logs the phase load.

    Raises StartError for a checkpoint that lacks weights or parts of the processor.
    """
    with startup.phase("load") as phase:
        torch_device, torch_dtype = pick_device(device, dtype)
        try:
            processor = Florence2Processor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            cause = str(error).strip().partition("\n")[0]
            raise StartError(f"The processor of {name} is incomplete: {cause}", code="incomplete") from error
        if "<loc_999>" not in processor.tokenizer.get_vocab():
            raise StartError(f"{name} comes without Florence-2's vocabulary.", code="incomplete")
        model, report = Florence2ForConditionalGeneration.from_pretrained(
            path, dtype=torch_dtype, local_files_only=True, output_loading_info=True
        )
        if missing := report["missing_keys"]:
            raise StartError(
                f"{name} lacks {len(missing)} weights, such as {min(missing)}. Convert it again, or use "
                "another checkpoint.",
                code="incomplete",
            )
        model.to(torch_device).eval()
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    return Engine(model, processor, max_batch_size=max_batch_size)
