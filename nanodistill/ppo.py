"""PPO for language models: KL-shaped rewards, GAE, whitening, clipped policy and value losses, KL
control; and RLOO's and GRPO's advantages.

Everything is a function of tensors (B, R) over the *response* tokens of B right-padded sequences,
none of them empty. `mask` is True at every sampled token, the EOS included; what lies outside of it
counts for nothing, even if it is NaN. Follows arXiv 1707.06347 (PPO), 1506.02438 (GAE), 1909.08593
(KL penalty, adaptive coefficient) and "The N Implementation Details of RLHF with PPO". This file
imports torch only and can be copied out alone.

A worked example, one response of three tokens, kl_coef 0.1, score 2, gamma 1, lambda 1:

    logprobs - ref_logprobs    0.0   0.5  -0.2
    rewards                    0.0 -0.05  2.02     (the score joins the last token)
    values                     1.0   1.2   1.5
    advantages                0.97  0.77  0.52     (what came after, less what was expected)
    returns                   1.97  1.97  2.02     (advantages + values: the value model's targets)
"""

import torch


def masked_mean(x, mask, denominator=None):
    """Mean of x where mask is True, or their sum divided by `denominator`: the whole batch's token
    count under gradient accumulation."""
    total = x.masked_fill(~mask, 0).sum()
    return total / (mask.sum().clamp(min=1) if denominator is None else denominator)


def whiten(x, mask, shift_mean=True):
    """x with variance 1 over the masked entries, and mean 0 unless `shift_mean` is False. Entries
    outside the mask become 0."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean).masked_fill(~mask, 0)


def kl_k1(logprobs, ref_logprobs):
    """log p - log r for tokens sampled from p: unbiased for KL(p || r), may be negative
    (joschu.net/blog/kl-approx.html)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs, ref_logprobs):
    """r/p - 1 - log(r/p): unbiased as k1 is, never negative, less noisy. expm1 keeps small
    differences exact."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """rewards (B, R): -kl_coef * (logprobs - ref_logprobs) at each token, and the response's score
    (B,) added at its last one."""
    # On CUDA, looking would wait for the device.
    assert not mask.is_cpu or (mask[:, 0].all() and not (mask[:, 1:] & ~mask[:, :-1]).any()), \
        "responses must be padded on the right, and none may be empty"
    rewards = (-kl_coef * kl_k1(logprobs, ref_logprobs)).masked_fill(~mask, 0)
    last = mask.sum(dim=1) - 1                                                 # (B,)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation -> advantages, returns (B, R), 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}; past the last token V
    and A are 0.
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages, following, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t], next_value = following, values[:, t]
    return advantages, advantages + values


def group_advantages(rewards, mask, samples, kind, scores=None):
    """Advantages (B, R) without a value model: a response's whole reward against those of the same
    question, the same at each of its tokens, 0 outside the mask.

    The `samples` responses of a question, at least 2, lie beside each other. "rloo" (arXiv
    2402.14740): the reward less the mean of the others; "grpo" (2402.03300): less the mean of all;
    what of that is the `scores` (B,), or all where they are None, is divided by their standard
    deviation within the question. The KL is not: where scores are nearly alike it would be all that
    is left.
    """
    totals = rewards.masked_fill(~mask, 0).sum(dim=1).view(-1, samples)       # (questions, samples)
    centred = totals - totals.mean(dim=1, keepdim=True)
    if kind == "rloo":
        # A response is itself one in `samples` of that mean.
        centred = centred * samples / (samples - 1)
    else:
        scores = totals if scores is None else scores.view(-1, samples)
        better = scores - scores.mean(dim=1, keepdim=True)
        centred = centred - better + better / (scores.std(dim=1, keepdim=True) + 1e-4)
    return centred.view(-1, 1) * mask                                          # (B, R)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, denominator=None):
    """Clipped surrogate loss, and measurements without gradient: {"ratio", "approx_kl" (k3 against
    old), "clipfrac"}, each a `masked_mean`."""
    # Filled before exp: no NaN gradient leaves from outside the mask.
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0)
    ratio = log_ratio.exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    with torch.no_grad():
        clipped = ((ratio - 1).abs() > clip).float()
        stats = {"ratio": masked_mean(ratio, mask, denominator),
                 "clipfrac": masked_mean(clipped, mask, denominator),
                 "approx_kl": masked_mean(kl_k3(old_logprobs, logprobs), mask, denominator)}
    return masked_mean(losses, mask, denominator), stats


def total(measurements):
    """Sums, key by key, of dicts with the same keys, such as those of micro-batches."""
    return {key: sum(m[key] for m in measurements) for key in measurements[0]}


def value_loss(values, old_values, returns, mask, clip=0.2, denominator=None):
    """Half the mean squared error; per token the larger of that of `values` and that of `values`
    clipped to within `clip` of `old_values`."""
    values = values.masked_fill(~mask, 0)
    near = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns) ** 2, (near - returns) ** 2)     # (B, R)
    return 0.5 * masked_mean(errors, mask, denominator)


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the masked entries: 1 is perfect, 0 no better
    than the mean."""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


def adapt_kl(kl_coef, kl, target, samples, horizon=10000):
    """The next KL coefficient: up when `kl` (nats per response) is above `target`, by at most
    0.2 * samples / horizon (1909.08593, eq. 2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * samples / horizon)
