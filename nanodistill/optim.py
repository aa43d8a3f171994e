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


def clipped_step(model, optimizers, max_norm):
    """Scale the model's gradients down to `max_norm`, let the optimizers step, free the gradients.

    Returns the norm before, a scalar tensor.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    # Of weights that are split over processes, it is yet to be summed.
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm
