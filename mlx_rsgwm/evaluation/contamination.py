"""Whether test questions stand among the training questions: word for word, with other numbers, or nearly.

Word for word means equal but for case, punctuation and spacing. ``numbers`` are the same words around other numbers:
for generated families that is their making, for a public data set it is a leak of the solution's form. ``near`` shares
at least ``SHARE`` of all word triples (Jaccard).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.data.corpus import load_corpus
from mlx_rsgwm.data.sources import Question

SHARE = 0.7
WORDS = 3


@dataclass(frozen=True)
class Match:
    """A test question, the training question it resembles most, how (exact, numbers, near) and their Jaccard share."""

    test: str
    train: str
    kind: str
    share: float


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"[a-z]+|\d+(?:\.\d+)?", text.lower().replace(",", ""))


def without_numbers(text: str) -> str:
    """The words of a text, every number as one sign."""
    return " ".join("#" if word[0].isdigit() else word for word in words(text))


def triples(text: str) -> frozenset[tuple[str, ...]]:
    """Runs of three words; a shorter text is one run."""
    found = words(text)
    return frozenset(tuple(found[start : start + WORDS]) for start in range(max(1, len(found) - WORDS + 1)))


def find_contamination(test: Sequence[Question], train: Mapping[str, str]) -> list[Match]:
    """The closest match of every test question that has one among ``train`` (id: question text).

    Candidates come from an index of word triples, so that the cost grows with what texts share and not with their
    product.
    """
    exact = {" ".join(words(text)): name for name, text in reversed(list(train.items()))}
    masked = {without_numbers(text): name for name, text in reversed(list(train.items()))}
    shingles = {name: triples(text) for name, text in train.items()}
    index: dict[tuple[str, ...], list[str]] = {}
    for name, found in shingles.items():
        for triple in found:
            index.setdefault(triple, []).append(name)
    matches = []
    for question in test:
        own = triples(question.question)
        shared = Counter(name for triple in own for name in index.get(triple, ()))
        best, share = "", 0.0
        for name, count in shared.most_common(50):
            jaccard = count / (len(own) + len(shingles[name]) - count)
            if jaccard > share:
                best, share = name, jaccard
        if (same := exact.get(" ".join(words(question.question)))) is not None:
            matches.append(Match(question.id, same, "exact", 1.0))
        elif (alike := masked.get(without_numbers(question.question))) is not None:
            matches.append(Match(question.id, alike, "numbers", share if best == alike else 0.0))
        elif share >= SHARE:
            matches.append(Match(question.id, best, "near", share))
    return matches


def contamination(test: Sequence[Question], train: Mapping[str, str]) -> dict[str, Any]:
    """Counts by kind, and the matches, for a report."""
    matches = find_contamination(test, train)
    counts = Counter(match.kind for match in matches)
    return {
        "test": len(test),
        "train": len(train),
        **{kind: counts[kind] for kind in ("exact", "numbers", "near")},
        "matches": [asdict(match) for match in matches],
    }


def training_questions(folders: Iterable[Path]) -> dict[str, str]:
    """Question texts of corpus folders by ``folder/row id``; a question used twice is there once."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for folder in folders:
        for row in load_corpus(folder).rows:
            if row.question not in seen:
                seen.add(row.question)
                found[f"{folder.name}/{row.id}"] = row.question
    return found
