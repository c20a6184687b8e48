"""Running scores: what every row is worth, given the rows chosen so far, without a B x B matrix.

A row's score is its own loss and what it adds to the loss of the chosen ones, learner minus reference or as the scoring
says. Choosing c more rows costs the products of c rows with all others, so that a whole selection costs
O(B * b * D) operations, whatever the number of chunks.

Shapes: B = super-batch, b = sub-batch, R = rows of one tile, c = newly chosen rows, D = embedding width.
"""

from typing import Protocol

import torch
from torch import Tensor

from jest_core.additive_scores import AdditiveScores
from jest_core.inputs import SignedModels
from jest_core.policy import SelectionPolicy
from jest_core.softmax_scores import SoftmaxScores
from jest_core.types import Embeddings, ExampleLosses
from jest_core.workers import Workers


class Scores(Protocol):
    """The float64 scores of a super-batch as rows are chosen."""

    def sums(self, rows: Tensor) -> Tensor:
        """The scores of `rows` (int64), given all rows chosen so far."""

    def add_chosen(self, chosen: Tensor, rows: Tensor) -> None:
        """Count the newly chosen rows in the scores of `rows`; the scores of other rows become meaningless.

        Rows that can no longer be chosen need no scores, and leaving them out saves their products.
        """

    def among(self, chosen: Tensor) -> Tensor:
        """The scores [b] of all chosen rows from the pairs between them alone. The scores of other rows are lost."""

    def num_terms(self, num_chosen: int) -> int:
        """How many pairs a score is the sum of, or 1 if it is no sum."""


def scores_of(models: SignedModels, policy: SelectionPolicy, size: int, workers: Workers) -> Scores:
    """The scores of B rows under a policy."""
    if not models or policy.loss == "per_example":
        return ExampleScores(models, size)
    if policy.loss == "softmax":
        embeddings = [(model, sign) for model, sign in models if isinstance(model, Embeddings)]
        return SoftmaxScores(embeddings, policy.precision, workers)
    return AdditiveScores(models, policy.precision, workers)


class ExampleScores:
    """Scores that do not depend on what is chosen: losses of single examples, or nothing at all."""

    def __init__(self, models: SignedModels, size: int) -> None:
        device = models[0][0].device if models else torch.device("cpu")
        self._sums_B = torch.zeros(size, dtype=torch.float64, device=device)
        for losses, sign in models:
            assert isinstance(losses, ExampleLosses)
            self._sums_B.add_(losses.values.detach(), alpha=sign)

    def sums(self, rows: Tensor) -> Tensor:
        """The scores of `rows`."""
        return self._sums_B[rows]

    def add_chosen(self, chosen: Tensor, rows: Tensor) -> None:
        """Changes nothing."""

    def among(self, chosen: Tensor) -> Tensor:
        """The same as `sums`."""
        return self._sums_B[chosen]

    def num_terms(self, num_chosen: int) -> int:
        """One, whatever is chosen."""
        del num_chosen
        return 1
