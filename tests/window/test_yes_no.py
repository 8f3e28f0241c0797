"""Free answers are cut into words as nltk.word_tokenize cuts them; what it says of these was written down (nltk 3.10, punkt_tab)."""

import pytest

from laid_eval.window.yes_no import yes_no_words

BOTH, YES, NO, NEITHER = {"yes", "no"}, {"yes"}, {"no"}, set()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Yes.", YES), ("YES!", YES), ("no", NO), ("No, there is not", NO), ("yes and no", BOTH), ("Yes. No. x", BOTH),
        ("No. The image has a cat.", NO), ("No.\n\nThe", NO), ("yes.\nno", BOTH), ("**Yes**", YES), ('"Yes"', YES),
        ("'yes'", YES), ("(no)", NO), ("[No]", NO), ("<yes>", YES), ("\\boxed{Yes}", YES), ("`yes`", YES),
        ("“Yes.”", YES), ("\u2018no\u2019", NO), ("yes...", YES), ("no..", NO), ("yes;no", BOTH), ("yes?no", BOTH), ("yes—the", YES),
        ("yes:", YES), ("Answer:no.", NO), ("no--no", NO), ("- yes", YES), ("yes%", YES), ("$yes$", YES), ("Yes's", YES),
        ("yes'", YES), ('No." he said', NO), ("yes.) ok", YES), ("No. 5", NO), ("yes\u00a0no", BOTH), ("no . ok", NO),
        ("yes/no", NEITHER), ("no-one", NEITHER), ("Nope", NEITHER), ("don't know", NEITHER), ("cannot", NEITHER),
        ("none", NEITHER), ("_yes_", NEITHER), ("no:1", NEITHER), ("yes,2", NEITHER), ("no.5", NEITHER),
        ("No.The", NEITHER), ("A.No", NEITHER), ("yes-", NEITHER), ("yes=", NEITHER), ("no|yes", NEITHER),
        ("yes\u200b", NEITHER), ("no.,", NEITHER), ("", NEITHER), ("NoNoNo", NEITHER),
    ],
)  # fmt: skip
def test_words_are_those_of_the_published_scoring(said, words):
    assert yes_no_words(said) == words
