"""Fused linear losses: from hidden states and the head's weight to a loss, without the (tokens x vocabulary) logits.

For Llama 3 the logits of 8,192 tokens take 4 GB in fp32, and their gradient as much again. Here they exist for `CHUNK` tokens at
a time. Two functions, since they need different things from backward:

    linear_cross_entropy   a scalar loss (SFT). Both gradients are computed during the forward pass, chunk by chunk: right only because
                           nothing but a scale can come between this loss and `backward()`.
    linear_logprobs        log-probability of each target and entropy of each distribution (PPO). What multiplies each token's gradient is
                           known only in backward, so the chunk's logits are computed again there.

The arithmetic inside a chunk runs through torch.compile on CUDA (chunks have one shape, so it compiles once) and eagerly on CPU.
Logits are matrix products in the dtype of `hidden`; softmax, losses and sums are fp32. Gradients of the head are summed in fp32.
The idea: Liger-Kernel (arXiv 2410.10989), Cut Cross-Entropy (arXiv 2411.09009). This file imports torch only and can be copied out alone.
"""

import functools

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


def _gradient_chunk(hidden, weight, targets, temperature, scale):
    """Gradients of sum(scale * logprobs) with respect to hidden (n, D) and, in fp32, weight (V, D)."""
    logits = _logits(hidden, weight, temperature)
    gradient = -logits.softmax(dim=-1)
    gradient.scatter_add_(1, targets.unsqueeze(1), torch.ones_like(targets, dtype=torch.float32).unsqueeze(1))
    gradient = (gradient * (scale / temperature).unsqueeze(1)).to(hidden.dtype)  # d sum / d logits, (n, V)
    return gradient @ weight.to(hidden.dtype), (gradient.T @ hidden).float()


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


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, denominator):
        loss = torch.zeros((), device=hidden.device)
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        start, one = 0, hidden.new_ones((), dtype=torch.float32)
        scale = torch.full((len(targets),), -1.0, device=hidden.device) / denominator
        for real, (h, t, s) in _chunks(hidden, targets, scale):
            loss -= _run(_logprobs_chunk, h, weight, t, one)[0].narrow(0, 0, real).sum()
            dh, dw = _run(_gradient_chunk, h, weight, t, one, s)   # a filled-up row has scale 0 and adds nothing
            hidden_gradient.narrow(0, start, real).copy_(dh.narrow(0, 0, real))
            weight_gradient += dw
            start += real
        ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return loss / denominator

    @staticmethod
    def backward(ctx, gradient):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return gradient.to(hidden_gradient.dtype) * hidden_gradient, gradient.to(weight_gradient.dtype) * weight_gradient, None, None


def linear_cross_entropy(hidden, weight, targets, denominator=None, ignore_index=-100):
    """Cross-entropy of softmax(hidden @ weight.T) against targets, as one fp32 scalar.

    Args:
        hidden: (..., D). weight: (V, D). targets: (...) int64; those equal to `ignore_index` count for nothing.
        denominator: what the summed loss is divided by, a number or a tensor; None: the targets that count in this call. With
            gradient accumulation give the whole batch's count, so that 1 or 4 micro-batches have the same gradient.
    """
    keep = targets.flatten() != ignore_index
    hidden, targets = hidden.flatten(0, -2)[keep], targets.flatten()[keep]   # (N, D), (N,)
    return _CrossEntropy.apply(hidden, weight, targets, max(len(targets), 1) if denominator is None else denominator)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        temperature = torch.tensor(float(temperature), device=hidden.device)
        ctx.save_for_backward(hidden, weight, targets, temperature)
        parts = [[x.narrow(0, 0, real) for x in _run(_logprobs_chunk, h, weight, t, temperature)] for real, (h, t) in _chunks(hidden, targets)]
        logprobs, entropy = (torch.cat(x) for x in zip(*parts))
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, weight, targets, temperature = ctx.saved_tensors
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        start = 0
        for real, (h, t, s) in _chunks(hidden, targets, gradient.contiguous()):
            dh, dw = _run(_gradient_chunk, h, weight, t, temperature, s)
            hidden_gradient.narrow(0, start, real).copy_(dh.narrow(0, 0, real))
            weight_gradient += dw
            start += real
        return hidden_gradient, weight_gradient.to(weight.dtype), None, None


def linear_logprobs(hidden, weight, targets, temperature=1.0):
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and that distribution's entropy.

    hidden (N, D), weight (V, D), targets (N,) int64 -> logprobs (N,) fp32, differentiable in hidden and weight, and entropy (N,)
    fp32 in nats, a measurement without gradient.
    """
    return _Logprobs.apply(hidden, weight, targets, temperature)
