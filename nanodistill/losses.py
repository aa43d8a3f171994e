"""Fused linear losses: from hidden states and the head's weight to a loss, without the (tokens x vocabulary) logits.

For Llama 3 the logits of 8,192 tokens take 4 GB in fp32, and their gradient as much again. Here they exist for `CHUNK` tokens at
a time. Three functions, of two kinds, since they need different things from backward:

    linear_cross_entropy   scalar losses (SFT; on-policy distillation). All gradients are computed during the forward pass, chunk by
    linear_distillation    chunk: right only because nothing but a scale can come between such a loss and `backward()`.
    linear_logprobs        log-probability of each target and entropy of each distribution (PPO). What multiplies each token's gradient is
                           known only in backward, so the chunk's logits are computed again there.

The arithmetic inside a chunk runs through torch.compile on CUDA (chunks have one shape, so it compiles once) and eagerly on CPU.
Logits are matrix products in the dtype of `hidden`; softmax, losses and sums are fp32. Gradients of the head are summed in fp32.
The idea: Liger-Kernel (arXiv 2410.10989), Cut Cross-Entropy (arXiv 2411.09009). This file imports torch only and can be copied out alone.
"""

import functools
import math

import torch
import torch.nn.functional as F

CHUNK = 1024                                                       # tokens whose logits exist at once


def _logits(hidden, weight, temperature):
    return F.linear(hidden, weight.to(hidden.dtype)).float() / temperature   # (n, V) fp32


def _logprobs_chunk(hidden, weight, targets, temperature):
    """(n, D), (V, D), (n,) -> logprobs (n,), entropy (n,)."""
    logits = _logits(hidden, weight, temperature)
    normalizer = logits.logsumexp(dim=-1)
    logprobs = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - normalizer
    probabilities = (logits - normalizer.unsqueeze(1)).exp()
    return logprobs, normalizer - (probabilities * logits).sum(dim=-1)       # H = log Z - E[logit]


def _products(gradient, hidden, weight, needs):
    """From the gradient of the logits (n, V) those of hidden (n, D) and, in fp32, of weight (V, D); None where `needs` (two bools) says so."""
    gradient = gradient.to(hidden.dtype)
    return gradient @ weight.to(hidden.dtype) if needs[0] else None, (gradient.T @ hidden).float() if needs[1] else None


def _gradient_chunk(hidden, weight, targets, temperature, needs, scale, entropy_scale=None):
    """Gradients of sum(scale * logprobs + entropy_scale * entropy), as `_products` gives them."""
    logits = _logits(hidden, weight, temperature)
    probabilities = logits.softmax(dim=-1)
    gradient = -probabilities
    gradient.scatter_add_(1, targets.unsqueeze(1), torch.ones_like(targets, dtype=torch.float32).unsqueeze(1))
    gradient = gradient * (scale / temperature).unsqueeze(1)
    if entropy_scale is not None:                                  # d H / d logit = -p (log p + H)
        logprobs = logits.log_softmax(dim=-1)
        surprise = logprobs - (probabilities * logprobs).sum(dim=-1, keepdim=True)
        gradient = gradient - probabilities * surprise * (entropy_scale / temperature).unsqueeze(1)
    return _products(gradient, hidden, weight, needs)


def _cross_entropy_chunk(hidden, weight, targets, needs, scale):
    """Losses (n,), and the gradients of sum(scale * loss), as `_products` gives them: from the same logits."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()     # (n, V)
    normalizer = logits.logsumexp(dim=-1)
    losses = normalizer - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    if not any(needs):
        return losses, None, None
    gradient = (logits - normalizer.unsqueeze(1)).exp()
    gradient.scatter_add_(1, targets.unsqueeze(1), torch.full_like(normalizer, -1.0).unsqueeze(1))
    return losses, *_products(gradient * scale.unsqueeze(1), hidden, weight, needs)


def _distillation_chunk(hidden, weight, teacher_hidden, teacher_weight, temperature, needs, scale, kind):
    """Divergence of each token (n,), and the gradients of sum(scale * divergence), as `_products` gives them."""
    student = _logits(hidden, weight, temperature).log_softmax(dim=-1)           # (n, V), as teacher
    teacher = _logits(teacher_hidden, teacher_weight, temperature).log_softmax(dim=-1)
    probabilities = student.exp()
    if kind == "forward_kl":
        divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)
        gradient = probabilities - teacher.exp()
    else:
        # Both are sum_v p_v f_v + a part whose gradient is within f: d / d logit = p (f - E[f]).
        middle = teacher if kind == "reverse_kl" else torch.logaddexp(student, teacher) - math.log(2)
        f = (student - middle) * (1.0 if kind == "reverse_kl" else 0.5)
        mean = (probabilities * f).sum(dim=-1)
        divergence = mean if kind == "reverse_kl" else mean + 0.5 * (teacher.exp() * (teacher - middle)).sum(dim=-1)
        gradient = probabilities * (f - mean.unsqueeze(1))
    return divergence, *_products(gradient * (scale / temperature).unsqueeze(1), hidden, weight, needs)


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def _run(function, hidden, *args):
    return (_compiled(function) if hidden.is_cuda else function)(hidden, *args)


def _chunks(hidden, targets, *more):
    """Slices of CHUNK tokens; on CUDA the last one is filled up, so that each has the same shape. Yields (n real, slices)."""
    for parts in zip(*(x.split(CHUNK) for x in (hidden, targets, *more))):
        real = len(parts[1])
        if hidden.is_cuda and real < CHUNK:
            parts = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, CHUNK - real)) for x in parts]
        yield real, parts


class _Gradients:
    """Collects the chunks' gradients of hidden and weight, as far as they are needed."""

    def __init__(self, hidden, weight, needs):
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        self.dtype, self.start = weight.dtype, 0

    def add(self, real, hidden, weight):
        if hidden is not None:
            self.hidden.narrow(0, self.start, real).copy_(hidden.narrow(0, 0, real))
        if weight is not None:
            self.weight += weight
        self.start += real

    def both(self):
        return self.hidden, None if self.weight is None else self.weight.to(self.dtype)


class _Scalar(torch.autograd.Function):
    """A loss whose gradients are known when it is: backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, hidden_gradient, weight_gradient):
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return *(None if x is None else gradient.to(x.dtype) * x for x in ctx.saved_tensors), None, None, None


def _needs(hidden, weight):
    return (hidden.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)


def linear_cross_entropy(hidden, weight, targets, denominator=None, ignore_index=-100):
    """Cross-entropy of softmax(hidden @ weight.T) against targets, as one fp32 scalar.

    Args:
        hidden: (..., D). weight: (V, D). targets: (...) int64; those equal to `ignore_index` count for nothing.
        denominator: what the summed loss is divided by, a number or a tensor; None: the targets that count in this call. With
            gradient accumulation give the whole batch's count, so that 1 or 4 micro-batches have the same gradient.
    """
    keep = targets.flatten() != ignore_index
    hidden, targets = hidden.flatten(0, -2)[keep], targets.flatten()[keep]   # (N, D), (N,)
    denominator, needs = max(len(targets), 1) if denominator is None else denominator, _needs(hidden, weight)
    with torch.no_grad():
        loss, gradients = torch.zeros((), device=hidden.device), _Gradients(hidden, weight, needs)
        scale = torch.ones(len(targets), device=hidden.device) / denominator
        for real, (h, t, s) in _chunks(hidden, targets, scale):
            losses, *products = _run(_cross_entropy_chunk, h, weight, t, needs, s)
            loss += losses.narrow(0, 0, real).sum()
            gradients.add(real, *products)                         # a filled-up row has scale 0 and adds nothing
    return _Scalar.apply(hidden, weight, loss / denominator, *gradients.both())


def linear_distillation(hidden, weight, teacher_hidden, teacher_weight, kind="forward_kl", mask=None, temperature=1.0, denominator=None):
    """Divergence between teacher's and student's next-token distributions, softmax(hidden @ weight.T / temperature), as one fp32 scalar.

    Args:
        hidden (..., D), weight (V, D): the student's, which get gradients. teacher_hidden (..., E), teacher_weight (V, E): the teacher's, which get none.
        kind: "forward_kl", KL(teacher || student), which covers what the teacher does; "reverse_kl", KL(student || teacher), which seeks one
            thing that it does; "jsd", the mean of both ones' KL to their average (arXiv 2306.13649, generalised JSD at 0.5).
        mask: (...) bool, True = a token that counts; None: all. denominator: as in `linear_cross_entropy`.
    Raises:
        ValueError: another kind.
    """
    if kind not in ("forward_kl", "reverse_kl", "jsd"):
        raise ValueError(f"kind is {kind!r}, not forward_kl, reverse_kl or jsd")
    hidden, teacher_hidden = hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
    if mask is not None:
        hidden, teacher_hidden = hidden[mask.flatten()], teacher_hidden[mask.flatten()]
    denominator, needs = max(len(hidden), 1) if denominator is None else denominator, _needs(hidden, weight)
    with torch.no_grad():
        loss, gradients = torch.zeros((), device=hidden.device), _Gradients(hidden, weight, needs)
        scale, temperature = torch.ones(len(hidden), device=hidden.device) / denominator, torch.tensor(float(temperature), device=hidden.device)
        for real, (h, s, t) in _chunks(hidden, scale, teacher_hidden):
            divergence, *products = _run(_distillation_chunk, h, weight, t, teacher_weight, temperature, needs, s, kind)
            loss += divergence.narrow(0, 0, real).sum()
            gradients.add(real, *products)
    return _Scalar.apply(hidden, weight, loss / denominator, *gradients.both())


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        temperature = torch.tensor(float(temperature), device=hidden.device)
        ctx.save_for_backward(hidden, weight, targets, temperature)
        ctx.set_materialize_grads(False)                           # None for an output that the loss does not use: no work for it
        parts = [[x.narrow(0, 0, real) for x in _run(_logprobs_chunk, h, weight, t, temperature)] for real, (h, t) in _chunks(hidden, targets)]
        logprobs, entropy = (torch.cat(x) for x in zip(*parts))
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, entropy_gradient):
        hidden, weight, targets, temperature = ctx.saved_tensors
        gradients, needs = _Gradients(hidden, weight, ctx.needs_input_grad), ctx.needs_input_grad[:2]
        gradient = torch.zeros_like(entropy_gradient) if gradient is None else gradient
        scales = [g.contiguous() for g in (gradient, entropy_gradient) if g is not None]
        for real, (h, t, *s) in _chunks(hidden, targets, *scales):
            gradients.add(real, *_run(_gradient_chunk, h, weight, t, temperature, needs, *s))
        return *gradients.both(), None, None


def linear_logprobs(hidden, weight, targets, temperature=1.0):
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and that distribution's entropy.

    hidden (N, D), weight (V, D), targets (N,) int64 -> logprobs (N,) fp32 and entropy (N,) fp32 in nats, both differentiable in hidden and
    weight.
    """
    return _Logprobs.apply(hidden, weight, targets, temperature)
