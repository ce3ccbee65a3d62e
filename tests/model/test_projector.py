import itertools
import math

import pytest
import torch
from torch import nn

from qwhisper.model.audio_layout import stack_groups
from tests.small import small_model


def projector_of(**config_values):
    model = small_model(**config_values)
    return model, model.model.multi_modal_projector


def groups_of(lengths: list[int]) -> torch.Tensor:
    ends = list(itertools.accumulate(lengths, initial=0))
    return stack_groups(list(itertools.pairwise(ends)), 4, nothing=ends[-1])


def test_weights_are_xavier_uniform_times_the_init_scale():
    model, projector = projector_of()
    model.config.projector_init_scale = 0.1
    projector.apply(model._init_weights)
    for layer in (projector.linear_1, projector.linear_2):
        bound = 0.1 * math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert abs(layer.weight.std() / (bound / math.sqrt(3)) - 1) < 0.05
        assert not layer.bias.any()
    assert projector.norm.weight.eq(1).all()


def test_a_model_from_bases_has_that_bound(joined):
    model, _ = joined
    layer = model.model.multi_modal_projector.linear_1
    bound = 0.1 * math.sqrt(6 / (layer.in_features + layer.out_features))
    assert 0.97 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("lengths", [[1], [4], [5, 8, 3]])
def test_each_window_gives_ceil_of_its_frames_over_the_stack(lengths):
    _, projector = projector_of()
    frames = torch.randn(sum(lengths), 16)
    tokens = projector(frames, groups_of(lengths))
    assert tokens.shape == (sum(math.ceil(n / 4) for n in lengths), 32)
    alone = torch.cat([projector(piece, groups_of([len(piece)])) for piece in frames.split(lengths)])
    torch.testing.assert_close(tokens, alone)


def test_the_last_group_is_filled_with_zeros():
    _, projector = projector_of()
    frames = torch.randn(5, 16)
    filled = torch.cat([frames, torch.zeros(3, 16)])
    torch.testing.assert_close(projector(frames, groups_of([5])), projector(filled, groups_of([8])))


def test_computes_in_fp32_under_autocast_and_from_bf16_frames():
    _, projector = projector_of()
    frames = torch.randn(6, 16).bfloat16()
    expected = projector(frames.float(), groups_of([6]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = projector(frames, groups_of([6]))
        assert nn.functional.linear(frames, frames).dtype == torch.bfloat16
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, expected)


def test_projector_scale_multiplies_the_output():
    torch.manual_seed(0)
    _, plain = projector_of()
    torch.manual_seed(0)
    _, scaled = projector_of(projector_scale=0.5)
    frames = torch.randn(4, 16)
    torch.testing.assert_close(scaled(frames, groups_of([4])), 0.5 * plain(frames, groups_of([4])))


def test_projector_dropout_drops_its_share_of_the_input_in_training_alone():
    model, projector = projector_of(projector_dropout=0.5)
    seen = []
    projector.linear_1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    frames = torch.randn(4000, 16)
    model.eval()
    projector(frames, groups_of([4000]))
    model.train()
    projector(frames, groups_of([4000]))
    kept = seen[1] != 0
    # 64,000 draws: five standard deviations of their mean.
    assert kept.float().mean() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(64_000))
    torch.testing.assert_close(seen[1][kept], 2 * seen[0][kept])
    assert seen[0].ne(0).all()
