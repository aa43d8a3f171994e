"""One optimizer step as every stage takes it: a rate that rises and falls, clipped gradients."""

import torch

from nanodistill import parallel


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
    """Sum the model's gradients over the processes, scale them down to `max_norm`, let the
    optimizers step, free the gradients.

    Returns the norm before, a scalar tensor.
    """
    parallel.sum_gradients(model)
    norm = parallel.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm
