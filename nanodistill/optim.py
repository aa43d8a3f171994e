"""One optimizer step as every stage takes it: a rate that rises and falls, clipped gradients."""

import torch


def schedule(step, steps, warmup, last):
    """The learning rate at step `step` (from 0) of `steps`, over --learning-rate.

    The lesser of a rise over the first `warmup` of the steps, and of a line from 1 at step 0 to
    `last` at step `steps`.
    """
    return min((step + 1) / max(warmup * steps, 1), 1 - (1 - last) * step / steps)


def set_rate(optimizers, rate):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def groups(parameters):
    """Parameter groups for an optimizer: matrices and vectors. Where the matrices are split over
    processes and the vectors are not, no fused step takes both together."""
    parameters = [*parameters]
    both = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
    return [{"params": group} for group in both if group]


def clipped_step(model, optimizers, max_norm):
    """Scale the model's gradients down to `max_norm`, let the optimizers step, free the gradients.

    Returns the norm before, a scalar tensor.
    """
    parts = {}
    for p in model.parameters():
        if p.grad is not None:
            parts.setdefault(hasattr(p, "full_tensor"), []).append(p)
    norms = {split: torch.nn.utils.get_total_norm([p.grad for p in part])
             for split, part in parts.items()}
    # Of what is split over processes, it is yet to be summed.
    norms = [n.full_tensor() if split else n for split, n in norms.items()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in parts.values():
        torch.nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm
