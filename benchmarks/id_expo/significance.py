"""Paired tests over overlapping splits of one data set, and over many data sets at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import t as student

from benchmarks.digits import mean_and_error


def paired_p_value(a: Sequence[float], b: Sequence[float], overlap: float = 0.0) -> float:
    """Return the p-value of a paired, one-sided t-test that a exceeds b.

    Random splits of one data set share rows, so their scores are not independent. Nadeau and Bengio (2003) multiply the
    variance of the mean by 1 + n x `overlap`, with n splits and the ratio of test to training rows as the overlap.
    """
    if len(a) < 2:
        raise ValueError(f"A test needs two splits or more, given: {len(a)}.")
    mean, error = mean_and_error([x - y for x, y in zip(a, b, strict=True)])
    if error == 0:
        return 0.0 if mean > 0 else 1.0
    return float(student.sf(mean / (error * math.sqrt(1 + len(a) * overlap)), len(a) - 1))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return which of several hypotheses are rejected together at a level (Holm 1979).

    The smallest p-value is compared with level / n, the next with level / (n - 1), until one is larger.
    """
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected
