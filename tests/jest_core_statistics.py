"""One chi-square test for draws against a law that was worked out exactly."""

from collections import Counter
from collections.abc import Hashable, Mapping

from scipy import stats


def fit(draws: Counter, law: Mapping[Hashable, float]) -> float:
    """The p-value of the draws under the law; rare outcomes are counted together until five of them are expected."""
    assert not draws.keys() - law.keys(), "an outcome that the law does not allow"
    total = draws.total()
    observed, expected = [0], [0.0]
    for outcome in sorted(law, key=law.__getitem__):
        if expected[-1] >= 5:
            observed.append(0)
            expected.append(0.0)
        observed[-1] += draws[outcome]
        expected[-1] += law[outcome] * total
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    return float(stats.chisquare(observed, expected).pvalue)
