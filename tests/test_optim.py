"""The learning rate's rise and fall, and the clipped step, by hand."""

import pytest
import torch

from nanodistill import optim


def test_the_rate_rises_then_falls_to_its_last_share():
    rates = [optim.schedule(step, 10, 0.4, 0.1) for step in range(10)]
    # A quarter more per step; from the line 1 - 0.09 step where that is lower.
    assert rates == pytest.approx([0.25, 0.5, 0.75, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19])
    assert optim.schedule(0, 10, 0.0, 0.0) == 1.0


def test_a_step_is_clipped_to_the_norm_and_frees_the_gradients():
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    optim.set_rate([optimizer], 2.0)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert optim.clipped_step(model, [optimizer], 1.0).item() == 5.0
    assert model.weight.tolist() == [pytest.approx([-1.2, -1.6], abs=1e-5)]
    assert model.weight.grad is None


def test_matrices_and_vectors_are_stepped_apart_as_together():
    """An optimizer of `groups` takes the step that it would take of all parameters in one."""
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    one = torch.optim.AdamW(models[0].parameters(), lr=0.1)
    two = torch.optim.AdamW(optim.groups(models[1].parameters()), lr=0.1)
    assert [len(group["params"]) for group in two.param_groups] == [1, 3]
    for model, optimizer in zip(models, (one, two)):
        model(torch.arange(6.0).view(2, 3)).square().sum().backward()
        optim.clipped_step(model, [optimizer], 0.5)
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
