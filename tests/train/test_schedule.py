import math

import pytest

from qwhisper.train.schedule import learning_rate_factor


@pytest.mark.parametrize(("step", "expected"), [(0, 0.2), (99, 0.2), (100, 1.0), (500, 1.0)])
def test_early_factor_holds_for_its_steps_and_no_longer(arguments, step, expected):
    args = arguments(early_lr_factor=0.2, early_lr_steps=100, lr_scheduler_type="constant")
    assert learning_rate_factor(step, args, 1000) == expected


def test_schedules_end_at_zero_and_warm_up_linearly(arguments):
    linear = arguments(early_lr_steps=0, lr_scheduler_type="linear", warmup_steps=10)
    assert [learning_rate_factor(s, linear, 110) for s in (0, 4, 9, 10, 60, 110)] == pytest.approx(
        [0.1, 0.5, 1, 1, 0.5, 0]
    )
    cosine = arguments(early_lr_steps=0, lr_scheduler_type="cosine", warmup_steps=0.1)
    assert learning_rate_factor(10, cosine, 100) == 1.0
    assert learning_rate_factor(55, cosine, 100) == pytest.approx(0.5)
    assert learning_rate_factor(40, cosine, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert learning_rate_factor(100, cosine, 100) == pytest.approx(0)
