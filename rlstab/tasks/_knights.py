"""Knights, who always tell the truth, and knaves, who always lie."""

import random
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations, product
from typing import Any, ClassVar, Literal, final

from rlstab.tasks._checks import check_fields
from rlstab.tasks._task import EmbeddedTask, Problem

__all__ = ["KnightsAndKnaves"]

FEWEST, MOST = 3, 5
LETTERS = "ABCDE"
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve")
ANNOUNCED = "Answer:"

Kind = Literal["0", "1", "=", "/"]
KINDS: tuple[Kind, ...] = ("0", "1")
PAIR_KINDS: tuple[Kind, ...] = ("=", "/")
Claim = tuple[Kind, int, int]
"""What is said of whom: `0` a knave, `1` a knight, `=` of a kind, `/` not."""


@final
@dataclass(frozen=True, kw_only=True)
class KnightsAndKnaves(EmbeddedTask):
    """Tell knights, who say what is true, from knaves, who say what is false: `A:B1;B:B=C;C:A0?` gives `001`.

    Everyone says one thing: that another is a knight (`B1`) or a knave (`B0`), or that two are of a kind (`B=C`) or not
    (`B/C`). Exactly one answer is consistent; it has a digit for each person, 1 for a knight and 0 for a knave, in
    their order. The reward is 1 for it and 0 for anything else. Puzzles that differ only in who is who share a split.

    In English the same is said in sentences, and the answer follows `Answer:`, so that a model can think before it.

    Args:
        people: number of people, from 3 to 5; more are harder.
        language: `"symbols"`, for very small models, or `"english"`.

    Raises:
        ConfigError: if `people` is outside its range.

    Example:
        >>> task = KnightsAndKnaves(people=3)
        >>> task.prompts(1, seed=1)[0]
        {'prompt': 'A:B1;B:B=C;C:A0?', 'answer': '001'}
    """

    name: ClassVar[str] = "knights_and_knaves"
    answer_columns: ClassVar[tuple[str, ...]] = ("answer",)

    people: int = 3
    language: Literal["symbols", "english"] = "symbols"

    def __post_init__(self) -> None:
        check_fields(self, {"people": (FEWEST <= self.people <= MOST, f"between {FEWEST} and {MOST}")})

    @property
    def alphabet(self) -> str:
        """Letters, digits and signs of the symbols, or all that English needs."""
        if self.language == "english":
            return string.ascii_letters + "01 ,.:;'\n"
        return LETTERS[: self.people] + "01=/:;?"

    @property
    def completion_length(self) -> int:
        """Number of characters of the answer alone."""
        return len(self._solution("0" * self.people))

    def draw(self, rng: random.Random) -> Problem:
        """Draw who is who, then statements that fit, until nothing else fits them."""
        while True:
            kinds = rng.choices((False, True), k=self.people)
            claims = [
                rng.choice([claim for claim in said if _holds(claim, kinds) == kinds[person]])
                for person, said in enumerate(_possible_claims(self.people))
            ]
            if sum(_fits(other, claims) for other in product((False, True), repeat=self.people)) == 1:
                break
        answer = "".join(str(int(kind)) for kind in kinds)
        prompt = self._english(claims) if self.language == "english" else _symbols(claims) + "?"
        return Problem(
            prompt=prompt, solution=self._solution(answer), key=_canonical(claims), answer={"answer": answer}
        )

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """1 if the completion, or in English what follows its last `Answer:`, is the answer, else 0."""
        if self.language == "symbols":
            return float(completion == row["answer"])
        _, announced, given = completion.rpartition(ANNOUNCED)
        return float(bool(announced) and given.strip() == row["answer"])

    def _solution(self, answer: str) -> str:
        return f"{ANNOUNCED} {answer}" if self.language == "english" else answer

    def _english(self, claims: Sequence[Claim]) -> str:
        names = NAMES[: self.people]
        said = "\n".join(f"{name} says: {_sentence(claim)}" for name, claim in zip(names, claims, strict=True))
        return (
            f"{', '.join(names[:-1])} and {names[-1]} are each a knight, who only says what is true, or a knave, who "
            f"only says what is false.\n{said}\nWrite who is what after the word {ANNOUNCED} in the order "
            f"{', '.join(names)}, 1 for each knight and 0 for each knave.\n"
        )


@cache
def _possible_claims(people: int) -> list[list[Claim]]:
    """What each of so many people may say."""
    pairs: list[Claim] = [(kind, *pair) for pair in combinations(range(people), 2) for kind in PAIR_KINDS]
    return [
        [(kind, other, other) for other in range(people) if other != person for kind in KINDS] + pairs
        for person in range(people)
    ]


def _holds(claim: Claim, kinds: Sequence[bool]) -> bool:
    kind, first, second = claim
    if kind in KINDS:
        return kinds[first] == (kind == "1")
    return (kinds[first] == kinds[second]) == (kind == "=")


def _fits(kinds: Sequence[bool], claims: Iterable[Claim]) -> bool:
    return all(_holds(claim, kinds) == kind for claim, kind in zip(claims, kinds, strict=True))


def _symbols(claims: Sequence[Claim]) -> str:
    return ";".join(f"{LETTERS[person]}:{_said(claim)}" for person, claim in enumerate(claims))


def _said(claim: Claim) -> str:
    kind, first, second = claim
    return f"{LETTERS[first]}{kind}" if kind in KINDS else f"{LETTERS[first]}{kind}{LETTERS[second]}"


def _sentence(claim: Claim) -> str:
    kind, first, second = claim
    if kind in KINDS:
        return f"{NAMES[first]} is a {'knight' if kind == '1' else 'knave'}."
    alike = "are of the same kind" if kind == "=" else "are not of the same kind"
    return f"{NAMES[first]} and {NAMES[second]} {alike}."


def _canonical(claims: Sequence[Claim]) -> str:
    """The puzzle under the renaming that comes first: the same for all puzzles that differ only in who is who."""
    forms = (
        sorted(
            (new[person], kind, min(new[first], new[second]), max(new[first], new[second]))
            for person, (kind, first, second) in enumerate(claims)
        )
        for new in permutations(range(len(claims)))
    )
    return str(min(forms))
