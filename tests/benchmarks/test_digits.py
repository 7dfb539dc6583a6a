"""The front of weights on digits: what validation chooses."""

from __future__ import annotations

from benchmarks import digits


def test_best_weight_is_that_of_the_best_mean_validation_score():
    rows = {
        "accuracy": {
            0.0: [0.98, 0.98],
            0.001: [0.97, 0.99],
            0.002: [0.98, 0.97],
            0.005: [0.95, 0.95],
            0.01: [0.9, 0.9],
        },
        "insertion": {0.0: [0.4, 0.4], 0.001: [0.7, 0.6], 0.002: [0.8, 0.7], 0.005: [0.77, 0.77], 0.01: [0.8, 0.8]},
        "1 - deletion": {0.0: [0.4, 0.4], 0.001: [0.7, 0.6], 0.002: [0.7, 0.8], 0.005: [0.8, 0.8], 0.01: [0.8, 0.8]},
    }
    # 2.76, 3.26, 3.45, 3.47 and 3.40
    assert digits.best_weight(rows) == 0.005
    rows["accuracy"][0.005] = [0.92, 0.92]  # 3.41
    assert digits.best_weight(rows) == 0.002
