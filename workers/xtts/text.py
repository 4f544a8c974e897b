"""From a text to the token ids of its segments: what cannot be spoken is removed, sentences are split."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from shared.errors import invalid
from shared.logs import log

from .numbers import read_numbers

SegmentEnd = Literal["paragraph", "sentence", "clause", "word"]

# A full stop after one of these, or after a single letter, ends no sentence.
ABBREVIATIONS = frozenset(
    word
    for words in (
        "mr mrs ms dr drs prof st sr jr co ltd inc gen col capt lt sgt rev hon maj esq ft",  # English
        "vs fig vol approx ca cf etc e.g i.e a.m p.m p.s",
        "sra sta dra ud uds av avda pag p.ej art",  # Spanish, Portuguese
        "mme mlle mm",  # French
        "hr fr bzw evtl ggf inkl usw bspw sog z.b d.h u.a",  # German
        "sig dott s.a",  # Italian
        "dhr mevr jhr",  # Dutch
        "ing",  # Czech, Polish
        "sw tel",  # Polish
        "byk nőv",  # Hungarian
        "г ул им руб тыс",  # Russian
    )
    for word in words.split()
)
NUMBER_WORDS = frozenset(("no", "nr", "núm", "č"))  # "no. 5", but "No. Not that."
_MAX_ABBREVIATION = 40  # characters, with the marks and the white space after it
_CLOSERS = "\"'\u2019\u201d»)\\]}」』）"
# Possessive, and from the first of several marks only: linear in the length of a run of marks.
_SENTENCE_END = re.compile(rf"(?:(?<![.!?…؟।])[.!?…؟।]++[{_CLOSERS}]*+(?=\s)|[。！？]++[{_CLOSERS}]*+)\s*+")
_CLAUSE_END = re.compile(r"[,;:،؛–—](?=\s)|[，、；：]")
_SPOKEN_SYMBOLS = frozenset("&@%#$£€°¥₹₽₺₩￥＄−")  # read_numbers and the library read these out
_GROUP_SPACE = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


@dataclass(frozen=True, slots=True)
class Segment:
    """A sentence or less. end: what ends it in the text."""

    text: str
    end: SegmentEnd


@dataclass(frozen=True, slots=True)
class TokenizedSegment:
    token_ids: list[int]
    end: SegmentEnd


def remove_unspeakable(text: str) -> str:
    """`text` without emoji, control characters and symbols that are not read out; line ends stay."""
    text = _GROUP_SPACE.sub("", unicodedata.normalize("NFC", text))
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2029", "\n")

    def replacement(character: str) -> str:
        if character in _SPOKEN_SYMBOLS or character == "\n":
            return character
        category = unicodedata.category(character)
        # Joiners and emoji selectors. Other marks belong to the letters of Arabic and Hindi.
        if category in ("Cf", "Me") or "\ufe00" <= character <= "\ufe0f":
            return ""
        return " " if category[0] in "SCZ" else character

    return "".join(map(replacement, text))


def split_text(text: str, limit: int) -> list[Segment]:
    """Segments of at most `limit` characters that hold all of `text` in order, each with a letter or digit.

    A text is split at line ends and sentence ends; a sentence over the limit after the last clause in the
    second half of what fits, else at a space, else anywhere.
    """
    segments: list[Segment] = []
    for paragraph in text.split("\n"):
        begin, first = 0, len(segments)
        for match in _SENTENCE_END.finditer(paragraph):
            end = match.end()
            before, after = paragraph[max(begin, end - _MAX_ABBREVIATION) : end], paragraph[end : end + 1]
            if _ends_sentence(before, after):
                segments += _split_sentence(paragraph[begin:end], limit)
                begin = end
        segments += _split_sentence(paragraph[begin:], limit)
        if len(segments) > first:
            segments[-1] = Segment(segments[-1].text, "paragraph")
    return segments


def _ends_sentence(before: str, after: str) -> bool:
    """Whether the mark at the end of `before` ends a sentence, and no abbreviation or ordinal number."""
    stripped = before.rstrip().rstrip(_CLOSERS)
    if not stripped.endswith(".") or stripped.endswith(".."):
        return True
    words = stripped[:-1].rsplit(None, 1)
    last = words[-1].lstrip("([{\"'«“„").lower() if words else ""
    if len(last) == 1 and last.isalpha():
        return False
    if last in NUMBER_WORDS:
        return not after.isdigit()
    ordinal = last.isdigit() and len(last) <= 2
    return not (last in ABBREVIATIONS or after.islower() or ordinal)


def _split_sentence(sentence: str, limit: int) -> list[Segment]:
    rest = " ".join(sentence.split())
    segments = []
    while len(rest) > limit:
        end: SegmentEnd = "word"
        if clauses := [match.end() for match in _CLAUSE_END.finditer(rest, limit // 2, limit)]:
            at, end = clauses[-1], "clause"
        elif (at := rest.rfind(" ", 1, limit + 1)) <= 0:
            at = limit
        segments.append(Segment(rest[:at].strip(), end))
        rest = rest[at:].strip()
    segments.append(Segment(rest, "sentence"))
    return [segment for segment in segments if _LETTER_OR_DIGIT.search(segment.text)]


def spoken_text(text: str, language: str) -> str:
    """A segment as the library's tokenizer takes it: numbers in words, lower case."""
    text = read_numbers(text, language.partition("-")[0]).replace("İ", "i")  # "İ".lower() is two characters
    return (text.replace("I", "ı") if language == "tr" else text).lower()


class TextTokenizer:
    """Texts as token ids. Not for several threads: dictionaries of some languages are not made for that.

    tokenizer: the library's VoiceBpeTokenizer. languages: those of the model. max_tokens: of a segment.
    """

    def __init__(self, tokenizer: Any, *, languages: Collection[str], max_tokens: int) -> None:
        self.tokenizer, self.languages, self.max_tokens = tokenizer, list(languages), max_tokens

    def encode(self, text: str, language: str) -> list[TokenizedSegment]:
        """Raises JobError for a language that the model lacks and for text that cannot be spoken."""
        if language not in self.languages:
            message = f"the model speaks {', '.join(self.languages)}, not {language}."
            raise invalid("language", message, "unsupported")
        limit: int = self.tokenizer.char_limits[language.partition("-")[0]]
        segments = split_text(remove_unspeakable(text), limit)
        if not segments:
            raise invalid("text", "there are no letters or digits in it. Send words.", "nothing_to_say")
        return [encoded for segment in segments for encoded in self._encode(segment, language)]

    def _encode(self, segment: Segment, language: str) -> list[TokenizedSegment]:
        token_ids = self._token_ids(spoken_text(segment.text, language), language)
        if len(token_ids) <= self.max_tokens or len(segment.text) < 2:
            return [TokenizedSegment(token_ids[: self.max_tokens], segment.end)]
        # Numbers that are read out can be much longer than written.
        halves = split_text(segment.text, (len(segment.text) + 1) // 2)
        halves[-1] = Segment(halves[-1].text, segment.end)
        return [encoded for half in halves for encoded in self._encode(half, language)]

    def _token_ids(self, text: str, language: str) -> list[int]:
        try:
            token_ids: list[int] = self.tokenizer.encode(text, lang=language)
        except Exception as error:  # its dictionaries raise errors of many kinds
            log.warning("text that cannot be read in %s: %r", language, error)
            message = f"{text[:60]!r} cannot be read in {language}. Spell it out."
            raise invalid("text", message, "bad_text") from None
        return token_ids
