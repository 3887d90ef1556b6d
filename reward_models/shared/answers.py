"""Answers of vision-language models behind an endpoint, and rules that read numbers from them.

Each function here makes such a rule; a rule returns None for an answer that cannot be used.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

Read = Callable[["Answer"], list[float] | None]
"""Numbers from an answer; None if it cannot be used."""
LOWEST, HIGHEST = 1.0, 5.0
NUMBER = r"-?\d+(?:\.\d+)?"


@dataclass(frozen=True)
class Answer:
    """An answer of the model.

    Attributes:
        text: The whole text.
        first: Probabilities of the 20 most likely first tokens; empty if they were not requested.
    """

    text: str
    first: Mapping[str, float] = field(default_factory=dict)

    def share(self, words: Sequence[str]) -> list[float] | None:
        """How the probability of the first token is divided among words, summed over spellings.

        Args:
            words: In lower case, such as ``["yes", "no"]``.

        Returns:
            Shares that add up to 1; None if the words have less than half of the probability,
            because the model was then about to answer something else and the ratio means nothing.
        """
        masses = dict.fromkeys(words, 0.0)
        for token, probability in self.first.items():
            # Tokenizers mark a leading blank as U+2581 or U+0120.
            word = token.strip(" \n\t\u2581\u0120\"'*.,:!()").lower()
            if word in masses:
                masses[word] += probability
        mass = sum(masses.values())
        return [m / mass for m in masses.values()] if mass >= 0.5 else None


def read_grades(text: str, names: Sequence[str]) -> list[float] | None:
    """The last number in 1..5 after each name, or nothing if one is absent or out of range."""
    grades = []
    for name in names:
        # Possessive, so that no grade is read from the words "(1-5)" themselves.
        pattern = rf"{name}\s*+(?:\(1-5\))?+[\s:*=]*+({NUMBER})"
        found = re.findall(pattern, text, re.IGNORECASE)
        if not found or not LOWEST <= float(found[-1]) <= HIGHEST:
            return None
        grades.append(float(found[-1]))
    return grades


def grades_after(names: Sequence[str]) -> Read:
    """The last number in 1..5 after each name."""
    return lambda answer: read_grades(answer.text, names)


def share_mean(values: Mapping[str, float]) -> Read:
    """The mean of the values of words, by the probabilities of the words as the first token.

    Only the 20 most likely tokens are known; words among them that differ in case or blanks are
    summed. Nothing is read if the words have less than half of the probability.
    """

    def read(answer: Answer) -> list[float] | None:
        shares = answer.share(list(values))
        if shares is None:
            return None
        return [sum(s * v for s, v in zip(shares, values.values(), strict=True))]

    return read


def scores_in_list(number: int, low: float, high: float) -> Read:
    """The numbers of the last list after "score", as in ``{"reasoning": "...", "score": [20, 22]}``.

    There must be ``number`` of them, all in ``low..high``. The JSON around them may be broken, as
    quotes within the reasoning often make it.
    """
    pattern = re.compile(r"score[\"'\s]*:\s*\[([^\[\]]*)\]", re.IGNORECASE)

    def read(answer: Answer) -> list[float] | None:
        found = pattern.findall(answer.text)
        parts = found[-1].split(",") if found else []
        if len(parts) != number or not all(re.fullmatch(NUMBER, p.strip()) for p in parts):
            return None
        scores = [float(p) for p in parts]
        return scores if all(low <= s <= high for s in scores) else None

    return read


def rubric_scores(headings: Sequence[str], used: Sequence[int], optional: Collection[int]) -> Read:
    """The numbers after "## Score:" below some of the headings, each from 1 to 4.

    Args:
        headings: All headings in the order of the answer; text from "# Summary:" on is ignored.
        used: Which of them count.
        optional: Those of ``used`` that may be "N/A" or absent.
    """

    def read(answer: Answer) -> list[float] | None:
        text = answer.text.split("# Summary:")[0]
        places = [text.find(h) for h in headings]
        scores = []
        for n in used:
            if places[n] >= 0:
                later = [p for p in places if p > places[n]]
                block = text[places[n] : min(later, default=len(text))]
                found = re.findall(rf"## Score:\s*({NUMBER}|N/A)", block)
                if found and found[-1] != "N/A":
                    if not 1 <= float(found[-1]) <= 4:
                        return None
                    scores.append(float(found[-1]))
                    continue
            if n not in optional:
                return None
        return scores

    return read
