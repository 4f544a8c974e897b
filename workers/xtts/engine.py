"""Speech for segments of text with an Xtts, many at a time.

The library synthesizes one segment after another. Here the transformer decodes one token for all segments at
a time, from the same inputs (`Xtts.inference`); its hidden states go to the vocoder as they are, where the
library computes them once more. A segment depends on nothing but itself: in float32 its tokens are those
that it would get alone.

The transformer is not thread-safe and has the engine's thread. The vocoder is a pure function and has threads
of its own, so that segments are decoded while others become audio.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from serving.continuous_batching.decode_loop import DecodeLoop
from serving.continuous_batching.kv_cache import DecodeBatch, preallocated_cache
from serving.continuous_batching.sampling import SamplingParams
from serving.continuous_batching.sequence import ActiveSequence
from shared.device import is_cuda_broken, parallel_batches, share_cores
from shared.logs import log

from .schemas import FinishReason
from .vocoder import MAX_PENDING, NOT_FINITE_ADVICE, Vocoder
from .voices import Voice

STREAM_TOKENS = 20  # between two chunks of a stream; 0.9 s of XTTS v2's


@dataclass(frozen=True, slots=True)
class AudioUpdate:
    """The samples since the last update. The one with a finish_reason is the last."""

    samples: Future[NDArray[np.float32]]
    finish_reason: FinishReason | None


@dataclass(slots=True, eq=False, kw_only=True)
class SpeechSequence(ActiveSequence):
    """A segment of text while it becomes speech. Its updates are AudioUpdates.

    streamed: emit audio every few tokens, not only at the end. job: whose it is; places are shared by job.
    hidden_states: (width,) each, one for a token: the vocoder's input. frames_emitted: frames whose audio has
    been emitted, by the futures in `audio`.
    """

    text_ids: list[int]
    voice: Voice
    seed: int
    speed: float
    streamed: bool
    job: Hashable
    hidden_states: list[torch.Tensor] = field(default_factory=list)
    frames_emitted: int = 0
    audio: list[Future[NDArray[np.float32]]] = field(default_factory=list)

    def restart(self) -> None:
        """Begin again. The same tokens are sampled again, so that audio that has been emitted stays valid."""
        self.token_ids, self.hidden_states, self.seen_tokens = [], [], None
        self.random = random.Random(self.seed)  # noqa: S311

    async def next_audio(self) -> tuple[NDArray[np.float32], FinishReason | None]:
        """The next samples, and the finish reason with the last ones. Raises the error of a failure."""
        update: AudioUpdate = await self.next_update()
        return await asyncio.wrap_future(update.samples), update.finish_reason

    def stop(self) -> None:
        """Leave the batch and the vocoder's queue."""
        self.finished = True
        for samples in self.audio:
            samples.cancel()


class SpeechEngine(DecodeLoop[SpeechSequence]):
    """The decode loop of an Xtts.

    max_batch_size: the most segments that are decoded together. stream_tokens: tokens between two updates of
    a streamed sequence. vocoder_threads: None: see `parallel_batches`. max_pending: see Vocoder.
    """

    not_finite_advice = NOT_FINITE_ADVICE
    pays_prefill_debt = False  # a segment's prompt is short beside its speech

    def __init__(
        self,
        model: Any,
        *,
        max_batch_size: int = 16,
        stream_tokens: int = STREAM_TOKENS,
        vocoder_threads: int | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        super().__init__(model.device)
        self.model, self.gpt = model, model.gpt
        self.max_batch_size, self.stream_tokens = max_batch_size, stream_tokens
        self.max_text_tokens: int = model.args.gpt_max_text_tokens - 1
        self.sample_rate: int = model.args.output_sample_rate
        config = model.config
        self.default_params = SamplingParams(
            self.gpt.max_gen_mel_tokens, config.temperature, config.top_p, top_k=config.top_k,
            repetition_penalty=float(config.repetition_penalty),
        )  # fmt: skip
        # The library counts 1, which stands for the prompt, and the start token as generated before.
        self.prompt_ids = torch.tensor([1, self.gpt.start_audio_token])
        self.threads = vocoder_threads or parallel_batches(self.device)
        self.vocoder = Vocoder(
            model.hifigan_decoder,
            device=self.device,
            threads=self.threads,
            max_pending=max_pending,
            decoding=lambda: self.running is not None,
        )
        self.start()

    # -- for the event loop

    def synthesize(
        self,
        text_ids: list[int],
        voice: Voice,
        params: SamplingParams,
        *,
        seed: int,
        speed: float = 1.0,
        streamed: bool = False,
        job: Hashable = None,
    ) -> SpeechSequence:
        """Begin the speech of a segment: `next_audio` of the result gives it, `stop` ends it early."""
        sequence = SpeechSequence(
            params=params,
            prompt_ids=self.prompt_ids,
            random=random.Random(seed),  # noqa: S311
            text_ids=text_ids,
            voice=voice,
            seed=seed,
            speed=speed,
            streamed=streamed,
            job=job,
        )
        self.submit(sequence)
        return sequence

    # -- on the engine's thread

    def step(self) -> None:
        share_cores(self.threads, 1 + self.vocoder.busy())
        super().step()

    def admit(self) -> list[SpeechSequence]:
        """One after another from the job with the fewest sequences that run."""
        running = Counter(sequence.job for sequence in (self.running.sequences if self.running else ()))
        admitted: list[SpeechSequence] = []
        for _ in range(min(len(self.waiting), self.max_batch_size - running.total())):
            sequence = min(self.waiting, key=lambda waiting: running[waiting.job])
            self.waiting.remove(sequence)
            running[sequence.job] += 1
            admitted.append(sequence)
        return admitted

    def prefill(self, sequences: list[SpeechSequence]) -> tuple[DecodeBatch[SpeechSequence], torch.Tensor]:
        prompts = [self._embed_prompt(sequence) for sequence in sequences]
        longest = max(len(prompt) for prompt in prompts)
        padded = [pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts]
        columns = torch.arange(longest, device=self.device)
        mask = torch.stack(
            [columns >= longest - len(prompt) for prompt in prompts]
        ).long()  # (batch, longest)
        batch = DecodeBatch(sequences, preallocated_cache(self.gpt.gpt), mask)
        return batch, self._forward(batch, torch.stack(padded))  # (batch, longest, width)

    def _embed_prompt(self, sequence: SpeechSequence) -> torch.Tensor:
        """The voice's latents, the text and the start token, (prompt, width)."""
        gpt = self.gpt
        text = [gpt.start_text_token, *sequence.text_ids, gpt.stop_text_token]
        text_ids = torch.tensor([text], device=self.device)  # (1, text)
        start = torch.tensor([[gpt.start_audio_token]], device=self.device)  # (1, 1)
        parts = [
            sequence.voice.latents.to(self.device, gpt.mel_head.weight.dtype),  # (1, 32, width)
            gpt.text_embedding(text_ids) + gpt.text_pos_embedding(text_ids),  # (1, text, width)
            gpt.mel_embedding(start) + gpt.mel_pos_embedding(start),  # (1, 1, width)
        ]
        return torch.cat(parts, dim=1)[0]

    def decode(self, batch: DecodeBatch[SpeechSequence]) -> torch.Tensor:
        positions = torch.tensor([[len(one.token_ids)] for one in batch.sequences], device=self.device)
        embeddings = self.gpt.mel_embedding(batch.token_ids) + self.gpt.mel_pos_embedding.emb(positions)
        new = torch.ones_like(batch.attention_mask[:, :1])
        batch.attention_mask = torch.cat([batch.attention_mask, new], dim=1)
        return self._forward(batch, embeddings)  # (batch, 1, width)

    def _forward(self, batch: DecodeBatch[SpeechSequence], embeddings: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, vocab), in float32. Keeps the hidden state of each sequence's last position."""
        output = self.gpt.gpt(
            inputs_embeds=embeddings, attention_mask=batch.attention_mask, past_key_values=batch.cache,
            use_cache=True,
        )  # fmt: skip
        hidden = self.gpt.final_norm(output.last_hidden_state[:, -1])  # (batch, width)
        logits: torch.Tensor = self.gpt.mel_head(hidden).float()
        for sequence, state in zip(batch.sequences, hidden, strict=True):
            if not sequence.finished:
                sequence.hidden_states.append(state)
        return logits

    def accept(self, sequence: SpeechSequence, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        reason: FinishReason | None = None
        if token_id == self.gpt.stop_audio_token:
            reason = "stop"
        elif not sequence.remaining:
            reason = "length"
        if reason or (sequence.streamed and len(sequence.token_ids) % self.stream_tokens == 0):
            try:
                self._emit_audio(sequence, reason)
            except Exception as error:
                if is_cuda_broken(error):
                    raise
                sequence.fail(error)
        if sequence.finished:  # its job keeps it until the last segment is spoken
            sequence.hidden_states, sequence.seen_tokens = [], None

    def _emit_audio(self, sequence: SpeechSequence, reason: FinishReason | None) -> None:
        """Have the vocoder make audio of the frames that are certain and have not been emitted."""
        frames = self.vocoder.interpolate(sequence.hidden_states, sequence.speed)  # (1, width, frames)
        end = frames.shape[2]
        if reason is None:
            end -= self.vocoder.uncertain_frames(end, len(sequence.hidden_states))
            if end <= sequence.frames_emitted:
                return
        samples = self.vocoder.submit(frames, sequence.voice.embedding, sequence.frames_emitted, end)
        sequence.audio.append(samples)
        sequence.frames_emitted = end
        if reason:
            sequence.finished = True
        sequence.emit(AudioUpdate(samples, reason))

    def shrink(self, batch: DecodeBatch[SpeechSequence], newcomer: SpeechSequence | None) -> None:
        fits = len(batch.sequences) if newcomer else len(batch.sequences) // 2
        self.max_batch_size = max(1, fits)
        log.warning("out of memory: at most %d segments at a time from now on", self.max_batch_size)

    def stopped(self) -> None:
        self.vocoder.close()
