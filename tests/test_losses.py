"""Fused losses against PyTorch's own operations on full logits, with an error budget in bf16."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nanodistill.losses as losses
from nanodistill.losses import linear_cross_entropy, linear_distillation, linear_logprobs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "BUDGET", 16 * 64 * 4)


def inputs(N, D, V, dtype=torch.float32, ignored=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=g)
    targets[torch.rand(N, generator=g) < ignored] = -100
    return hidden, weight, targets


def gradients(loss, *tensors):
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


SHAPES = [(1, 8, 3), (15, 7, 33), (16, 8, 64), (17, 24, 101), (100, 16, 257)]


@pytest.mark.parametrize("N, D, V", SHAPES)
def test_cross_entropy_equals_pytorch(N, D, V):
    hidden, weight, targets = inputs(N, D, V)
    targets[0] = 1
    fused = gradients(3 * linear_cross_entropy(hidden, weight, targets), hidden, weight)
    naive = gradients(3 * F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    for a, b in zip(fused, naive):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cross_entropy_of_ignored_targets_alone_is_zero():
    hidden, weight, targets = inputs(9, 8, 11, ignored=1.1)
    loss, dh, dw = gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    assert loss == 0 and not dh.any() and not dw.any()


@pytest.mark.parametrize("N, D, V", SHAPES)
def test_logprobs_equal_pytorch(N, D, V):
    hidden, weight, targets = inputs(N, D, V, ignored=0)
    coefficients = torch.randn(N, generator=torch.Generator().manual_seed(5))

    # As PPO's: not linear in the logprobs.
    def loss_of(logprobs):
        return (coefficients * logprobs.exp() + 0.1 * logprobs**2).sum()

    logprobs, entropy = linear_logprobs(hidden, weight, targets, temperature=0.7)
    full = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    expected = torch.distributions.Categorical(logits=full).entropy()
    torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=1e-4)
    fused = gradients(loss_of(logprobs), hidden, weight)
    naive = gradients(loss_of(full.gather(1, targets[:, None]).squeeze(1)), hidden, weight)
    torch.testing.assert_close(fused, naive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [-100, 7])
def test_logprobs_of_ignored_targets_are_0_and_the_others_are_pytorchs(index):
    """Values and gradients, against fp64, with NaN at the ignored ones."""
    hidden, weight, targets = inputs(45, 8, 33)
    targets = targets.masked_fill(targets == -100, index).view(5, 9)
    keep = targets != index
    assert 9 < keep.sum() < 36
    hidden = hidden.detach().view(5, 9, 8).masked_fill(~keep[..., None], torch.nan).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    full = torch.log_softmax(exact[0][keep] @ exact[1].T / 0.7, -1)
    expected = full.gather(1, targets[keep][:, None]).squeeze(1), -(full.exp() * full).sum(-1)
    both = linear_logprobs(hidden, weight, targets, 0.7, index)
    coefficients = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(5))
    for x, y in zip(both, expected):
        assert x.shape == (5, 9) and not x[~keep].any()
        torch.testing.assert_close(x[keep], y.float(), rtol=1e-4, atol=1e-4)
    fused = gradients(sum((c * x).sum() for c, x in zip(coefficients, both)), hidden, weight)
    naive = gradients(sum((c[keep] * x).sum() for c, x in zip(coefficients, expected)), *exact)
    assert not fused[1][~keep].any()
    for a, b in zip(fused, naive):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_logprobs_without_ignored_targets_are_the_same_in_any_shape_and_unsearched():
    hidden, weight, targets = inputs(45, 8, 33, ignored=0)

    def all_of(hidden, targets, index):
        logprobs, entropy = linear_logprobs(hidden, weight, targets, ignore_index=index)
        assert logprobs.shape == entropy.shape == targets.shape
        loss, dh, dw = gradients((logprobs.exp() + entropy).sum(), hidden, weight)
        return [logprobs.flatten(), entropy.flatten(), loss, dh.flatten(), dw]

    flat = all_of(hidden, targets, -100)
    for index in (-100, None):
        same = all_of(hidden.view(5, 9, 8), targets.view(5, 9), index)
        torch.testing.assert_close(same, flat, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("N, D, V", SHAPES)
@pytest.mark.parametrize("weights", [(1.0, 0.3), (0.0, 1.0), (None, 1.0)],
                         ids=["both", "entropy, logprobs times 0", "entropy alone"])
def test_entropy_has_the_gradient_of_pytorch(N, D, V, weights):
    hidden, weight, targets = inputs(N, D, V, ignored=0)

    def loss_of(logprobs, entropy):
        loss = weights[1] * (entropy**2).sum()
        return loss if weights[0] is None else weights[0] * (logprobs**2).sum() + loss

    logits = hidden @ weight.T / 0.7
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    fused = gradients(loss_of(*linear_logprobs(hidden, weight, targets, 0.7)), hidden, weight)
    naive = gradients(loss_of(logprobs, entropy), hidden, weight)
    torch.testing.assert_close(fused, naive, rtol=1e-4, atol=1e-4)


def divergences(student, teacher):
    """{kind: (N,)} of two logits (N, V), by PyTorch's kl_div."""
    s, t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    middle = ((s.exp() + t.exp()) / 2).log()

    # KL(p || q).
    def kl(p, q):
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return {"forward_kl": kl(t, s), "reverse_kl": kl(s, t),
            "jsd": 0.5 * kl(t, middle) + 0.5 * kl(s, middle)}


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("N, D, V", SHAPES)
def test_distillation_equals_pytorch(N, D, V, kind):
    hidden, weight, targets = inputs(N, D, V)
    targets[0] = 1
    mask = targets != -100
    teacher_hidden, teacher_weight, _ = inputs(N, D + 3, V, seed=1)
    loss = linear_distillation(hidden, weight, teacher_hidden, teacher_weight, kind, mask,
                               temperature=2.0)
    teacher_logits = (teacher_hidden @ teacher_weight.T).detach()                # (N, V)
    naive = divergences(hidden @ weight.T / 2, teacher_logits / 2)[kind][mask].mean()
    for a, b in zip(gradients(3 * loss, hidden, weight), gradients(3 * naive, hidden, weight)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    loss = linear_distillation(hidden, weight, teacher_hidden, teacher_weight, kind)
    loss.backward()
    assert loss > 0.01 and teacher_hidden.grad is None and teacher_weight.grad is None
    # A student that is its teacher has nothing to learn.
    same = gradients(linear_distillation(hidden, weight, hidden, weight, kind), hidden, weight)
    assert all(x.abs().max() < 1e-5 for x in same)


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@on_cuda
def test_on_cuda_chunks_of_bf16_are_summed_in_fp32_by_one_product_each():
    """In bf16 products alone would err by 1e-3 and more."""
    hidden, gradient = (torch.randn(640, n, generator=torch.Generator().manual_seed(n)).bfloat16()
                        for n in (64, 101))
    truth = gradient.double().T @ hidden.double()                                # (101, 64)
    hidden, gradient = hidden.cuda(), gradient.cuda()
    sums = losses._Gradients(hidden, torch.empty(101, 64, device="cuda"), (False, True))
    sums.weight.fill_(torch.nan)
    with Large(101 * 64) as large:
        for start in range(0, 640, 16):
            chunk = slice(start, start + 16)
            sums.add(start, hidden[chunk], None, gradient[chunk])
    assert large.calls == ["aten.addmm.dtype_out"] * 40 and len(large.found) == 1
    assert (sums.weight.cpu() - truth).norm() < 1e-5 * truth.norm()


@on_cuda
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_on_cuda_compiled_distillation_is_that_of_fp64_and_makes_no_second_logits(
        monkeypatch, kind):
    monkeypatch.setattr(losses, "WORTH_COMPILING", 1)
    student, teacher = (3 * torch.randn(32, 8192, generator=torch.Generator().manual_seed(seed))
                        for seed in (0, 1))
    student, teacher = student.bfloat16(), teacher.bfloat16()
    # Token 0 is as if it were not there.
    student[:, 0], teacher[:, 0] = -torch.inf, -torch.inf
    exact = student[:, 1:].double().requires_grad_()
    expected = divergences(exact / 2, teacher[:, 1:].double() / 2)[kind]       # (32,)
    wanted, = torch.autograd.grad(3 * expected.sum(), exact)
    half, three = torch.tensor(0.5).cuda(), torch.tensor(3.0).cuda()
    for _ in range(2):                             # the first call compiles
        logits, of_teacher = student.cuda(), teacher.cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = losses._distillation_(logits, of_teacher, half, three, kind)
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes
    torch.testing.assert_close(got.cpu(), expected.float(), rtol=1e-4, atol=1e-4)
    assert not logits[:, 0].any()
    # Rounded to bf16.
    torch.testing.assert_close(logits[:, 1:].cpu().double(), wanted, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_gradient_that_is_not_needed_is_not_computed(frozen):
    """With the head or the trunk frozen the other gradient is the same; without any gradient the
    loss is the same."""
    hidden, weight, targets = inputs(40, 8, 11, ignored=0)
    for loss_of in (lambda h, w: linear_cross_entropy(h, w, targets),
                    lambda h, w: linear_distillation(h, w, h.detach() + 1, w),
                    lambda h, w: linear_logprobs(h, w, targets)[0].mean()):
        tensors = [hidden, weight]
        loss, *both = gradients(loss_of(*tensors), *tensors)
        tensors[frozen] = tensors[frozen].detach()
        alone = gradients(loss_of(*tensors), tensors[1 - frozen])
        torch.testing.assert_close(alone, [loss, both[1 - frozen]], rtol=0, atol=0)
        with torch.no_grad():
            assert loss_of(hidden, weight) == loss and not loss_of(hidden, weight).requires_grad


def losses_of(hidden, weight, targets, teacher_hidden, teacher_weight):
    """{name: scalar} of every fused loss."""
    def both(use):
        return use(*linear_logprobs(hidden, weight, targets, 0.7)).sum()

    return {"cross-entropy": linear_cross_entropy(hidden, weight, targets),
            "logprobs": both(lambda logprobs, _: logprobs**2),
            "entropy": both(lambda _, entropy: entropy**2),
            "both": both(lambda logprobs, entropy: logprobs + entropy**2),
            **{kind: linear_distillation(hidden, weight, teacher_hidden, teacher_weight, kind)
               for kind in ("forward_kl", "reverse_kl", "jsd")}}


def test_tokens_with_logits_of_minus_infinity_are_as_if_they_were_not_there():
    """Values and gradients are those of the other tokens alone, by PyTorch."""
    hidden, weight, targets = (x.detach() for x in inputs(40, 8, 33, ignored=0))
    teacher_hidden, teacher_weight, _ = (x.detach() for x in inputs(40, 8, 33, seed=1))
    gone, rest = [4, 17, 32], [i for i in range(33) if i not in (4, 17, 32)]
    targets = torch.tensor(rest)[targets % 30]
    for h, w in ((hidden, weight), (teacher_hidden, teacher_weight)):
        h[:, 0], w[:, 0] = 1e25, 0.0
        # -1e50: beyond fp32.
        w[gone, 0] = -1e25
    assert (hidden @ weight.T)[:, gone].isneginf().all()
    fused = losses_of(hidden.requires_grad_(), weight.requires_grad_(), targets,
                      teacher_hidden, teacher_weight)
    logits, teacher = hidden @ weight[rest].T, teacher_hidden @ teacher_weight[rest].T
    where = torch.searchsorted(torch.tensor(rest), targets)[:, None]
    logprobs = torch.log_softmax(logits / 0.7, -1).gather(1, where).squeeze(1)
    entropy = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    expected = {"cross-entropy": F.cross_entropy(logits, where.squeeze(1)),
                "logprobs": (logprobs**2).sum(), "entropy": (entropy**2).sum(),
                "both": (logprobs + entropy**2).sum(),
                **{kind: x.mean() for kind, x in divergences(logits, teacher).items()}}
    for name, loss in fused.items():
        loss, dh, dw = gradients(loss, hidden, weight)
        value = expected[name].detach()
        dh_expected, dw_expected = torch.autograd.grad(expected[name], (hidden, weight),
                                                       retain_graph=True)
        assert dh.isfinite().all() and dw.isfinite().all() and not dw[gone].any(), name
        torch.testing.assert_close([loss, dh[:, 1:], dw[:, 1:]],
                                   [value, dh_expected[:, 1:], dw_expected[:, 1:]],
                                   rtol=1e-4, atol=1e-4)


def test_what_has_no_finite_answer_is_not_given_one():
    inf, nan, one = torch.inf, torch.nan, torch.ones(())
    _, entropy = losses._statistics(torch.tensor(
        [[0.0, 0.0, -inf], [5.0, -inf, -inf], [-inf, -inf, -inf], [0.0, nan, -inf]]), one)
    torch.testing.assert_close(entropy[:2], torch.tensor([math.log(2), 0.0]))
    # No token; no number.
    assert entropy[2:].isnan().all()
    flat, half = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -inf]])
    kl = losses._distillation_(student := flat.clone(), half, one, one, "forward_kl")
    # 1/2 against 1/3.
    torch.testing.assert_close(kl, torch.tensor([math.log(1.5)]))
    torch.testing.assert_close(student, torch.tensor([[-1 / 6, -1 / 6, 1 / 3]]))
    assert losses._distillation_(half.clone(), flat, one, one, "forward_kl") == inf
    assert losses._distillation_(flat.clone(), half, one, one, "reverse_kl") == inf
    assert losses._distillation_(flat.clone(), flat * nan, one, one, "jsd").isnan()
    # A target that cannot be sampled: its logprob is -inf, the entropy's gradient is not.
    hidden = torch.tensor([[1e25, 1.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 1.0], [0.0, 2.0], [-1e25, 0.0]])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([2]))
    # dH / dh = -p (1 - p).
    p = 1 / (1 + math.e)
    assert logprobs == -inf
    torch.testing.assert_close(torch.autograd.grad(entropy, hidden)[0],
                               torch.tensor([[0.0, -p * (1 - p)]]))


@pytest.mark.parametrize("first", [0, 1])
def test_a_second_derivative_is_an_error_and_not_nothing(first):
    """Of a penalty on the gradient alone, and of one beside what has a gradient anyway."""
    hidden, weight, targets = inputs(40, 8, 33, ignored=0)
    teacher_hidden, teacher_weight, _ = inputs(40, 8, 33, seed=1)
    both = hidden, weight
    for loss in losses_of(*both, targets, teacher_hidden, teacher_weight).values():
        gradient, = torch.autograd.grad(loss, both[first], create_graph=True)
        for total in (gradient.sum(), loss + gradient.pow(2).sum() + weight.sum()):
            with pytest.raises(RuntimeError, match="no second derivative"):
                total.backward(retain_graph=True)
            for to in both:
                with pytest.raises(RuntimeError, match="no second derivative"):
                    torch.autograd.grad(total, to, retain_graph=True)
        plain, = torch.autograd.grad(loss, both[first])
        assert not plain.requires_grad and torch.equal(plain, gradient)


def test_distillation_of_another_kind_is_an_error():
    hidden, weight, _ = inputs(4, 8, 11)
    with pytest.raises(ValueError, match="kl"):
        linear_distillation(hidden, weight, hidden, weight, "kl")


@pytest.mark.parametrize("N, D, V", [(17, 24, 101), (100, 64, 513)])
def test_bf16_errs_no_more_than_naive_bf16(N, D, V):
    hidden, weight, targets = inputs(N, D, V, torch.bfloat16)
    exact = [hidden.detach().float().requires_grad_(), weight]
    truth = gradients(F.cross_entropy(exact[0] @ weight.T, targets), *exact)
    logits = F.linear(hidden, weight.to(torch.bfloat16))
    naive = gradients(F.cross_entropy(logits, targets).float(), hidden, weight)
    fused = gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)

    def error(x, t):
        return (x.float() - t).norm() / t.norm()

    # Naive: about 3e-3 of the loss, 7e-3 of the gradients.
    for name, f, n, t in zip(("loss", "hidden", "weight"), fused, naive, truth):
        assert error(f, t) <= error(n, t) + 1e-3, name


def train(fused):
    """32 steps of a tiny language model on sequences that can be learned -> losses."""
    from conftest import random_model

    model = random_model(seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g, out = torch.Generator().manual_seed(4), []
    for _ in range(32):
        ids = (torch.randint(0, 96, (8, 1), generator=g) + torch.arange(20)) % 96
        if fused:
            loss = linear_cross_entropy(model.model(ids[:, :-1]), model.head, ids[:, 1:])
        else:
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def test_32_training_steps_equal_the_naive_ones():
    fused, naive = train(True), train(False)
    assert naive[-1] < 0.5 * naive[0]
    assert max(abs(a - b) for a, b in zip(fused, naive)) < 1e-3


def test_denominator_makes_accumulated_gradients_those_of_the_whole_batch():
    hidden, weight, targets = inputs(40, 8, 11)
    whole = gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    count = (targets != -100).sum()
    parts = sum(linear_cross_entropy(h, weight, t, count)
                for h, t in zip(hidden.split(10), targets.split(10)))
    for a, b in zip(gradients(parts, hidden, weight), whole):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunks, less", [(1, False), (4, False), (40, True)])
def test_bf16_weight_gradients_lose_nothing_in_the_sum(monkeypatch, chunks, less):
    """Summed over few chunks it errs as naive bf16; over many it is summed in fp32, and that is
    better than in bf16."""
    hidden, weight, targets = inputs(640, 64, 101, torch.bfloat16, ignored=0)
    weight = weight.detach().to(torch.bfloat16).requires_grad_()
    exact = [hidden.detach().float(), weight.detach().float().requires_grad_()]
    truth = gradients(F.cross_entropy(exact[0] @ exact[1].T, targets), exact[1])[1]

    def error(loss):
        return ((gradients(loss, weight)[1].float() - truth).norm() / truth.norm()).item()

    monkeypatch.setattr(losses, "BUDGET", 640 * 101 * 2 // chunks)
    monkeypatch.setattr(losses, "_count", lambda hidden, weight: chunks)
    fused = error(linear_cross_entropy(hidden, weight, targets))
    naive = error(F.cross_entropy(F.linear(hidden, weight).float(), targets))
    monkeypatch.setattr(losses._Gradients, "FEW", 100)
    in_bf16 = error(linear_cross_entropy(hidden, weight, targets))
    assert fused <= naive + 1e-3
    assert in_bf16 > 1.2 * fused if less else in_bf16 == fused


def every_loss(N, seed=0):
    """Values and gradients of each function and kind, of N tokens."""
    hidden, weight, targets = inputs(N, 8, 33, ignored=0, seed=seed)
    teacher_hidden, teacher_weight, _ = inputs(N, 5, 33, seed=1)
    with torch.no_grad():
        out = [linear_cross_entropy(hidden, weight, targets)]
    for loss in losses_of(hidden, weight, targets, teacher_hidden, teacher_weight).values():
        out += gradients(loss, hidden, weight)
    # An fp32 weight's gradient from bf16 products.
    bf16 = hidden.detach().bfloat16()
    return out + gradients(linear_cross_entropy(bf16, weight, targets), weight)


def test_kernels_compile_once_for_all_lengths_and_equal_eager_ones(monkeypatch):
    from torch._dynamo.utils import counters

    lengths = (1, 2, 7, 40, 41, 300)
    eager = [every_loss(N) for N in lengths]
    torch._dynamo.reset()
    losses.no_compiler("cpu")
    monkeypatch.setattr(losses, "WORTH_COMPILING", 1)
    counters.clear()
    for N, expected in zip(lengths, eager):
        torch.testing.assert_close(every_loss(N), expected, rtol=1e-4, atol=1e-5)
    # Normalizer; cross-entropy fp32, bf16; statistics; logprobs; entropy; values and gradients of
    # the kinds; add.
    kernels = 1 + 2 + 1 + 1 + 1 + 2 * 3 + 1
    # A lone token is a shape of its own.
    assert kernels <= counters["stats"]["unique_graphs"] <= 2 * kernels


class Large(TorchDispatchMode):
    """Memory of at least `size` elements that operators return inside, and their names."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found, self.calls = size, {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.size:
            self.found[result.untyped_storage()._cdata] = result
            self.calls.append(str(function))
        return result


def test_on_the_meta_device_two_chunks_take_what_compiled_kernels_take(monkeypatch):
    monkeypatch.setattr(losses, "WORTH_COMPILING", 1)
    hidden, weight = (torch.zeros(n, 1, device="meta", requires_grad=True) for n in (400, 64))
    targets = torch.zeros(400, dtype=torch.long, device="meta")
    chunks = [logits.shape for _, logits, _ in losses._chunks(weight.detach(), hidden.detach())]
    assert chunks == [(16, 64)] * 2

    # One buffer a pass, and one of the teacher's logits.
    for buffers, loss_of in (
            (1, lambda: linear_cross_entropy(hidden, weight, targets, ignore_index=None)),
            (2, lambda: sum(linear_logprobs(hidden, weight, targets)).sum()),
            (2, lambda: linear_logprobs(hidden, weight, targets)[0].sum()),
            (2, lambda: linear_distillation(hidden, weight, hidden, weight, "jsd"))):
        with Large(16 * 64) as large:
            loss_of().backward()
        assert len(large.found) == buffers
        assert hidden.grad.shape == (400, 1) and weight.grad.shape == (64, 1)


def test_without_a_compiler_the_loss_is_the_same_and_says_so_once(tmp_path):
    code = """if True:
        import torch, warnings, nanodistill.losses as losses
        losses.WORTH_COMPILING = 1
        torch.manual_seed(0)
        hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4)
        targets = torch.randint(0, 5, (9,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                loss = losses.linear_cross_entropy(hidden, weight, targets)
        assert torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, targets))
        said = ["torch.compile does not work here" in str(w.message) for w in caught]
        assert sum(said) == 1, caught"""
    env = {**os.environ, "CXX": str(tmp_path / "none"),
           "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_a_loss_kept_for_another_backward_gives_the_same_gradient_again():
    hidden, weight, targets = inputs(40, 8, 11)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = [g.clone() for g in torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)]
    again = list(torch.autograd.grad(2 * loss, (hidden, weight)))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight))
