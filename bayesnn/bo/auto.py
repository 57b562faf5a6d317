"""The surrogate that predicts best: chosen by held-out scores, anew as the data grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bayesnn.evidence import Scores, choose, log_scores
from bayesnn.files import fingerprint
from bayesnn.model import Model
from bayesnn.registry import surrogate as surrogate_by_name, surrogates

CANDIDATES = ("gp", "nngp", "pfn")
FIRST, GROWTH = 10, 1.5  # rows at the first scores, and how much more there are at the next: 10, 15, 22, 33, 50, 75, …
REMEMBERED = 16  # selections, the latest


class Selection(NamedTuple):
    """Which surrogate was chosen, and why.

    Fields:
        name: the chosen one.
        num_rows: how many rows, the first ones, the scores are of; 0 where there are too few for any.
        scores: of all candidates, None where there are too few rows.
    """

    name: str
    num_rows: int
    scores: Scores | None


class AutoSurrogate:
    """Fits whichever of several surrogates predicts best what it hasn't seen; ``surrogate="auto"`` is this one's defaults.

    Candidates are scored by k-fold cross-validation (:func:`bayesnn.evidence.log_scores`) when there are 10, 15, 22, 33, 50,
    … rows, half as many again each time. In between the choice is kept, and fitted to all rows. It is a function of
    the first rows alone and nothing is kept but a cache, so that a search that was killed and goes on chooses as it would
    have. (Where several workers share a study, a slow trial takes its place among the first rows when it finishes.)

    The preferred candidate is kept unless another one's score is better by more than one standard error of the paired
    difference: the choice is then never much worse than it. With fewer than 10 rows nothing is scored, and it is used.

    Args:
        candidates: names among ``bayesnn.surrogates()``.
        prefer: the preferred one.
        num_folds: of the cross-validation; 5 (our choice: half the time of 10).

    Raises:
        ValueError: for names that no model has, or ``prefer`` not among the candidates.

    Example:
        >>> sampler = SurrogateSampler("auto")
        >>> sampler = SurrogateSampler(AutoSurrogate(["gp", "ensemble"]))
    """

    def __init__(self, candidates: Sequence[str] = CANDIDATES, prefer: str = "gp", num_folds: int = 5) -> None:
        unknown = sorted(set(candidates) - set(surrogates()))
        if unknown:
            raise ValueError(f"candidates must be among {', '.join(surrogates())}, found {', '.join(unknown)}")
        if prefer not in candidates:
            raise ValueError(f"prefer must be one of the candidates {', '.join(candidates)}, found {prefer!r}")
        self.candidates, self.prefer, self.num_folds = tuple(candidates), prefer, num_folds
        self._selections: dict[str, Selection] = {}

    def __call__(self, X: Tensor, Y: Tensor, seed: int = 0) -> Model:
        """The chosen surrogate, fitted to all rows.

        Args:
            X: features (n, d) in the unit cube.
            Y: values (n, m).
            seed: of the fit. The choice doesn't depend on it.
        """
        return surrogate_by_name(self.select(X, Y).name).fit(X, Y, seed=seed)

    def select(self, X: Tensor, Y: Tensor) -> Selection:
        """Which surrogate is best for these rows, from the scores of the first of them.

        Raises:
            RuntimeError: if no candidate can be scored.
        """
        num_rows = num_scored(len(X))
        if num_rows == 0:
            return Selection(self.prefer, 0, None)
        X, Y = X[:num_rows], Y[:num_rows]
        key = fingerprint(X, Y)
        if key not in self._selections:
            models = {name: surrogate_by_name(name) for name in self.candidates}
            scores = log_scores(models, X, Y, num_folds=self.num_folds)
            while len(self._selections) >= REMEMBERED:
                self._selections.pop(next(iter(self._selections)), None)
            self._selections[key] = Selection(choose(scores, self.prefer), num_rows, scores)
        return self._selections[key]

    def record(self, X: Tensor, Y: Tensor) -> dict[str, Any]:
        """What to write down of a selection, as JSON: the name, the scores, and how many rows these are of."""
        name, num_rows, scores = self.select(X, Y)
        found: dict[str, Any] = {}
        if scores is not None:
            for candidate in scores.by_row:
                mean, error = scores.mean(candidate), scores.standard_error(candidate)
                finite = {"mean": round(mean, 6), "standard_error": round(error, 6)}
                reason = scores.failures.get(candidate, "the density of a row is zero")
                found[candidate] = finite if mean > -float("inf") else {"failure": reason}
        return {"surrogate": name, "surrogate_scores": found, "surrogate_scored_on": num_rows}


def num_scored(num_rows: int) -> int:
    """The last of 10, 15, 22, 33, 50, 75, … that isn't above the number of rows; 0 if there is none."""
    size, last = float(FIRST), 0
    while int(size) <= num_rows:
        size, last = size * GROWTH, int(size)
    return last
