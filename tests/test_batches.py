"""Packing by hand, and what a micro-batch of each stage sends to the device: one copy.

On the device "meta" a copy is an operator with a CPU tensor among its arguments and a meta tensor
as its result. Whatever would wait for a number of the device fails there: there is none.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import card, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_rl
import train_rm
import train_sft
from nanodistill import reward
from nanodistill.batches import on_device, pack, ranges
from nanodistill.model import CausalLM, Config, ScalarModel


ROWS, COUNTS = [[5, 6, 7, 3], [8, 3], [9, 10, 11, 12, 13, 3], [4, 9, 3]], [2, 1, 3, 1]


def test_packing_by_hand():
    packed = pack(ROWS[:3], counts=[2, 1, 3], more=([7, 7], range(3)))
    assert packed.ids.tolist() == [5, 6, 7, 3, 8, 3, 9, 10, 11, 12, 13, 3]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]
    # Rows of 6, the longest.
    assert packed.cells.tolist() == [0, 1, 2, 3, 6, 7, 12, 13, 14, 15, 16, 17]
    assert packed.last.tolist() == [2, 3, 5, 9, 10, 11] and packed.lengths == [4, 2, 6]
    assert [x.tolist() for x in packed.more] == [[7, 7], [0, 1, 2]]
    assert pack(ROWS[:3]).last.tolist() == [3, 5, 11]
    assert ranges([4, 0], [1, 3]).tolist() == [4, 0, 1, 2]


def test_lists_go_to_the_device_together_and_keep_their_dtype():
    for lists in ([[1, 2], [3]], [[True], [False, True]], [[0.1], torch.tensor([0.2, 0.3])]):
        parts = on_device("cpu", *lists)
        assert len({x.untyped_storage().data_ptr() for x in parts}) == 1
        for part, numbers in zip(parts, lists, strict=True):
            assert torch.equal(part, torch.as_tensor(numbers))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=card)])
def test_in_bf16_packed_rows_are_as_each_alone_in_values_and_gradients(device):
    """On a card flash attends without padding. Alone, in fp32 on the CPU, nothing is packed."""
    rows = [list(range(5, 5 + n)) for n in (17, 1, 30)]
    alone, packed = random_model(), random_model().to(device)
    packed.model.dtype = torch.bfloat16
    wanted = torch.cat([alone.model(torch.tensor([row]))[0] for row in rows])          # (N, D)
    got = packed.model(pack(rows, device))
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    for hidden in (wanted, got):
        (hidden.float() * weights.to(hidden.device)).sum().backward()

    def error(a, b):
        return ((a.float().cpu() - b).norm() / b.norm()).item()
    assert error(got.detach(), wanted.detach()) < 0.05
    theirs = dict(alone.named_parameters())
    for name, p in packed.named_parameters():
        if theirs[name].grad is not None:
            assert error(p.grad, theirs[name].grad) < 0.2, name


class Copies(TorchDispatchMode):
    """Counts copies from the CPU to the device."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        come = [x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        go = [x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.count += "cpu" in come and "meta" in go
        return out


def model_of(kind):
    with torch.device("meta"):
        model = kind(Config(96, 32, 48, 2, 4, 2, 8, max_position_embeddings=128))
    model.model.angles = model.model.angles.to("meta")
    return model


def sft(lm, _):
    train_sft.gradients(2, lm, torch.optim.SGD([torch.ones(1)]),
                        [(row[:-n], row[-n:]) for row, n in zip(ROWS, COUNTS)])


def bce(_, scalar):
    examples = [train_rm.Example("q", len(row) - n, row, n == 1) for row, n in zip(ROWS, COUNTS)]
    train_rm.gradients(2, SimpleNamespace(rm_loss="bce", token_loss=0.5), scalar, [], examples)


def bt(_, scalar):
    pairs = [(row, row[::-1]) for row in ROWS]
    # Four sequences are two pairs.
    train_rm.gradients(4, SimpleNamespace(rm_loss="bt"), scalar, [], pairs)


PPO = SimpleNamespace(temperature=0.7, clip=0.2, value_clip=0.2, score="probability",
                      reward="model")


def ppo(lm, scalar):
    grids = [torch.zeros(4, 3, device="meta") for _ in range(4)]
    experience = train_rl.Experience(ROWS, COUNTS, grids[0].bool(), *grids)
    train_rl.gradients(2, PPO, (lm, None, None, scalar), [], [3, 1, 0, 2], experience)
    assert lm.head.grad.is_meta and scalar.score.weight.grad.is_meta


def describe(lm, scalar):
    train_rl.describe(2, PPO, (lm, lm, scalar, scalar), ROWS, COUNTS, ROWS)


def score(_, scalar):
    reward.score(scalar, ROWS[:2]), reward.score(scalar, ROWS[2:])


@pytest.mark.parametrize("stage, copies", [
    (sft, 1), (bce, 1), (bt, 1), (score, 1), (ppo, 1),
    # The reward model reads other rows than the other three.
    (describe, 2)])
def test_a_micro_batch_takes_one_copy_and_no_number_of_the_device(stage, copies):
    models = model_of(CausalLM), model_of(ScalarModel)
    with Copies() as seen:
        stage(*models)
    # Two micro-batches of two responses each, or of two pairs.
    assert seen.count == 2 * copies


def test_copies_are_counted():
    with Copies() as seen:
        torch.tensor([1]).to("meta"), torch.zeros(1, device="meta").copy_(torch.ones(1))
        on_device("meta", [1], [2, 3])
    assert seen.count == 3
    with pytest.raises(RuntimeError):
        torch.zeros((), device="meta").item()
