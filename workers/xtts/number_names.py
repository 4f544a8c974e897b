"""Names of numbers and units that num2words lacks or has wrong."""

from __future__ import annotations

from pathlib import Path

UNITS: dict[str, dict[str, tuple[str, str]]] = {}
"""By language and sign: the forms of the unit, and of its hundredth (empty: read as a decimal number).

Forms are separated by `/`. Those that start with `=` are read for 1 and 2, numeral included; then come the
plurals: one, or few and many, in Russian singular, few and many. `^`: read before the number.
"""
for _line in (Path(__file__).parent / "units.tsv").read_text("utf-8").splitlines()[1:]:
    _language, _sign, _unit, _subunit = (_line + "\t").split("\t")[:4]
    UNITS.setdefault(_language, {})[_sign] = (_unit, _subunit)
JOIN = {
    "en": ", ", "es": " con ", "fr": " et ", "de": " und ", "it": " e ", "pt": " e ", "pl": ", ", "tr": " ",
    "ru": ", ", "nl": ", ", "cs": ", ", "ar": " و ", "hu": " ", "ko": " ", "ja": "", "hi": " ",
}  # fmt: skip
"""Between a unit and its hundredths."""
MINUS = {
    "en": "minus", "es": "menos", "fr": "moins", "de": "minus", "it": "meno", "pt": "menos", "pl": "minus",
    "tr": "eksi", "ru": "минус", "nl": "min", "cs": "mínus", "ar": "سالب", "zh": "负", "hu": "mínusz",
    "ko": "마이너스", "ja": "マイナス", "hi": "माइनस",
}  # fmt: skip
DECIMAL_MARK = {"es": "coma", "tr": "virgül", "ar": "فاصلة", "hi": "दशमलव", "cs": "celých"}
_HINDI = (
    "शून्य एक दो तीन चार पाँच छह सात आठ नौ दस ग्यारह बारह तेरह चौदह पंद्रह सोलह सत्रह अठारह उन्नीस "
    "बीस इक्कीस बाईस तेईस चौबीस पच्चीस छब्बीस सत्ताईस अट्ठाईस उनतीस "
    "तीस इकतीस बत्तीस तैंतीस चौंतीस पैंतीस छत्तीस सैंतीस अड़तीस उनतालीस "
    "चालीस इकतालीस बयालीस तैंतालीस चवालीस पैंतालीस छियालीस सैंतालीस अड़तालीस उनचास "
    "पचास इक्यावन बावन तिरपन चौवन पचपन छप्पन सत्तावन अट्ठावन उनसठ "
    "साठ इकसठ बासठ तिरसठ चौंसठ पैंसठ छियासठ सड़सठ अड़सठ उनहत्तर "
    "सत्तर इकहत्तर बहत्तर तिहत्तर चौहत्तर पचहत्तर छिहत्तर सतहत्तर अठहत्तर उन्यासी "
    "अस्सी इक्यासी बयासी तिरासी चौरासी पचासी छियासी सत्तासी अट्ठासी नवासी "
    "नब्बे इक्यानवे बानवे तिरानवे चौरानवे पचानवे छियानवे सत्तानवे अट्ठानवे निन्यानवे"
)
HINDI = _HINDI.split()  # 0 to 99
_CZECH = (
    "nultý první druhý třetí čtvrtý pátý šestý sedmý osmý devátý desátý jedenáctý dvanáctý třináctý "
    "čtrnáctý patnáctý šestnáctý sedmnáctý osmnáctý devatenáctý dvacátý třicátý čtyřicátý padesátý šedesátý "
    "sedmdesátý osmdesátý devadesátý"
)
CZECH_ORDINALS = dict(zip([*range(21), *range(30, 100, 10)], _CZECH.split(), strict=True))
KOREAN_UNITS = ("", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉")
KOREAN_TENS = ("", "열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔")
