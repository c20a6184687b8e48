"""What a policy needs of those who train: whose losses count, and whether a reference model has to embed the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jest_core import SelectionPolicy

_MODELS = {
    "learnability": ("learner", "reference"),
    "easy_reference": ("reference",),
    "hard_learner": ("learner",),
    "uniform": (),
}


def models_that_count(policy: SelectionPolicy) -> tuple[str, ...]:
    """Whose losses the scoring uses: of `learner` and `reference`."""
    return _MODELS[policy.scoring]


def needs_reference_model(policy: SelectionPolicy) -> bool:
    """Whether a reference model has to embed the rows; losses of single examples come with the learner's."""
    return "reference" in models_that_count(policy) and policy.loss != "per_example"


def describe(policy: SelectionPolicy) -> str:
    """The two fields that decide what is needed, as errors name them."""
    return f"scoring {policy.scoring!r} under loss {policy.loss!r}"
