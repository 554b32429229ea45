"""Cuts a caption into sentences where a data set gives no prefixes."""

import hashlib
import re
from itertools import pairwise

_STOPS, _CLOSING, _OPENING = ".!?", "\"'”’)]}", "\"'“‘([{"
# A sentence never ends with one of these.
_TITLES = ("mr", "mrs", "ms", "dr", "prof", "st", "mt", "vs", "approx", "e.g", "i.e")
# A sentence ends with one of these only before a word that is not in lower case.
_UNITS = ("ft", "in", "yd", "oz", "lb", "lbs", "etc", "a.m", "p.m")

# The paper does not say how a caption is cut into sentences. This rule is part of the metric:
# results carry its digest, and another rule is another metric.
SENTENCE_RULE = (
    f"A sentence ends at white space after one of {' '.join(_STOPS)} and any closing quotes or "
    "brackets. It goes on (1) after such a quote or bracket, unless a letter that is not in lower "
    f"case, a digit, or an opening quote or bracket follows; (2) after {'. '.join(_TITLES)}.; (3) "
    f"before a letter in lower case after {'. '.join(_UNITS)}.; (4) after a number that begins "
    "it, as in a list, or that a digit follows; (5) after an initial between words that begin "
    "with a capital."
)
SENTENCE_RULE_SHA256 = hashlib.sha256(SENTENCE_RULE.encode()).hexdigest()
_WORD = re.compile(r"\S+")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text by SENTENCE_RULE, none of them empty. Takes linear time."""
    words = list(_WORD.finditer(text))
    if not words:
        return []
    sentences, start, before = [], words[0].start(), ""  # before: the word before, in the sentence
    for word, following in pairwise(words):
        if _ends(before, word[0], following[0]):
            sentences.append(text[start : word.end()])
            start, before = following.start(), ""
        else:
            before = word[0]
    return [*sentences, text[start : words[-1].end()]]


def _ends(before: str, word: str, following: str) -> bool:
    """Whether a sentence ends with `word`; `before` is "" where the sentence begins with it."""
    unquoted = word.rstrip(_CLOSING)
    bare = unquoted.rstrip(_STOPS)
    first = following[0]
    if bare == unquoted:
        return False
    if unquoted != word:
        return first in _OPENING or (first.isalnum() and not first.islower())
    if unquoted[len(bare) :] != ".":
        return True
    bare = bare.lstrip(_OPENING)
    if bare.isdecimal() and (not before or first.isdigit()):
        return False
    is_initial = len(bare) == 1 and bare.isupper() and first.isupper() and before[:1].isupper()
    lower = bare.lower()
    return not (is_initial or lower in _TITLES or (lower in _UNITS and first.islower()))
