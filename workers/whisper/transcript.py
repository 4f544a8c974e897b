"""What was recognised: the segments and words of windows, chunks and jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .alignment import token_starts
from .engine import DecodeResult
from .schemas import Segment, Word
from .segments import TokenSegment, compression_ratio
from .tokenizer import WhisperTokenizer
from .words import (
    MIN_WORD_S,
    Seconds,
    TimedWord,
    cut_at_pauses,
    cut_at_sentence_ends,
    fit_in_segment,
    join_punctuation,
    trim_to_speech,
    typical_lengths,
)


@dataclass
class Transcript:
    """The speech recognised in a chunk, or in all chunks of a job.

    segment_words: the words of each segment; empty lists without word timestamps.
    duration: of the audio, in seconds.
    """

    language: str | None
    language_probability: float | None = None
    segments: list[Segment] = field(default_factory=list)
    segment_words: list[list[Word]] = field(default_factory=list)
    duration: float = 0.0

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()

    @property
    def words(self) -> list[Word]:
        return [word for words in self.segment_words for word in words]

    def append(self, chunk: Transcript) -> None:
        """Add what comes next; the language is that of the first speech."""
        if chunk.segments and not self.segments:
            self.language, self.language_probability = chunk.language, chunk.language_probability
        self.segments += chunk.segments
        self.segment_words += chunk.segment_words

    def add_window(
        self,
        result: DecodeResult,
        segments: Sequence[TokenSegment],
        tokenizer: WhisperTokenizer,
        *,
        start: float,
        speech: Sequence[Seconds],
        word_timestamps: bool,
    ) -> float:
        """Append the segments of a window, and their words, and return when the last word ends.

        A segment whose words have no length is left out: it repeats an earlier one.
        start: of the window, in seconds of the audio; speech: the same. Takes some milliseconds of CPU.
        """
        ratio = compression_ratio(tokenizer.decode(result.tokens))
        starts = [start + seconds for seconds in token_starts(result)]
        texts = [[token for token in tokens if token < tokenizer.eot] for _, _, tokens in segments]
        timed: list[list[TimedWord]] = []
        used = 0  # text tokens of the segments before
        for tokens in texts:
            timed.append(_timed_words(tokenizer.split_to_words(tokens, self.language), starts[used:]))
            used += len(tokens)
        words = [word for group in timed for word in group]
        lengths = typical_lengths(words)
        cut_at_sentence_ends(words, lengths)
        for (first, last, tokens), text_tokens, group in zip(segments, texts, timed, strict=True):
            text = tokenizer.decode(text_tokens)
            if not text.strip():
                continue
            times = trim_to_speech(start + first, start + last, speech)
            joined = join_punctuation(group)
            for word in joined:
                cut_at_pauses(word, speech)
            if joined:
                after = self.segments[-1].end if self.segments else start
                fitted = fit_in_segment(joined, *times, after=after, lengths=lengths)
                if fitted[1] - fitted[0] <= MIN_WORD_S * (len(joined) - 1):
                    continue
                times, joined = (fitted, joined) if word_timestamps else (times, [])
            self.segment_words.append(
                [Word(word=word.text, start=round(word.start, 3), end=round(word.end, 3)) for word in joined]
            )
            self.segments.append(
                Segment(
                    id=0,
                    seek=round(start * 100),
                    start=round(times[0], 3),
                    end=round(times[1], 3),
                    text=text,
                    tokens=tokens,
                    temperature=result.temperature,
                    avg_logprob=round(result.avg_logprob, 4),
                    compression_ratio=round(ratio, 3),
                    no_speech_prob=round(result.no_speech_prob, 6),
                )
            )
        return max((word.end for word in words), default=start)


def _timed_words(words: Sequence[tuple[str, int]], starts: Sequence[float]) -> list[TimedWord]:
    """words: with how many tokens each has. starts: seconds of each token and of what follows, or nothing."""
    timed = []
    first = 0
    for text, count in words if starts else []:
        start, end = starts[first], starts[min(first + count, len(starts) - 1)]
        first += count
        timed.append(TimedWord(text, start, max(start, end)))
    return timed
