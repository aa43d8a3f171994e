"""Fused linear losses: from hidden states and the head's weight to a loss, without the logits.

For Llama 3 the (tokens x vocabulary) logits of 8,192 tokens take 4 GB in fp32, and their gradient
as much again. Here they exist for a chunk of tokens at a time, in one buffer, and their gradient
overwrites them. Three functions, of two kinds, since they need different things from backward:

    linear_cross_entropy   Scalar losses (SFT; on-policy distillation). All gradients are computed
    linear_distillation    in the forward pass, chunk by chunk: right only because nothing but a
                           scale can come between such a loss and `backward()`.
    linear_logprobs        Log-probability of each target and entropy of each distribution (PPO).
                           What multiplies each token's gradient is known only in backward, so the
                           chunk's logits are computed again there; their normalizers are kept.

What happens to a chunk's logits between the matrix products is a *kernel*: a function of a few
lines that torch.compile makes one pass or two of. Its number of tokens is a dynamic shape, so a
kernel compiles once, whatever the lengths. Logits are matrix products in the dtype of `hidden`;
softmax, losses and sums are fp32. The weight's gradient is summed in fp32, but for bf16 weights of
few chunks: see `_Gradients`. The idea: Liger-Kernel (arXiv 2410.10989), Cut Cross-Entropy (arXiv
2411.09009). This file imports torch only and can be copied out alone.
"""

import functools
import math
import warnings

import torch
import torch.nn.functional as F


# Bytes of logits that exist at once: 1,024 tokens of bf16 at a vocabulary of 49,152.
BUDGET = 96 * 2**20
# Logits of a chunk; with fewer, compiling takes longer than it will save.
WORTH_COMPILING = 2**22


# ---- kernels: logits (n, V), overwritten where the name ends in _; all else fp32, (n,) or () ----

def _weigh(p, f):
    """p * f, and 0 where p is 0, even times infinity; NaN stays."""
    return (p * f).masked_fill_(p == 0, 0.0)


def _normalizer(logits):
    """-> log Z."""
    return logits.float().logsumexp(dim=-1)


def _cross_entropy_(logits, scale):
    """Logits become scale * softmax -> log Z."""
    x = logits.float()
    normalizer = x.logsumexp(dim=-1)
    logits.copy_((x - normalizer[:, None]).exp() * scale)
    return normalizer


def _statistics(logits, inverse_temperature):
    """-> log Z and entropy of softmax(logits / temperature)."""
    x = logits.float() * inverse_temperature
    largest = x.amax(dim=-1, keepdim=True)
    shares = (x - largest).exp()
    total = shares.sum(dim=-1)
    normalizer = largest.squeeze(-1) + total.log()
    # H = log Z - E[logit].
    return normalizer, normalizer - _weigh(shares, x).sum(dim=-1) / total


def _logprobs_gradient_(logits, inverse_temperature, normalizer, scale):
    """Logits become the gradient of sum(scale * logprobs) without the targets' own part."""
    softmax = (logits.float() * inverse_temperature - normalizer[:, None]).exp()
    logits.copy_(softmax * (-inverse_temperature * scale)[:, None])


def _entropy_gradient_(logits, inverse_temperature, normalizer, scale, entropy, entropy_scale):
    """That of sum(scale * logprobs + entropy_scale * entropy): dH / dlogit = -p (log p + H)."""
    logprobs = logits.float() * inverse_temperature - normalizer[:, None]
    surprise = (logprobs + entropy[:, None]) * entropy_scale[:, None]
    logits.copy_(_weigh(logprobs.exp() * -inverse_temperature, scale[:, None] + surprise))


def _divergence(logits, teacher_logits, inverse_temperature, normalizer, teacher_normalizer, kind):
    """-> divergence per token, and the mean that its gradient takes."""
    student = logits.float() * inverse_temperature - normalizer[:, None]
    teacher = teacher_logits.float() * inverse_temperature - teacher_normalizer[:, None]
    if kind == "forward_kl":
        divergence = mean = _weigh(teacher.exp(), teacher - student).sum(dim=-1)
    elif kind == "reverse_kl":
        divergence = mean = _weigh(student.exp(), student - teacher).sum(dim=-1)
    else:
        # student - middle = log 2 - log(1 + exp(teacher - student)).
        mean, other = (_weigh(a.exp(), math.log(2) - F.softplus(b - a)).sum(dim=-1)
                       for a, b in ((student, teacher), (teacher, student)))
        divergence = (mean + other) * 0.5
    return divergence, mean


def _divergence_gradient_(logits, teacher_logits, inverse_temperature, normalizer,
                          teacher_normalizer, mean, scale, kind):
    """Logits become the gradient of scale * the sum of divergences."""
    student = logits.float() * inverse_temperature - normalizer[:, None]
    teacher = teacher_logits.float() * inverse_temperature - teacher_normalizer[:, None]
    if kind == "forward_kl":
        gradient = student.exp() - teacher.exp()
    elif kind == "reverse_kl":
        # sum_v p_v f_v, whose derivative by the logits is p (f - E[f]).
        gradient = _weigh(student.exp(), student - teacher - mean[:, None])
    else:
        # The middle moves with the student too, but adds nothing to the derivative, p (f - E[f]).
        f = math.log(2) - F.softplus(teacher - student)
        gradient = _weigh(student.exp(), f - mean[:, None]) * 0.5
    logits.copy_(gradient * (inverse_temperature * scale))


def _distillation_(logits, teacher_logits, inverse_temperature, scale, kind):
    """-> divergence per token; logits become the gradient of scale * its sum. In steps: as one
    kernel it would keep what is as large as the logits."""
    normalizers = (_run(_statistics, x, inverse_temperature)[0] for x in (logits, teacher_logits))
    given = logits, teacher_logits, inverse_temperature, *normalizers
    divergence, mean = _run(_divergence, *given, kind)
    _run(_divergence_gradient_, *given, mean, scale, kind)
    return divergence


def _add_(total, part):
    # fp32 += bf16: eagerly ten times slower on CPU.
    total.add_(part)


@functools.cache
def _compiled(kernel):
    return torch.compile(kernel, fullgraph=True)


def _run(kernel, logits, *args):
    """kernel(logits, *args), compiled if that is worth it and a compiler is there."""
    if logits.numel() < WORTH_COMPILING or torch.compiler.is_compiling():
        return kernel(logits, *args)
    if logits.device.type == "meta":
        # Only memory counts there, and a compiled kernel makes nothing as large as the logits.
        shape = (2, len(logits)) if kernel in (_statistics, _divergence) else len(logits)
        return logits.new_empty(shape).float()                                  # (2, n) or (n,)
    if no_compiler(logits.device.type):
        return kernel(logits, *args)
    for tensor in (logits, *args):
        if isinstance(tensor, torch.Tensor) and tensor.dim():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(kernel)(logits, *args)


@functools.cache
def no_compiler(device):
    """Whether compiling fails here, said once."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    # What is raised depends on what is missing.
    except Exception as error:
        warnings.warn("torch.compile does not work here, so training is slower and needs more "
                      f"memory: {error}", stacklevel=4)
        return True
    return False


# ---- chunks ----

def _count(hidden, weight):
    """Chunks: a chunk's logits take BUDGET bytes at most, or half as many as the head if that is
    more (each chunk reads all of it three times)."""
    size = hidden.element_size()
    most = max(BUDGET, weight.numel() * size // 2)
    return math.ceil(len(hidden) * len(weight) * size / most)


def _chunks(weight, hidden, *more):
    """Equal slices of all tokens: yields (start, logits (n, V), slices). Each logits lies in the
    same memory, so on the meta device, where only memory counts, two chunks stand for all."""
    size = math.ceil(len(hidden) / max(_count(hidden, weight), 1))
    buffer = hidden.new_empty(size, len(weight))
    starts = range(0, len(hidden), max(size, 1))
    for start in starts[:2] if hidden.device.type == "meta" else starts:
        h, *slices = (x[start:start + size] for x in (hidden, *more))
        yield start, torch.mm(h, weight.T, out=buffer[:len(h)]), (h, *slices)


def _put_(logits, targets, values):
    """logits (n, V) take values (n, 1) at targets (n, 1); scatter_ copies all of them on CPU."""
    rows = torch.arange(len(logits), device=logits.device)
    logits[rows, targets.squeeze(1)] = values.squeeze(1).to(logits.dtype)


class _Gradients:
    """Collects the chunks' gradients of hidden and weight, as far as they are needed.

    The weight's is a sum over all chunks, in fp32. With at most FEW of them a bf16 weight's is
    summed in bf16, which saves its double size: its relative error, 6.0e-3 by bf16 products alone,
    becomes 6.4e-3 by four sums in bf16 (8.0e-3 by forty; tests/test_losses.py).
    """
    FEW = 4

    def __init__(self, hidden, weight, needs):
        self.inputs, self.dtype = (hidden, weight), weight.dtype
        dtype = weight.dtype if _count(hidden, weight) <= self.FEW else torch.float32
        # Without tokens no chunk overwrites it.
        make = torch.empty_like if len(hidden) else torch.zeros_like
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = make(weight, dtype=dtype) if needs[1] else None

    def add(self, start, hidden, weight, gradient):
        """The products of gradient (n, V) with hidden (n, D) and weight (V, D), of one dtype."""
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[start:start + len(hidden)])
        if self.weight is not None and self.weight.dtype == hidden.dtype:
            self.weight.addmm_(gradient.T, hidden, beta=min(start, 1))
        elif self.weight is not None and self.one_product(hidden):
            # Nothing is rounded to the dtype of hidden on the way.
            torch.addmm(self.weight, gradient.T, hidden, out_dtype=torch.float32,
                        beta=min(start, 1), out=self.weight)
        elif self.weight is not None:
            # A CPU's cache holds each part.
            parts = max(weight.numel() // WORTH_COMPILING, 1)
            totals, columns = self.weight.tensor_split(parts), gradient.tensor_split(parts, dim=1)
            for total, part in zip(totals, columns):
                if start:
                    _run(_add_, total, part.T @ hidden)
                else:
                    total.copy_(part.T @ hidden)

    def one_product(self, hidden):
        """Whether cuBLAS can add a product of this dtype to the fp32 sum (in Inductor: no)."""
        return (hidden.device.type == "cuda" and hidden.dtype in (torch.bfloat16, torch.float16)
                and self.weight.dtype == torch.float32 and not torch.compiler.is_compiling())

    def both(self, *above):
        """The two gradients, as they follow from the inputs and the gradients `above`."""
        both = self.hidden, None if self.weight is None else self.weight.to(self.dtype)
        # torch.compile itself refuses a second derivative.
        if torch.compiler.is_compiling():
            return both
        return [x if x is None else _Precomputed.apply(x, None, *self.inputs, *above) for x in both]


class _Precomputed(torch.autograd.Function):
    """A loss whose gradients are known when it is: backward only scales them, in place unless the
    graph is kept for another backward.

    Of a gradient, given none: its backward raises, for a second derivative would be silently wrong.
    """

    @staticmethod
    def forward(ctx, loss, gradients, *inputs):
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx, gradient):
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("backward through a fused loss a second time: the first one needs "
                               "retain_graph=True, and there is no second derivative")
        if torch.compiler.is_compiling() or _graph_is_kept():
            scaled = [None if x is None else x * gradient.to(x.dtype) for x in gradients]
        else:
            ctx.gradients = None
            scaled = [None if x is None else x.detach().mul_(gradient) for x in gradients]
        return None, None, *scaled


# Private, but PyTorch's own checkpointing asks it too. Where it is missing, gradients are copied.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _prepare(hidden, weight, denominator, temperature=1.0):
    """-> the weight in the dtype of hidden; whether hidden and weight need gradients;
    1 / denominator and 1 / temperature as scalar tensors."""
    def inverse(x):
        if not isinstance(x, torch.Tensor):
            # On CUDA `as_tensor` would wait for the device.
            x = torch.full((), x, dtype=torch.float32, device=hidden.device)
        return 1 / x.to(hidden.device, torch.float32)
    enabled = torch.is_grad_enabled()
    needs = enabled and hidden.requires_grad, enabled and weight.requires_grad
    return weight.detach().to(hidden.dtype), needs, inverse(denominator), inverse(temperature)


# ---- the losses ----

def linear_cross_entropy(hidden, weight, targets, denominator=None, ignore_index=-100):
    """Cross-entropy of softmax(hidden @ weight.T) against targets, as one fp32 scalar.

    Args:
        hidden: (..., D). weight: (V, D).
        targets: (...) int64; those equal to `ignore_index` are left out before anything is
            computed. On CUDA finding them waits for the device: with ignore_index=None all targets
            count, and nothing waits.
        denominator: what the summed loss is divided by, a number or a tensor; None: the targets
            that count in this call. With gradient accumulation give the whole batch's count, so
            that 1 or 4 micro-batches have the same gradient.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if ignore_index is not None:
        keep = targets != ignore_index
        hidden, targets = hidden[keep], targets[keep]                           # (N, D), (N,)
    denominator = max(len(targets), 1) if denominator is None else denominator
    w, needs, scale, _ = _prepare(hidden, weight, denominator)
    with torch.no_grad():
        loss = torch.zeros((), device=hidden.device)
        gradients = _Gradients(hidden, weight, needs)
        for start, logits, (h, t) in _chunks(w, hidden, targets[:, None]):
            chosen = logits.gather(1, t).float()                                # (n, 1)
            if any(needs):
                losses = _run(_cross_entropy_, logits, scale)[:, None] - chosen
                # p - 1, exact also where p is nearly 1.
                _put_(logits, t, losses.neg().expm1() * scale)
                gradients.add(start, h, w, logits)
            else:
                losses = _run(_normalizer, logits)[:, None] - chosen
            loss += losses.sum()
    return _Precomputed.apply(loss * scale, gradients.both(), hidden, weight)


def linear_distillation(hidden, weight, teacher_hidden, teacher_weight, kind="forward_kl",
                        mask=None, temperature=1.0, denominator=None):
    """Divergence between the teacher's and the student's next-token distributions,
    softmax(hidden @ weight.T / temperature), as one fp32 scalar.

    Args:
        hidden, weight: (..., D) and (V, D), the student's, which get gradients.
        teacher_hidden, teacher_weight: (..., E) and (V, E), the teacher's, which get none.
        kind: "forward_kl", KL(teacher || student), which covers what the teacher does;
            "reverse_kl", KL(student || teacher), which seeks one thing that it does;
            "jsd", the mean of the KL of each to their average (arXiv 2306.13649, generalised JSD
            at 0.5).
        mask: (...) bool, True = a token that counts; None: all.
        denominator: as in `linear_cross_entropy`.
    Raises:
        ValueError: another kind.
    """
    if kind not in ("forward_kl", "reverse_kl", "jsd"):
        raise ValueError(f"kind is {kind!r}, not forward_kl, reverse_kl or jsd")
    teacher_weight = teacher_weight.detach()
    hidden, teacher_hidden = hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
    if mask is not None:
        keep = mask.flatten()
        hidden, teacher_hidden = hidden[keep], teacher_hidden[keep]             # (N, D), (N, E)
    denominator = max(len(hidden), 1) if denominator is None else denominator
    w, needs, scale, inverse_temperature = _prepare(hidden, weight, denominator, temperature)
    with torch.no_grad():
        loss = torch.zeros((), device=hidden.device)
        gradients = _Gradients(hidden, weight, needs)
        teacher_w = teacher_weight.to(teacher_hidden.dtype)                     # (V, E)
        for start, logits, (h, t) in _chunks(w, hidden, teacher_hidden):
            if not start:
                buffer = t.new_empty(logits.shape)
            teacher_logits = torch.mm(t, teacher_w.T, out=buffer[:len(t)])      # (n, V)
            loss += _distillation_(logits, teacher_logits, inverse_temperature, scale, kind).sum()
            gradients.add(start, h, w, logits)
    return _Precomputed.apply(loss * scale, gradients.both(), hidden, weight)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        w, _, _, inverse_temperature = _prepare(hidden, weight, 1.0, temperature)
        logprobs, normalizer, entropy = (
            torch.empty(len(hidden), device=hidden.device) for _ in range(3))   # (N,) each
        for start, logits, (h, t) in _chunks(w, hidden, targets[:, None]):
            n = slice(start, start + len(h))
            normalizer[n], entropy[n] = _run(_statistics, logits, inverse_temperature)
            chosen = logits.gather(1, t).float().squeeze(1)                     # (n,)
            logprobs[n] = chosen * inverse_temperature - normalizer[n]
        ctx.save_for_backward(hidden, weight, targets, inverse_temperature, logprobs, normalizer,
                              entropy)
        # None for an output that the loss does not use: no work for it.
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *above):
        (hidden, weight, targets, inverse_temperature, logprobs, normalizer,
         entropy) = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad)
        with torch.no_grad():
            scale, entropy_scale = above
            w, targets = weight.to(hidden.dtype), targets[:, None]              # (V, D), (N, 1)
            scale = torch.zeros_like(logprobs) if scale is None else scale.contiguous()
            # Of the target's own logit, before the temperature.
            target = -scale * logprobs.expm1()                                  # (N,)
            if entropy_scale is None:
                own = (target * inverse_temperature)[:, None]                   # (N, 1)
                for start, logits, (h, t, o, *per_token) in _chunks(
                        w, hidden, targets, own, normalizer, scale):
                    _run(_logprobs_gradient_, logits, inverse_temperature, *per_token)
                    _put_(logits, t, o)
                    gradients.add(start, h, w, logits)
            else:
                entropy_scale = entropy_scale.contiguous()
                target = target - _weigh(logprobs.exp(), entropy_scale * (logprobs + entropy))
                own = (target * inverse_temperature)[:, None]                   # (N, 1)
                for start, logits, (h, t, o, *per_token) in _chunks(
                        w, hidden, targets, own, normalizer, scale, entropy, entropy_scale):
                    _run(_entropy_gradient_, logits, inverse_temperature, *per_token)
                    _put_(logits, t, o)
                    gradients.add(start, h, w, logits)
        return *gradients.both(*above), None, None


def linear_logprobs(hidden, weight, targets, temperature=1.0, ignore_index=-100):
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and that
    distribution's entropy in nats: two tensors (...) fp32, differentiable in hidden and weight.

    Args:
        hidden: (..., D). weight: (V, D).
        targets: (...) int64; for those equal to `ignore_index` both results are 0 and no gradient
            flows. They cost as much as all others: finding them first would wait for the device.
            With ignore_index=None all targets count, and `hidden` is not copied.
    """
    h, t = hidden.flatten(0, -2), targets.flatten()                             # (N, D), (N,)
    if ignore_index is not None:
        # Even where hidden is NaN no gradient may become NaN.
        ignored = t == ignore_index
        h, t = h.masked_fill(ignored[:, None], 0), t.masked_fill(ignored, 0)
    both = _Logprobs.apply(h, weight, t, temperature)                           # (N,) each
    if ignore_index is not None:
        both = (x.masked_fill(ignored, 0) for x in both)
    return tuple(x.view(targets.shape) for x in both)
