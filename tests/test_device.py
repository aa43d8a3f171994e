"""CUDA without a card: losses, a decode step and a PPO update on fake tensors of another device.

Fake tensors have shapes and devices but no values. Code fails on them where it waits for the
device (`.item()`, a boolean mask as an index), and where it left a tensor on the CPU. A CPU build
of PyTorch has no autograd and no indexing for the device "cuda". The device "meta" has both.
"""

from dataclasses import replace

import pytest
import torch
from conftest import random_model
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from nanodistill import generate, ppo
from nanodistill.batches import KVCache, pack
from nanodistill.losses import linear_cross_entropy, linear_distillation, linear_logprobs
from nanodistill.model import CausalLM, Config, ScalarModel


DEVICE = "meta"


@pytest.fixture(autouse=True)
def fake():
    # torch.tensor(..., device="meta") makes a tensor that is not a fake one.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def inputs(N=70, D=16, V=40):
    hidden = torch.randn(N, D, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, D, device=DEVICE, requires_grad=True)
    return hidden, weight, torch.zeros(N, dtype=torch.long, device=DEVICE)


def fake_model(kind):
    with torch.device(DEVICE):
        return kind(Config(96, 32, 48, 2, 4, 2, 8, max_position_embeddings=128))


@pytest.mark.parametrize("loss", ["cross-entropy", "forward_kl", "reverse_kl", "jsd", "logprobs"])
def test_losses_stay_on_the_device(loss):
    hidden, weight, targets = inputs()
    if loss == "cross-entropy":
        value = linear_cross_entropy(hidden, weight, targets, ignore_index=None)
    elif loss == "logprobs":
        logprobs, entropy = linear_logprobs(hidden, weight, targets, 0.7)
        value = (logprobs.exp() + entropy).sum()
    else:
        value = linear_distillation(hidden, weight, hidden, weight, loss)
    value.backward()
    assert value.device.type == hidden.grad.device.type == weight.grad.device.type == DEVICE


def test_a_decode_step_stays_on_the_device():
    model, B = fake_model(CausalLM), 5
    model.model.angles = model.model.angles.to(DEVICE)
    cache = KVCache(model.config, B, 64, DEVICE, torch.float32)
    slots = generate.Slots.empty(B, 32, 0, DEVICE)
    with torch.no_grad():
        generate.decode_step(model, cache, slots, torch.tensor([1, 2], device=DEVICE))
    assert slots.tokens.shape == (B, 32) and slots.done.device.type == DEVICE


def test_a_ppo_update_stays_on_the_device(fake):
    policy, value_model = fake_model(CausalLM), fake_model(ScalarModel)
    optimizer = torch.optim.AdamW([*policy.parameters(), *value_model.parameters()], foreach=True)
    rows, counts = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]], [2, 1, 3]
    # The host counts before anything goes to the device.
    with unset_fake_temporarily():
        packed = pack([row[:-1] for row in rows], counts=counts)
    tensors = {name: getattr(packed, name).to(DEVICE)
               for name in ("ids", "positions", "cells", "last")}
    packed = replace(packed, **tensors)
    old, advantages, returns = (torch.zeros(6, device=DEVICE) for _ in range(3))
    every = torch.ones(6, dtype=torch.bool, device=DEVICE)
    targets = torch.zeros(6, dtype=torch.long, device=DEVICE)
    hidden = policy.model(packed).index_select(0, packed.last)
    logprobs, _ = linear_logprobs(hidden, policy.head, targets)
    loss, _ = ppo.policy_loss(logprobs, old, advantages, every, denominator=6)
    loss.backward()
    values = value_model(packed).index_select(0, packed.last)
    ppo.value_loss(values, old, returns, every, denominator=6).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    assert policy.head.grad.device.type == DEVICE
    grid = torch.zeros(3, 3, device=DEVICE)
    scores = torch.zeros(3, device=DEVICE)
    ppo.gae(ppo.shape_rewards(scores, grid, grid, grid.bool(), 0.1), grid, grid.bool())
    ppo.whiten(grid, grid.bool())


def test_these_tests_can_fail():
    """Ignored targets are searched for on the device, a value is read, a tensor lies elsewhere."""
    hidden, weight, targets = inputs()
    with pytest.raises(DynamicOutputShapeException):
        linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(DataDependentOutputException):
        linear_logprobs(hidden, weight, targets)[0].sum().item()
    with pytest.raises(RuntimeError, match="device"):
        linear_cross_entropy(hidden, weight, torch.zeros(70, dtype=torch.long), ignore_index=None)


def test_the_decode_step_and_the_losses_are_each_one_graph():
    """fullgraph=True fails where Python would have to look at a value.

    The graph runs eagerly here: what compiles it is not the question.
    """
    with unset_fake_temporarily():
        def loss(hidden, weight, targets):
            logprobs, entropy = linear_logprobs(hidden, weight, targets)
            cross_entropy = linear_cross_entropy(hidden, weight, targets, ignore_index=None)
            return cross_entropy + logprobs.sum() + entropy.sum()

        torch.manual_seed(0)
        hidden = torch.randn(9, 4, requires_grad=True)
        weight = torch.randn(7, 4, requires_grad=True)
        targets = torch.randint(0, 7, (9,))
        expected = torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(hidden, weight, targets), (hidden, weight))
        torch.testing.assert_close(got, expected)

        model = random_model()
        cache = KVCache(model.config, 3, 16, "cpu", torch.float32)
        slots = generate.Slots.empty(3, 8, 0, "cpu")
        slots.temperature += 1
        slots.done[:] = False
        step = torch.compile(generate.decode_step, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            step(model, cache, slots, torch.tensor([1]))
        assert slots.count.tolist() == slots.position.tolist() == [1, 1, 1]


def test_a_compiler_does_not_copy_the_cache():
    """Traced, a write into a slice of a tensor becomes a select_scatter, which copies all of it."""
    with unset_fake_temporarily():
        model, called = random_model(), []

        def look(graph, _):
            called.extend(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        cache = KVCache(model.config, 3, 16, "cpu", torch.float32)
        slots = generate.Slots.empty(3, 8, 0, "cpu")
        with torch.no_grad():
            torch.compile(generate.decode_step, fullgraph=True, backend=aot_autograd(
                fw_compiler=look))(model, cache, slots, torch.tensor([1]))
    assert sum("index_put" in name for name in called) >= 2 * len(cache.k)
    assert not [name for name in called if "scatter" in name and "select" in name]
