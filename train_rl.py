"""Stage 3, PPO: the student writes, the reward model scores, and the student learns to write what scores well. The main job.

    python train_rl.py                                     the tiny student, from nothing to the results table
    python train_rl.py --steps 100 --kl-coef 0.1           longer, and closer to the SFT student

Runs whatever stage before it is missing (data/teacher.py, train_sft.py, train_rm.py), then PPO, then eval.py. Writes rl/, an HF folder, and a
line a step to metrics.jsonl. Four models take part: the policy (from sft/), the reference it is kept near to (sft/ again, frozen), the reward model
(rm/, frozen) and the value model (from rm/: it knows already what makes a response good).

One step: sample responses to a batch of training questions; score them; turn scores and the drift from the reference into rewards at each token;
estimate advantages; take a few clipped gradient steps on them.

What to look at: ratio 1 and approx_kl 0 in the first minibatch of each step; score rising; kl (nats a response from the reference) rising slowly; and
true_accuracy, a diagnostic measured against gold that nothing here trains on or decides by: score up with true_accuracy down is reward hacking.
Left out: an entropy bonus, a choice among checkpoints (the last one is the result).
"""

import random
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import TASKS
from eval import true_accuracy
from nanodistill import fit, ppo, run, weights
from nanodistill.generate import generate
from nanodistill.losses import linear_logprobs
from nanodistill.model import ScalarModel, pack
from nanodistill.reward import score
from nanodistill.tokenizer import Tokenizer


# ---- config ----

@dataclass
class Config(run.Common):
    steps: int = run.flag(200, "PPO steps; one step samples a batch and learns from it")
    prompts: int = run.flag(128, "questions a step")
    samples: int = run.flag(2, "responses to each")
    max_new_tokens: int = run.flag(512, "a response is cut off here")
    slots: int = run.flag(64, "sequences sampled at once")
    temperature: float = run.flag(1.0, "of sampling and of scoring alike")
    ppo_epochs: int = run.flag(2, "passes over a step's responses")
    minibatches: int = run.flag(4, "optimizer steps a pass")
    micro_batch: int = run.flag(8, "responses a forward and backward pass; the gradient does not depend on it")
    checkpoint: bool = run.flag(False, "activation checkpointing: a layer's activations are computed again in backward instead of kept")
    learning_rate: float = run.flag(1e-6, "of the policy")
    value_learning_rate: float = run.flag(5e-6, "of the value model")
    warmup: float = run.flag(0.05, "share of the steps in which the learning rates rise; then they fall to 0 at the last")
    max_grad_norm: float = run.flag(1.0, "gradients are scaled down to this norm")
    clip: float = run.flag(0.2, "the ratio is kept within 1 - clip and 1 + clip")
    value_clip: float = run.flag(0.2, "values are kept this near to the old ones")
    gamma: float = run.flag(1.0, "discount a token")
    lam: float = run.flag(0.95, "GAE's lambda")
    kl_coef: float = run.flag(0.05, "reward lost per nat of drift from the reference")
    kl_control: str = run.flag("fixed", "adaptive: kl_coef follows kl_target", ("fixed", "adaptive"))
    kl_target: float = run.flag(6.0, "nats a response that adaptive control aims at")
    kl_limit: float = run.flag(0.1, "the update ends early when a minibatch's approx_kl passes this (nats a token)")
    score: str = run.flag("logit", "logit: the reward model's output; probability: its sigmoid, for a reward model trained with bce; the values likewise", ("logit", "probability"))
    whiten_scores: bool = run.flag(True, "scores to mean 0 and variance 1 within a step, before the KL penalty")
    whiten_advantages: bool = run.flag(True, "advantages to mean 0 and variance 1 within a step")
    no_eos_penalty: float = run.flag(2.0, "taken from the (whitened) score of a response that never ends")
    value_from: str = run.flag("reward", "what the value model starts from: the reward model or the policy", ("reward", "policy"))
    save_every: int = run.flag(20, "steps between checkpoints")


TINY = dict(steps=60, prompts=512, samples=1, max_new_tokens=56, slots=256, ppo_epochs=1, micro_batch=128, learning_rate=2e-4, value_learning_rate=6e-4,
            kl_coef=0.05, score="probability", whiten_scores=False, no_eos_penalty=1.0)


def main(argv=None):
    config = run.parse(Config, __doc__, TINY, argv)
    if config.dry_run:
        return print(fit.report("rl", config))
    folder, device, dtype = run.start(config, "rl")
    batch_size = config.prompts * config.samples
    minibatch = batch_size // config.minibatches
    micro_batch = min(config.micro_batch, minibatch)
    if minibatch * config.minibatches != batch_size or minibatch % micro_batch:
        sys.exit(f"--prompts x --samples = {batch_size} must split into --minibatches {config.minibatches} of whole --micro-batch {config.micro_batch}")
    run.need(folder / "rm" / weights.SINGLE, "train_rm.py", config)
    if (folder / "rl" / weights.SINGLE).exists():
        run.need(folder / "report.md", "eval.py", config)
        sys.exit(f"{folder / 'rl'} is complete; delete it to train again. The table: {folder / 'report.md'}")

    # ---- data: the questions that have a vote, less the held-out ones ----
    tokenizer, task = Tokenizer(folder / "sft"), TASKS[config.task](config.seed, config.data)
    voted = {row["id"] for row in run.read_jsonl(folder / "labels.jsonl") if row["vote"] is not None}
    questions = [q for q in task.questions("train") if q["id"] in voted and not run.held_out(q["id"])]
    prompts = {q["id"]: tokenizer.prompt_ids(task.prompt(q["question"])) for q in questions}
    print(f"rl: {len(questions)} questions, {batch_size} responses a step, {config.ppo_epochs} x {config.minibatches} minibatches of {minibatch}")

    # ---- models and optimizers: fp32 weights for what is trained, the arithmetic's dtype for what is frozen ----
    policy = weights.load(folder / "sft", device=device).train()
    value_model = weights.load(folder / ("rm" if config.value_from == "reward" else "sft"), ScalarModel, device=device).train()
    for model in (policy.model, value_model.model):
        model.dtype, model.checkpoint = dtype, config.checkpoint
    reference = weights.load(folder / "sft", device=device, dtype=dtype).requires_grad_(False)
    reward_model = weights.load(folder / "rm", ScalarModel, device=device, dtype=dtype).requires_grad_(False)
    adam = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    policy_optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, **adam)
    value_optimizer = torch.optim.AdamW(value_model.parameters(), lr=0.0, **adam)
    kl_coef, first, seconds = config.kl_coef, 0, 0.0
    # A probability has a ceiling: a response that is surely good gains nothing more, and the gradient goes to those that are not.
    squash = torch.sigmoid if config.score == "probability" else torch.nn.Identity()

    # What there is for each response token lies in tensors (B, R). Models see some of their rows packed, and give flat tensors of these rows' tokens.
    def predictors(model, rows, counts):
        """Hidden states (or values) at the positions that predict the last `counts` tokens of `rows`, flat."""
        packed = pack([row[:-1] for row in rows], device)
        return model(packed).index_select(0, packed.tail(counts))

    def response_logprobs(model, rows, responses):
        """Logprobs and entropy, flat, of the response tokens at the end of `rows`."""
        hidden, targets = predictors(model.model, rows, [len(r.tokens) for r in responses]), [token for r in responses for token in r.tokens]
        return linear_logprobs(hidden, model.head, torch.tensor(targets).to(device), config.temperature)

    def response_values(rows, responses):
        return squash(predictors(value_model, rows, [len(r.tokens) for r in responses]))

    def places(lengths, chosen):
        """Index, into the (B, R) of all, of the tokens of the responses `chosen`."""
        return torch.cat([torch.arange(lengths[b]) + b * max(lengths) for b in chosen]).to(device)

    # ---- loop ----
    metrics = run.Metrics(folder, "rl")
    state = run.load_checkpoint(folder / "rl" / "resume.pt", config)
    if state:
        policy.load_state_dict(state["policy"])
        value_model.load_state_dict(state["value_model"])
        policy_optimizer.load_state_dict(state["policy_optimizer"])
        value_optimizer.load_state_dict(state["value_optimizer"])
        first, kl_coef, seconds = state["step"], state["kl_coef"], state["seconds"]
        print(f"rl: going on after step {first}")
    with run.interruptible() as stop, tqdm(range(first, config.steps), initial=first, total=config.steps, desc="rl", unit="step") as bar:
        for step in bar:
            # A step's questions, samples and minibatches follow from the seed and the step: a resumed run does the same.
            rng = random.Random(f"rl {config.seed} {step}")
            chosen = rng.sample(questions, min(config.prompts, len(questions)))
            chosen += rng.choices(questions, k=config.prompts - len(chosen))                          # fewer questions than a step wants
            chosen = [q["id"] for q in chosen for _ in range(config.samples)]

            # ---- rollout ----
            responses = [None] * batch_size
            for i, j, sample in generate(policy, [prompts[id_] for id_ in chosen[::config.samples]], n=config.samples,
                                         temperature=config.temperature, max_new_tokens=config.max_new_tokens, slots=config.slots,
                                         eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, seed=rng.getrandbits(63)):
                responses[i * config.samples + j] = sample
            rows = [prompts[id_] + r.tokens for id_, r in zip(chosen, responses)]
            lengths = [len(r.tokens) for r in responses]
            ended = torch.tensor([r.ended for r in responses]).to(device)                             # (B,)
            response_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)  # (B, R), True = a sampled token

            # ---- scores, logprobs, values, rewards, advantages; responses of like lengths together ----
            old_logprobs, entropy, ref_logprobs, old_values = (torch.zeros(response_mask.shape, device=device) for _ in range(4))
            scores = torch.zeros(batch_size, device=device)
            by_length = sorted(range(batch_size), key=lambda b: len(rows[b]))
            with torch.no_grad():
                for start in range(0, batch_size, micro_batch):
                    some = by_length[start:start + micro_batch]
                    some_rows, some_responses, at = [rows[b] for b in some], [responses[b] for b in some], places(lengths, some)
                    old_logprobs.view(-1)[at], entropy.view(-1)[at] = response_logprobs(policy, some_rows, some_responses)
                    ref_logprobs.view(-1)[at], _ = response_logprobs(reference, some_rows, some_responses)
                    old_values.view(-1)[at] = response_values(some_rows, some_responses)
                    scores[torch.tensor(some).to(device)] = squash(score(reward_model, some_rows))
            shaped = ppo.whiten(scores, torch.ones_like(ended)) if config.whiten_scores else scores
            shaped = shaped - config.no_eos_penalty * ~ended
            rewards = ppo.shape_rewards(shaped, old_logprobs, ref_logprobs, response_mask, kl_coef)
            advantages, returns = ppo.gae(rewards, old_values, response_mask, config.gamma, config.lam)
            kl = (ppo.kl_k1(old_logprobs, ref_logprobs) * response_mask).sum(1).mean()                # nats a response
            if config.whiten_advantages:
                advantages = ppo.whiten(advantages, response_mask)

            # ---- update; the noise of the gradients is large, and a falling rate averages it out ----
            rate = min((step + 1) / max(config.warmup * config.steps, 1), 1 - step / config.steps)
            for group in policy_optimizer.param_groups:
                group["lr"] = rate * config.learning_rate
            for group in value_optimizer.param_groups:
                group["lr"] = rate * config.value_learning_rate
            stats, updates, stopped = {}, 0, False
            for epoch in range(config.ppo_epochs):
                order = list(range(batch_size))
                rng.shuffle(order)
                for start in range(0, batch_size, minibatch):
                    tokens = sum(lengths[b] for b in order[start:start + minibatch])
                    sorted_order = sorted(order[start:start + minibatch], key=lambda b: len(rows[b]))
                    mb_stats = {}
                    for begin in range(0, minibatch, micro_batch):
                        mb = sorted_order[begin:begin + micro_batch]
                        mb_rows, mb_responses, at = [rows[b] for b in mb], [responses[b] for b in mb], places(lengths, mb)
                        mb_old_logprobs, mb_advantages, mb_old_values, mb_returns = (x.flatten()[at] for x in (old_logprobs, advantages, old_values, returns))
                        every = torch.ones_like(at, dtype=torch.bool)                                 # flat: there is nothing to mask
                        mb_logprobs, _ = response_logprobs(policy, mb_rows, mb_responses)
                        loss, policy_stats = ppo.policy_loss(mb_logprobs, mb_old_logprobs, mb_advantages, every, config.clip, tokens)
                        loss.backward()
                        mb_values = response_values(mb_rows, mb_responses)
                        v_loss = ppo.value_loss(mb_values, mb_old_values, mb_returns, every, config.value_clip, tokens)
                        v_loss.backward()
                        for key, value in {**policy_stats, "policy_loss": loss.detach(), "value_loss": v_loss.detach()}.items():
                            mb_stats[key] = mb_stats.get(key, 0) + value
                    if not updates:
                        first_minibatch = mb_stats
                    for key, value in mb_stats.items():
                        stats[key] = stats.get(key, 0) + value
                    updates += 1
                    stopped = mb_stats["approx_kl"].item() > config.kl_limit                          # the one sync of an update
                    if not stopped:
                        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                        policy_optimizer.step()
                    torch.nn.utils.clip_grad_norm_(value_model.parameters(), config.max_grad_norm)
                    value_optimizer.step()
                    policy_optimizer.zero_grad(set_to_none=True)
                    value_optimizer.zero_grad(set_to_none=True)
                    if stopped:
                        break
                if stopped:
                    break
            if config.kl_control == "adaptive":
                kl_coef = ppo.adapt_kl(kl_coef, kl.item(), config.kl_target, batch_size)

            # ---- metrics ----
            sampled = torch.tensor([logprob for r in responses for logprob in r.logprobs]).to(device)  # by the sampler, flat
            texts = [tokenizer.decode(r.tokens) if r.ended else "" for r in responses]
            row = metrics(
                step, score=scores.mean(), rewards=rewards.sum(1).mean(), kl=kl, kl_coef=kl_coef, learning_rate=policy_optimizer.param_groups[0]["lr"],
                **{f"first_{key}": first_minibatch[key] for key in ("ratio", "approx_kl", "clipfrac")},
                **{key: value / updates for key, value in stats.items()}, updates=updates,
                sampler_gap=(sampled - old_logprobs.flatten()[places(lengths, range(batch_size))]).abs().max(),
                explained_variance=ppo.explained_variance(old_values, returns, response_mask),
                entropy=ppo.masked_mean(entropy, response_mask), length=sum(lengths) / batch_size, ended=ended.float().mean(),
                true_accuracy=true_accuracy(task, "train", chosen, texts))
            bar.set_postfix(score=f"{row['score']:.2f}", kl=f"{row['kl']:.2f}", true=f"{row['true_accuracy']:.2f}", length=f"{row['length']:.0f}")

            # ---- save ----
            stopping = stop()                                        # asked once a step: an interrupt between two askings would not be saved
            if stopping or (step + 1) % config.save_every == 0:
                run.save_checkpoint(folder / "rl" / "resume.pt", config, policy=policy.state_dict(), value_model=value_model.state_dict(),
                                    policy_optimizer=policy_optimizer.state_dict(), value_optimizer=value_optimizer.state_dict(),
                                    step=step + 1, kl_coef=kl_coef, seconds=metrics.seconds(seconds))
            if stopping:
                sys.exit("stopped after saving; the same command goes on from here")
    metrics(config.steps, seconds=metrics.seconds(seconds))
    weights.save(policy, folder / "rl", folder / "sft")
    print(f"rl: -> {folder / 'rl'}")
    (folder / "report.md").unlink(missing_ok=True)                                                    # of an earlier student
    run.need(folder / "report.md", "eval.py", config)


if __name__ == "__main__":
    main()
