"""What `make run-<worker>` prints of a real model's answer."""

from tools.demos import Utterance, side_by_side


def test_words_stand_beside_what_was_said_then() -> None:
    utterances = [
        Utterance("A", 1.0, 2.0, "Hello there."),
        Utterance("B", 2.5, 3.0, "Hi."),
        Utterance("A", 4.0, 5.0, "Bye."),
    ]
    words = [("Hello", 0.9, 1.4), ("where?", 1.5, 2.1), ("Buy.", 3.8, 4.9)]
    shown = side_by_side(
        [{"word": word, "start": start, "end": end} for word, start, end in words], utterances
    )
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[1:] == [
        "0.90 2.10 Hello where? 1.00 2.00 Hello there.",
        "2.50 3.00 Hi.",
        "3.80 4.90 Buy. 4.00 5.00 Bye.",
    ]
