"""One chi-square test for draws against a law that was worked out exactly."""

from collections import Counter
from collections.abc import Hashable, Mapping

from scipy import stats


def fit(draws: Counter, law: Mapping[Hashable, float]) -> float:
    """The p-value of the draws under the law; outcomes rarer than five expected draws are counted together."""
    assert not draws.keys() - law.keys(), "an outcome that the law does not allow"
    total = draws.total()
    common = [outcome for outcome, p in law.items() if p * total >= 5]
    observed = [draws[outcome] for outcome in common]
    expected = [law[outcome] * total for outcome in common]
    if len(common) < len(law):
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
    return float(stats.chisquare(observed, expected).pvalue)
