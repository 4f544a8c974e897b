"""Numbers, amounts and ordinals as the words of a language.

The library reads numbers too, but a text fails with one that num2words refuses; it reads amounts without a
space only, and no digits but 0 to 9. Here each number is read by itself, so that the library finds no digit.
In Chinese it still reads years, fractions and telephone numbers.
"""

from __future__ import annotations

import re
import unicodedata
from functools import partial
from typing import Any

from num2words import num2words
from TTS.tts.layers.xtts.zh_num2words import num2chn

from .number_names import (
    CZECH_ORDINALS,
    DECIMAL_MARK,
    HINDI,
    JOIN,
    KOREAN_TENS,
    KOREAN_UNITS,
    MINUS,
    UNITS,
)

_POINT = frozenset(("en", "zh", "ja", "ko", "hi", "ar"))  # 1,234.5; in the others 1.234,5
_SPACED = frozenset(("es", "fr", "de", "it", "pt", "pl", "ru", "nl", "cs", "hu"))  # 1 234 is one number
_UNSPACED = frozenset(("zh", "ja"))
_NUMBER = r"\d+(?:[.,]\d+)*"
_SPACE_GROUPS = re.compile(r"(?<![\d.,] )(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?!\d)")
_SPACE_GROUPS_AND_SIGN = re.compile(rf"{_SPACE_GROUPS.pattern}(?=(?:[.,]\d+)? ?[$€£¥₹₽₺₩])")
_MAGNITUDE = r"(?P<magnitude> (?:(?:[MmBb]|[Tt]r)[iy]l+[ijhy][oaõó]|мил+и)\w*)?"
_SIGN = r"(?:R\$|[$€£¥₹₽₺₩])"
_QUANTITY = re.compile(
    rf"(?P<minus>(?<![^\s(])[-−])?(?:(?P<before>{_SIGN}|%(?=\d)) ?)?"
    rf"(?P<minus2>(?<![^\s(€$£])[-−])?(?P<number>{_NUMBER}){_MAGNITUDE}(?: ?(?P<after>{_SIGN}|[%°]))?"
)
_ORDINALS = {
    "en": r"(st|nd|rd|th)\b",
    "es": r"(\.?[ºª]|er\b|[oa]\b)",
    "fr": r"(ers?|res?|[eè]mes?|nde?|e)\b",
    "de": r"\.(?=\s+\w)",
    "it": r"([ºª]|°(?= [^\WA-Z]))",
    "pt": r"(\.?[ºª]|[oa]\b)",
    "pl": r"\.(?=\s+[^\W\d])",
    "tr": r"(\.(?=\s+[^\W\d])|['’]?(?:[ıiuü]nc[ıiuü]|nc[ıiuü])\b)",
    "ru": r"-(ый|ий|й|ая|я|ое|ье|е|ого|го)\b",
    "nl": r"(de|ste|e)\b",
    "cs": r"\.(?=\s+[^\W\d])",
    "hu": r"(\.(?=\s+[^\W\d])|-?[aeoö]?dik\b|-?ik\b)",
    "ko": r" ?(번째|째)",
}
_ORDINAL = {
    language: re.compile(rf"(?<![\d.,])(\d{{1,9}}){suffix}") for language, suffix in _ORDINALS.items()
}
_OBLIQUE = re.compile(r"\b(am|dem|den|zum|vom|im|beim|des)\s$", re.IGNORECASE)  # German: am dritten
_CZECH_MONTH = re.compile(r"\s+(led|únor|břez|dub|květ|červ|srp|zář|říj|listopad|prosin)", re.IGNORECASE)
_TURKISH_PART = re.compile(
    r"(milyon|milyar|trilyon|katrilyon|bin|yüz|on|yirmi|otuz|kırk|elli|altmış|yetmiş|seksen|doksan|"
    r"bir|iki|üç|dört|beş|altı|yedi|sekiz|dokuz|sıfır|eksi|virgül)(?=[a-zıöüşç])"
    r"(?!inci|nci|ıncı|üncü|uncu|ncı)"
)
_CZECH_HUNDREDS = re.compile(r"(dvě)(stě)|(tři|čtyři)(sta)|(pět|šest|sedm|osm|devět)(set)")
_YEAR = re.compile(r"1[1-9]\d\d|20[1-9]\d")
_BEFORE_A_YEAR = {
    "en": re.compile(
        r"\b(in|since|by|until|till|from|of|before|after|during|year|early|mid|late|summer|winter|spring|autumn|"
        r"fall|(jan|febr)uary|march|april|may|june|july|august|(septem|octo|novem|decem)ber)"
        r"( \d\d?(st|nd|rd|th)?,?)?[ -]$|\b(1[1-9]|20)\d\d[-–]$",
        re.IGNORECASE,
    ),
    "de": re.compile(""),  # 1500 people are fifteen hundred there too
    "nl": re.compile(""),
}
_COUNTED = re.compile(r"(?<![\d.,])(\d{1,2}) ?(개|명|살|마리|시간|시|잔|권|번|대)(?!째)")  # native numerals


def read_numbers(text: str, language: str) -> str:
    """`text` with its numbers, amounts, percentages and degrees in words. language: `zh` for `zh-cn`."""
    text = "".join(str(unicodedata.digit(c)) if unicodedata.category(c) == "Nd" else c for c in text)
    text = text.translate({0x66A: "%", 0x66B: ".", 0x66C: ",", 0xFF05: "%", 0xFFE5: "¥", 0xFF04: "$"})
    text = text.replace("US$", "$")
    text = re.sub(r"(?<=\d)['’](?=\d{3}(?!\d))", "", text)
    grouped = _SPACE_GROUPS if language in _SPACED else _SPACE_GROUPS_AND_SIGN
    text = grouped.sub(lambda match: match[0].replace(" ", ""), text)
    if language == "ko":
        text = _COUNTED.sub(_counted, text)
    if language in _ORDINAL:
        text = _ORDINAL[language].sub(partial(_ordinal, language=language), text)
    text = _QUANTITY.sub(partial(_quantity, language=language), text)
    for sign, (names, _) in sorted(UNITS[language].items(), reverse=True):  # R$ before $
        if sign not in "$£%°" or language in _UNSPACED:  # the library reads these
            name = names.split("/")[-1].removeprefix("^")
            text = text.replace(sign, name if language in _UNSPACED else f" {name} ")
    return " ".join(re.sub("[¥₹₽₺₩−]", " ", text).split())


# ---- quantities ------------------------------------------------------------------------------------------


def _quantity(match: re.Match[str], language: str) -> str:
    if language == "zh" and _is_left_to_the_library(match):
        return match[0]
    sign = match["before"] or match["after"] or ""
    if sign and sign not in UNITS[language]:
        sign = ""
    whole, fraction = _parse(match["number"], language)
    if whole is None:  # a date, a version, a list
        joint = ", " if "," in match[0] else " "
        words = joint.join(cardinal(part, language) for part in re.split("[.,]", match["number"]))
    elif sign:
        words = _amount(whole, fraction, sign, language, match["magnitude"] or "")
    elif match.group() == whole and _is_year(match, language):
        words = str(num2words(int(whole), lang=language, to="year"))
    else:
        words = _number(whole, fraction, language) + (match["magnitude"] or "")
    if match["minus"] or match["minus2"]:
        words = MINUS[language] + ("" if language in _UNSPACED else " ") + words
    begin, end = match.span()
    if language not in (*_UNSPACED, "ko", "hi", "ar"):  # 5kg, B2
        before, after = match.string[begin - 1 : begin], match.string[end : end + 1]
        words = " " * before.isalpha() + words + " " * after.isalpha()
    return words


def _is_year(match: re.Match[str], language: str) -> bool:
    before = _BEFORE_A_YEAR.get(language)
    return bool(before and _YEAR.fullmatch(match[0]) and before.search(match.string[: match.start()]))


def _is_left_to_the_library(match: re.Match[str]) -> bool:
    """Years, fractions, ranges, times and telephone numbers."""
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    plain = match["number"].isdigit() and not (match["before"] or match["after"])
    year = after == "年" and len(match[0]) == 4
    return plain and (year or before in ("/", "-", ":") or after in ("/", "-", ":") or len(match[0]) > 8)


def _parse(number: str, language: str) -> tuple[str | None, str]:
    """The whole part and the fraction; None for what is no number, such as 1.2.3."""
    marks, parts = re.findall("[.,]", number), re.split("[.,]", number)
    if not marks:
        return number, ""
    group = "," if language in _POINT else "."
    grouped = re.fullmatch(r"[1-9]\d{0,2}([.,]\d{2,3})*", "".join(number.rsplit(marks[-1], 1)[0]))
    if len(set(marks)) == 1:
        thousands = grouped and len(parts[-1]) == 3 and (len(marks) > 1 or marks[0] == group)
        if thousands:
            return "".join(parts), ""
        return (parts[0], parts[1]) if len(marks) == 1 else (None, "")
    if grouped and marks.count(marks[-1]) == 1:
        return "".join(parts[:-1]), parts[-1]
    return None, ""


def _amount(whole: str, fraction: str, sign: str, language: str, magnitude: str) -> str:
    """magnitude: such as ` million`, between the number and the sign's name."""
    names, subunit = UNITS[language][sign]
    if subunit and not magnitude and 1 <= len(fraction) <= 2:
        hundredths = str(int(fraction.ljust(2, "0")))
        parts = [(whole, names)] if int(whole) or hundredths == "0" else []
        parts += [(hundredths, subunit)] if hundredths != "0" else []
        return JOIN[language].join(_count(number, unit, language) for number, unit in parts)
    if not magnitude and not fraction.strip("0"):
        return _count(whole, names, language)
    plurals = [name for name in names.split("/") if name[0] != "="]
    few = language in ("ru", "cs") and fraction and len(plurals) > 1
    return _with_unit(_number(whole, fraction, language) + magnitude, plurals[-2 if few else -1], language)


def _count(whole: str, names: str, language: str) -> str:
    """names: see UNITS."""
    exact = [name[1:] for name in names.split("/") if name[0] == "="]
    plurals = [name for name in names.split("/") if name[0] != "="]
    count = int(whole)
    if 1 <= count <= len(exact):
        return exact[count - 1]
    last = count % 10 if not 10 < count % 100 < 20 else 0
    few = 2 <= (count if language == "cs" else last) <= 4
    form = -3 if len(plurals) == 3 and last == 1 else -2 if len(plurals) > 1 and few else -1
    return _with_unit(cardinal(whole, language), plurals[form], language)


def _with_unit(words: str, unit: str, language: str) -> str:
    if unit.startswith("^"):  # read before the number
        return f"{unit[1:]} {words}" if language not in _UNSPACED else unit[1:] + words
    return words + unit if language in _UNSPACED else f"{words} {unit}"


def _number(whole: str, fraction: str, language: str) -> str:
    if not fraction.strip("0"):
        return cardinal(whole, language)
    fraction = fraction.rstrip("0")
    if language == "zh":
        return str(num2chn(f"{int(whole)}.{fraction}"))
    if language not in DECIMAL_MARK:
        try:
            return _num2words(float(f"{whole}.{fraction}"), language)
        except Exception:
            return f"{cardinal(whole, language)} {_digits(fraction, language)}"
    mark = DECIMAL_MARK[language]
    if language == "cs":
        mark = "celá" if int(whole) in (0, 1) else "celé" if 2 <= int(whole) <= 4 else "celých"
    by_digit = language in ("es", "hi") or fraction[0] == "0" or len(fraction) > 3
    after = _digits(fraction, language) if by_digit else cardinal(fraction, language)
    return f"{cardinal(whole, language)} {mark} {after}"


# ---- words -----------------------------------------------------------------------------------------------


def cardinal(digits: str, language: str) -> str:
    """An integer in words; digit by digit with a leading zero, and beyond the numbers that have names."""
    if len(digits) > 1 and digits[0] == "0":
        return _digits(digits, language)
    try:
        return _cardinal(int(digits), language)
    except Exception:  # num2words has many for its limits
        return _digits(digits, language)


def _digits(digits: str, language: str) -> str:
    return ("" if language in _UNSPACED else " ").join(_cardinal(int(digit), language) for digit in digits)


def _cardinal(number: int, language: str) -> str:
    if language == "zh":
        return str(num2chn(str(number)))
    if language == "hi":
        return _hindi(number)
    words = _num2words(number, language)
    if language == "tr":
        return _TURKISH_PART.sub(r"\1 ", words)
    if language == "cs":
        return _CZECH_HUNDREDS.sub(lambda match: " ".join(filter(None, match.groups())), words)
    return words


def _num2words(number: float, language: str, **options: Any) -> str:
    """Portuguese is Brazil's, as the model speaks it. num2words separates its thousands by a comma."""
    if language != "pt":
        return str(num2words(number, lang=language, **options))
    return str(num2words(number, lang="pt_BR", **options)).replace(",", "")


def _hindi(number: int) -> str:
    if number < 100:
        return HINDI[number]
    for size, name in ((10**9, "अरब"), (10**7, "करोड़"), (10**5, "लाख"), (1000, "हज़ार"), (100, "सौ")):
        if number >= size:
            count, rest = divmod(number, size)
            return f"{_hindi(count)} {name}{' ' + _hindi(rest) if rest else ''}"
    raise AssertionError


def _counted(match: re.Match[str]) -> str:
    number = int(match[1])
    if not number:
        return match[0]
    words = "스무" if number == 20 else KOREAN_TENS[number // 10] + KOREAN_UNITS[number % 10]
    return f"{words} {match[2]}"


def _ordinal(match: re.Match[str], language: str) -> str:
    number, suffix = int(match[1]), match[0][len(match[1]) :]
    after = match.string[match.end() :]
    if suffix == "." and language != "de" and after.lstrip()[:1].isupper():
        return match[0]  # the end of a sentence
    try:
        if language == "cs":
            known = number in CZECH_ORDINALS
            parts = (number,) if known else (number // 10 * 10, number % 10)  # KeyError over 99
            words = " ".join(CZECH_ORDINALS[part] for part in parts)
            if _CZECH_MONTH.match(after):
                words = re.sub(r"ý\b", "ého", re.sub(r"í\b", "ího", words))
            return words
        options = {}
        if language == "ru":
            ending = suffix[-1]
            options = {"gender": {"я": "f", "е": "n"}.get(ending, "m"), "case": "g" if ending == "о" else "n"}
        words = _num2words(number, language, ordinal=True, **options)
    except Exception:  # num2words has many for its limits
        return match[0]
    if language == "de" and _OBLIQUE.search(match.string[: match.start()]):
        return words + "n"
    if language == "tr":
        return _TURKISH_PART.sub(r"\1 ", words)
    if language in ("es", "it", "pt") and suffix[-1] in "ªa":
        return re.sub(r"o\b", "a", words)
    if language == "fr" and number == 1 and suffix.startswith("re"):
        return "première"
    if language == "es" and suffix == "er":
        return words.removesuffix("o")
    return words
