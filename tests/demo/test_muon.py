import pytest
import torch

from qwhisper.demo.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_a_step_is_that_of_torchs_muon_to_the_rounding_of_bf16(shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    gradients = torch.randn(4, *shape)
    optimizers = Muon([ours], lr=0.01), torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs.detach() - 1).norm()
    assert moved > 0.1
    assert (ours - theirs).detach().norm() < 0.05 * moved  # 5 iterations, each rounded to 8 bits


def test_singular_values_end_up_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(32, 48)))
    assert values.min() > 0.5 and values.max() < 1.5
