"""PPO's arithmetic against numbers worked by hand and against other libraries."""

import math
import statistics

import pytest
import torch

from nanodistill import ppo


T = torch.tensor


def test_shaped_rewards_by_hand():
    """The example of ppo.py's docstring, and a shorter response beside it."""
    logprobs = T([[-1.0, -1.0, -1.0], [-2.0, -1.0, 9.0]])
    ref = T([[-1.0, -1.5, -0.8], [-1.0, -3.0, -9.0]])
    mask = T([[True, True, True], [True, True, False]])
    rewards = ppo.shape_rewards(T([2.0, -1.0]), logprobs, ref, mask, 0.1)
    torch.testing.assert_close(rewards, T([[0.0, -0.05, 2.02], [0.1, -1.2, 0.0]]))


def test_gae_by_hand():
    rewards, values = T([[0.0, -0.05, 2.02]]), T([[1.0, 1.2, 1.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, T([[0.97, 0.77, 0.52]]))
    torch.testing.assert_close(returns, T([[1.97, 1.97, 2.02]]))
    # gamma 0.9, lambda 0.5, rewards 1 2 3, values 2 4 6:
    # delta 3 = -3; delta 2 = 2 + 5.4 - 4 = 3.4; delta 1 = 1 + 3.6 - 2 = 2.6;
    # A3 = -3; A2 = 3.4 - 1.35 = 2.05; A1 = 2.6 + 0.9225 = 3.5225.
    # The second row ends after one token: A = 1 - 2.
    advantages, _ = ppo.gae(T([[1.0, 2.0, 3.0], [1.0, 50.0, 50.0]]),
                            T([[2.0, 4.0, 6.0], [2.0, 70.0, 70.0]]),
                            T([[True, True, True], [True, False, False]]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, T([[3.5225, 2.05, -3.0], [-1.0, 0.0, 0.0]]))


def test_gae_with_lambda_1_is_the_discounted_return_less_the_value():
    scipy = pytest.importorskip("scipy.signal")
    rewards, values = torch.randn(4, 12), torch.randn(4, 12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    discounted = scipy.lfilter([1.0], [1.0, -0.97], rewards.numpy()[:, ::-1], axis=1)[:, ::-1]
    discounted = torch.from_numpy(discounted.copy()).float()
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.97, lam=1.0)
    torch.testing.assert_close(returns, discounted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(advantages, returns - values, rtol=1e-4, atol=1e-5)


def test_gae_discounts_by_default_with_gamma_1_and_lambda_095():
    # Values 1 and 1, a reward of 1 at the end: delta 2 = 0, delta 1 = V2 - V1 = 0 if gamma is 1.
    # Values 1 and 2: delta 2 = -1, delta 1 = 1, A1 = 1 - 0.95. With 0.9, 0.5: 0.8 - 0.45.
    rewards, mask = T([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    for values, args, expected in (([1.0, 1.0], (), [0.0, 0.0]), ([1.0, 2.0], (), [0.05, -1.0]),
                                   ([1.0, 2.0], (0.9, 0.5), [0.35, -1.0])):
        torch.testing.assert_close(ppo.gae(rewards, T([values]), mask, *args)[0], T([expected]))


def test_group_advantages_by_hand():
    """Two questions, three responses to each, of one token and of two: whole rewards 1, 2, 6 and
    -1, -1, 2. The first of 1, 2, 6 is 1 - (2 + 6) / 2 = -3; their mean is 3, their deviation
    sqrt((4 + 1 + 9) / 2); that of the others sqrt((1 + 1 + 4) / 2). What is outside the mask, a NaN
    here, counts for nothing."""
    nan = float("nan")
    rewards = T([[0.5, 0.5], [2.0, nan], [-1.0, 7.0], [-1.0, nan], [0.0, -1.0], [2.0, nan]])
    mask = ~rewards.isnan()
    rloo, grpo = (ppo.group_advantages(rewards, mask, 3, kind) for kind in ("rloo", "grpo"))
    by_hand = T([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0])
    torch.testing.assert_close(rloo, by_hand[:, None] * mask)
    by_hand = T([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]) / T([7.0, 7.0, 7.0, 3.0, 3.0, 3.0]).sqrt()
    torch.testing.assert_close(grpo, by_hand[:, None] * mask, rtol=1e-3, atol=0)


def test_group_advantages_against_one_response_left_out_at_a_time():
    """TRL: RLOO's baseline is the mean over the group without the response; GRPO divides by the
    group's deviation (unbiased) plus 1e-4."""
    counts, n = [1, 4, 2, 3, 3, 1, 2, 4], 4
    mask = torch.arange(4) < T(counts)[:, None]
    rewards = torch.randn(8, 4).double() * mask
    rewards[4:] = rewards[4:] * 1e-3                             # where 1e-4 matters
    rloo, grpo = (ppo.group_advantages(rewards, mask, n, kind) for kind in ("rloo", "grpo"))
    for b, count in enumerate(counts):
        group = [rewards[i].sum().item() for i in range(b // n * n, b // n * n + n)]
        own = group.pop(b % n)
        expected = own - statistics.mean(group)
        assert rloo[b].tolist() == pytest.approx([expected] * count + [0] * (4 - count))
        group.append(own)
        expected = (own - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        assert grpo[b].tolist() == pytest.approx([expected] * count + [0] * (4 - count))


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_response_that_its_group_beats_becomes_less_probable(kind):
    """The policy is one softmax over eight responses of one token, the rewards of both questions
    differ by 10: only those of the same question count."""
    logits = torch.zeros(8, requires_grad=True)
    logprobs = logits.log_softmax(0)[:, None]                    # (B, 1)
    rewards, mask = T([[1.0], [0.0], [0.0], [1.0], [11.0], [11.0], [10.0], [10.0]]), logprobs < 1
    advantages = ppo.group_advantages(rewards, mask, 4, kind)
    ppo.policy_loss(logprobs, logprobs.detach(), advantages, mask)[0].backward()
    assert (-logits.grad).sign().tolist() == [1, -1, -1, 1, 1, 1, -1, -1]
    if kind == "grpo":
        # The scores are divided, by a half or 2e-4 + 1e-4; the drift of +-0.01 is not.
        scores = T([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5004]).double()
        drift = T([0.01, -0.01] * 4).double()
        found = ppo.group_advantages((scores + drift)[:, None], mask, 4, kind, scores).squeeze(1)
        assert found.tolist() == pytest.approx(
            [0.8760, -0.8760, -0.8560, 0.8560, -0.3233, -0.3433, -0.3233, 0.9900], rel=1e-3)
    # Where all are alike there is nothing to learn.
    assert not ppo.group_advantages(torch.full((4, 1), 0.3), mask[:4], 4, kind).any()


def test_whiten_by_hand():
    x = T([[1.0, 3.0, 99.0], [5.0, 7.0, -99.0]])
    mask = T([[True, True, False], [True, True, False]])
    # 1 3 5 7 have mean 4 and variance 5.
    r5 = math.sqrt(5)
    torch.testing.assert_close(ppo.whiten(x, mask),
                               T([[-3 / r5, -1 / r5, 0.0], [1 / r5, 3 / r5, 0.0]]))
    torch.testing.assert_close(ppo.whiten(x, mask, shift_mean=False),
                               T([[4 - 3 / r5, 4 - 1 / r5, 0.0], [4 + 1 / r5, 4 + 3 / r5, 0.0]]))


def test_kl_estimators_average_to_the_kl_of_torch_distributions():
    p = torch.distributions.Categorical(logits=T([1.0, 0.0, -1.0, 0.5]))
    r = torch.distributions.Categorical(logits=T([0.5, 0.5, -0.5, 0.0]))
    truth = torch.distributions.kl_divergence(p, r)
    # The expectation is over all outcomes, so there is no sampling noise.
    every = torch.arange(4)
    for estimator in (ppo.kl_k1, ppo.kl_k3):
        mean = (p.probs * estimator(p.log_prob(every), r.log_prob(every))).sum()
        torch.testing.assert_close(mean, truth)
    assert (ppo.kl_k3(p.log_prob(every), r.log_prob(every)) >= 0).all()
    # x^2 / 2 is lost without expm1.
    tiny = ppo.kl_k3(T(-1.0), T(-1.0 + 2.0**-12))
    torch.testing.assert_close(tiny, T(2.0**-25), rtol=1e-2, atol=0)


def test_policy_loss_by_hand():
    old = torch.log(T([[0.5, 0.5, 0.5, 0.5]]))
    new = torch.log(T([[0.5, 0.75, 0.25, 0.75]]))
    advantages, mask = T([[1.0, 1.0, -1.0, 5.0]]), T([[True, True, True, False]])
    # Ratios 1, 1.5, 0.5. Loss per token: -1; -1.2 (clipped); max(0.5, 0.8) = 0.8. Mean -1.4 / 3.
    loss, stats = ppo.policy_loss(new, old, advantages, mask, clip=0.2)
    torch.testing.assert_close(loss, T(-1.4 / 3))
    torch.testing.assert_close(stats["ratio"], T(1.0))
    torch.testing.assert_close(stats["clipfrac"], T(2 / 3))
    kl = 0 + 0.5 - math.log(1.5) + -0.5 - math.log(0.5)
    torch.testing.assert_close(stats["approx_kl"], T(kl / 3))


def test_policy_loss_over_the_whole_batchs_tokens_with_another_clip():
    # Ratios 2, 1.25 and, outside the mask, e^50 (fp32 holds e^88). Clip 0.5, advantages 1 and -1:
    # losses -1.5 (clipped) and 1.25, -0.25 in all, over 8 tokens of which these are two.
    old = torch.log(T([[0.25, 0.4, 0.5]]))
    new = old + T([[math.log(2), math.log(1.25), 50.0]])
    mask = T([[True, True, False]])
    loss, stats = ppo.policy_loss(new, old, T([[1.0, -1.0, 7.0]]), mask, clip=0.5, denominator=8)
    torch.testing.assert_close(loss, T(-0.25 / 8))
    torch.testing.assert_close(stats["ratio"], T(3.25 / 8))
    torch.testing.assert_close(stats["clipfrac"], T(1 / 8))
    kl = (1 - math.log(2)) + (0.25 - math.log(1.25))                     # k3: ratio - 1 - log ratio
    torch.testing.assert_close(stats["approx_kl"], T(kl / 8))
    loss, stats = ppo.policy_loss(new, old, T([[1.0, -1.0, 7.0]]), mask, clip=0.5)
    torch.testing.assert_close(loss, T(-0.125))
    torch.testing.assert_close(stats["ratio"], T(1.625))
    # What lies outside the mask may be too far away for exp: no gradient comes from there.
    new = T([[-1.0, 500.0]]).requires_grad_()
    loss, _ = ppo.policy_loss(new, T([[-1.0, 0.0]]), T([[2.0, 2.0]]), T([[True, False]]))
    loss.backward()
    torch.testing.assert_close(new.grad, T([[-2.0, 0.0]]))


def test_policy_gradient_stops_where_clipped():
    new = torch.log(T([[0.75, 0.25, 0.75, 0.25]])).requires_grad_()
    old = torch.log(T([[0.5, 0.5, 0.5, 0.5]]))
    loss, _ = ppo.policy_loss(new, old, T([[1.0, -1.0, -1.0, 1.0]]),
                              torch.ones(1, 4, dtype=torch.bool))
    loss.backward()
    # The first two have moved far enough the right way: no pull. The rest pull.
    torch.testing.assert_close(new.grad, T([[0.0, 0.0, 1.5 / 4, -0.5 / 4]]))


def test_value_loss_by_hand():
    # old 0; values 0.1 and 1.0, returns 1: near 0.1 and 0.2. Errors: 0.81 either way; 0 against
    # 0.64 -> 0.64. Half the mean: 0.3625.
    loss = ppo.value_loss(T([[0.1, 1.0]]), T([[0.0, 0.0]]), T([[1.0, 1.0]]),
                          torch.ones(1, 2, dtype=torch.bool), clip=0.2)
    torch.testing.assert_close(loss, T(0.3625))


def test_value_loss_keeps_the_worse_one_within_the_clip_it_is_given():
    # Clip 0.5, old 0. Value 1, return 1: near 0.5, 0 against 0.25. Value 2, return 0: near 0.5,
    # 4 against 0.25. Value -0.3, return 0: 0.09. The fourth is masked. Half of 4.34 / 10, or / 3.
    args = (T([[1.0, 2.0, -0.3, 50.0]]), T([[0.0] * 4]), T([[1.0, 0.0, 0.0, 0.0]]),
            T([[True, True, True, False]]))
    torch.testing.assert_close(ppo.value_loss(*args, clip=0.5, denominator=10), T(0.217))
    torch.testing.assert_close(ppo.value_loss(*args, clip=0.5), T(4.34 / 6))


def test_explained_variance():
    returns, mask = T([[1.0, 2.0, 3.0, 77.0]]), T([[True, True, True, False]])
    assert ppo.explained_variance(returns + 5, returns, mask) == 1
    assert ppo.explained_variance(T([[2.0, 2.0, 2.0, 0.0]]), returns, mask) == 0
    turned = ppo.explained_variance(T([[3.0, 2.0, 1.0, 0.0]]), returns, mask)
    torch.testing.assert_close(turned, T(-3.0))


def test_kl_coefficient_by_hand():
    assert ppo.adapt_kl(0.1, 6.6, 6.0, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert ppo.adapt_kl(0.1, 60.0, 6.0, 1000) == pytest.approx(0.1 * 1.02)   # at most a fifth
    assert ppo.adapt_kl(0.1, 0.0, 6.0, 1000) == pytest.approx(0.1 * 0.98)
    assert ppo.adapt_kl(0.1, 6.6, 6.0, 1000, 500) == pytest.approx(0.1 * 1.2)


def test_what_lies_outside_the_mask_counts_for_nothing_even_if_it_is_nan():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    generator = torch.Generator().manual_seed(0)
    clean = [torch.randn(2, 3, generator=generator) for _ in range(4)]

    def figures(tensors):
        a, b, c, d = (x.clone().requires_grad_() for x in tensors)
        rewards = ppo.shape_rewards(torch.tensor([1.0, 2.0]), a, b, mask, 0.1)
        loss, stats = ppo.policy_loss(a, b, c, mask)
        loss = loss + ppo.value_loss(b, c, d, mask)
        loss.backward()
        return [rewards, *ppo.gae(c.detach(), d.detach(), mask), ppo.whiten(a, mask), loss,
                ppo.explained_variance(c, d, mask), *stats.values(), a.grad, b.grad]

    expected = figures([x.masked_fill(~mask, 0.0) for x in clean])
    spoiled = figures([x.masked_fill(~mask, math.nan) for x in clean])
    assert len(expected) == 11
    for one, other in zip(expected, spoiled):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


@pytest.mark.parametrize("mask", [[[True, False, True]], [[False, True, True]],
                                  [[True, True, True], [False, False, False]]])
def test_responses_that_are_empty_or_not_padded_on_the_right_are_refused(mask):
    mask = torch.tensor(mask)
    zeros = torch.zeros(mask.shape)
    with pytest.raises(AssertionError, match="padded on the right"):
        ppo.shape_rewards(torch.zeros(len(mask)), zeros, zeros, mask, 0.1)
