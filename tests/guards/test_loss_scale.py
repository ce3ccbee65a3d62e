from qwhisper.guards.state import GROWTH_STEPS, LossScale
from qwhisper.guards.state import LARGEST_SCALE as LARGEST
from qwhisper.guards.state import SMALLEST_SCALE as SMALLEST


def test_it_shrinks_to_one_and_says_when_it_can_no_more():
    scale, tries = LossScale(), 0
    while scale.shrink():
        tries += 1
    assert scale.scale == SMALLEST and 5 <= tries <= 12


def test_it_grows_again_after_steps_without_overflow_up_to_its_bound():
    scale = LossScale(scale=4.0)
    for _ in range(GROWTH_STEPS - 1):
        scale.step_taken()
    assert scale.scale == 4.0
    scale.step_taken()
    assert scale.scale == 8.0
    for _ in range(40 * GROWTH_STEPS):
        scale.step_taken()
    assert scale.scale == LARGEST


def test_an_overflow_starts_the_count_again():
    scale = LossScale(scale=16.0)
    for _ in range(GROWTH_STEPS - 1):
        scale.step_taken()
    scale.shrink()
    scale.step_taken()
    assert scale.scale == 4.0
