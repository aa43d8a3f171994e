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
from pathlib import Path

import torch

import eval as evaluation
import train_rm
from data import prompts_of, ready, task_of
from nanodistill import ppo, run, settings, weights
from nanodistill.generate import generate
from nanodistill.losses import linear_logprobs
from nanodistill.model import ScalarModel, pack
from nanodistill.reward import score
from nanodistill.settings import Common, flag
from nanodistill.tokenizer import Tokenizer


# ---- config ----

@dataclass
class Config(Common):
    # Sampling.
    steps: int = flag(None, "PPO steps; one step samples a batch and learns from it", least=1)
    prompts: int = flag(None, "questions per step", least=1)
    samples: int = flag(None, "responses to each", least=1)
    temperature: float = flag(1.0, "of sampling and of scoring alike", above=0)
    # Optimization.
    ppo_epochs: int = flag(None, "passes over a step's responses", least=1)
    minibatches: int = flag(4, "optimizer steps per pass", least=1)
    micro_batch: int = flag(0, "responses per forward and backward pass; the gradient does not "
                            "depend on it; 0 = as many as fit the memory", least=0, result=False)
    checkpoint: bool = flag(None, "activation checkpointing: a layer's activations are computed "
                            "again in backward instead of kept; not given: where it must be",
                            result=False)
    learning_rate: float = flag(None, "of the policy", above=0)
    value_learning_rate: float = flag(None, "of the value model", above=0)
    warmup: float = flag(0.05, "share of the steps in which the learning rates rise; then they "
                         "fall to 0 at the last", least=0, most=1)
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm", above=0)
    # The algorithm.
    clip: float = flag(0.2, "the ratio is kept within 1 - clip and 1 + clip", above=0)
    value_clip: float = flag(0.2, "values are kept this near to the old ones", above=0)
    gamma: float = flag(1.0, "discount per token", least=0, most=1)
    lam: float = flag(0.95, "GAE's lambda", least=0, most=1)
    kl_coef: float = flag(0.05, "reward lost per nat of drift from the reference", least=0)
    kl_control: str = flag("fixed", "adaptive: kl_coef follows kl_target", ("fixed", "adaptive"))
    kl_target: float = flag(6.0, "nats per response that adaptive control aims at", above=0)
    kl_limit: float = flag(0.1, "the update ends early when a minibatch's approx_kl passes this "
                           "(nats per token)", above=0)
    # Scores and values.
    score: str = flag(None, "logit: the reward model's output; probability: its sigmoid, for a "
                      "reward model trained with bce; the values likewise",
                      ("logit", "probability"))
    whiten_scores: bool = flag(None, "scores to mean 0 and variance 1 within a step, before the "
                               "KL penalty")
    whiten_advantages: bool = flag(True, "advantages to mean 0 and variance 1 within a step")
    no_eos_penalty: float = flag(None, "taken from the (whitened) score of a response that never "
                                 "ends", least=0)
    value_from: str = flag("reward", "what the value model starts from: the reward model or the "
                           "policy", ("reward", "policy"))
    save_minutes: float = flag(10.0, "time between checkpoints", above=0, result=False)

    def problems(self, given):
        batch = self.prompts * self.samples
        rules = [
            ("kl_target" in given and self.kl_control == "fixed",
             "--kl-target does nothing without --kl-control adaptive"),
            (batch % self.minibatches, f"--prompts x --samples = {batch} responses do not split "
             f"into --minibatches {self.minibatches}")]
        return [message for wrong, message in rules if wrong]


STAGES = {**train_rm.STAGES, "rl": Config, **evaluation.STAGES}


def main(argv=None):
    configs = settings.parse("rl", STAGES, __doc__, argv)
    config = configs["rl"]
    if config.dry_run:
        return print(ready.dry_run("rl", configs))
    if run.finished(config.out, "rl"):
        report = Path(config.out, "report.md")
        run.need(report.exists(), report, "eval.py", config)
        return print(f"\n{report.read_text(encoding='utf-8')}")
    ready.check("rl", configs)
    folder, device, dtype = run.start(configs, "rl")
    batch_size = config.prompts * config.samples
    minibatch = batch_size // config.minibatches
    run.need(weights.complete(folder / "rm"), folder / "rm", "train_rm.py", config)
    run.made_from(folder, "rl", "labels.jsonl", "sft", "rm")

    # ---- data: the questions that have a vote, less the held-out ones ----
    tokenizer, task = Tokenizer(folder / "sft", config.date), task_of(config)
    shape = weights.load_config(folder / "sft")
    voted = {row["id"] for row in run.read_jsonl(folder / "labels.jsonl", "id", "vote")
             if row["vote"] is not None}
    questions = [q for q in task.questions("train")
                 if q["id"] in voted and not run.held_out(q["id"])]
    prompts = prompts_of(task, tokenizer, questions,
                         shape.max_position_embeddings - config.max_new_tokens)
    questions = [q for q in questions if q["id"] in prompts]
    asked = {q["id"]: q["question"] for q in questions}
    if not questions:
        sys.exit(f"{folder / 'labels.jsonl'} holds no vote on a question that is not held out: "
                 "there is nothing to ask.")
    print(f"rl: {len(questions)} questions, {batch_size} responses a step, "
          f"{config.ppo_epochs} x {config.minibatches} minibatches of {minibatch}")
    choice = run.fitted("rl", config, shape, dtype, device, max(map(len, prompts.values())),
                        config.max_new_tokens, batch=minibatch, jobs=batch_size)
    micro_batch, slots = choice.micro_batch, choice.slots

    # ---- models and optimizers: fp32 weights for what is trained, the arithmetic's dtype for what is frozen ----
    policy = weights.load(folder / "sft", device=device).train()
    value_model = weights.load(folder / ("rm" if config.value_from == "reward" else "sft"), ScalarModel, device=device).train()
    for model in (policy.model, value_model.model):
        model.dtype, model.checkpoint = dtype, choice.checkpoint
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

    def describe(micro_batch, rows, responses, response_mask):
        """What the models say of the responses `micro_batch` at a time, those of like length together.

        Returns old_logprobs, entropy, ref_logprobs, old_values (B, R), 0 outside the mask, and scores (B,).
        """
        B, lengths = len(rows), [len(r.tokens) for r in responses]
        grids = [torch.zeros(response_mask.shape, device=device) for _ in range(4)]
        old_logprobs, entropy, ref_logprobs, old_values = (grid.view(-1) for grid in grids)
        scores = torch.zeros(B, device=device)
        by_length = sorted(range(B), key=lambda b: len(rows[b]))
        with torch.no_grad():
            for start in range(0, B, micro_batch):
                some = by_length[start:start + micro_batch]
                some_rows, some_responses = [rows[b] for b in some], [responses[b] for b in some]
                at = places(lengths, some)
                old_logprobs[at], entropy[at] = response_logprobs(policy, some_rows, some_responses)
                ref_logprobs[at], _ = response_logprobs(reference, some_rows, some_responses)
                old_values[at] = response_values(some_rows, some_responses)
                # It has learned one stop token: the first stands for whichever came.
                closed = [row[:-1] + [tokenizer.eos_ids[0]] if r.ended else row
                          for row, r in zip(some_rows, some_responses)]
                scores[torch.tensor(some).to(device)] = squash(score(reward_model, closed))
        return *grids, scores

    def gradients(micro_batch, chosen, rows, responses, old_logprobs, advantages, old_values, returns):
        """Make both models' gradients of the responses `chosen`, `micro_batch` at a time.

        Returns the minibatch's losses and measurements, each a mean over its response tokens.
        """
        policy_optimizer.zero_grad(set_to_none=True)
        value_optimizer.zero_grad(set_to_none=True)
        lengths, stats = [len(r.tokens) for r in responses], {}
        tokens = sum(lengths[b] for b in chosen)
        chosen = sorted(chosen, key=lambda b: len(rows[b]))
        for start in range(0, len(chosen), micro_batch):
            mb = chosen[start:start + micro_batch]
            mb_rows, mb_responses = [rows[b] for b in mb], [responses[b] for b in mb]
            at = places(lengths, mb)
            mb_old_logprobs, mb_advantages, mb_old_values, mb_returns = (
                x.flatten()[at] for x in (old_logprobs, advantages, old_values, returns))
            every = torch.ones_like(at, dtype=torch.bool)            # flat: there is nothing to mask
            mb_logprobs, _ = response_logprobs(policy, mb_rows, mb_responses)
            loss, policy_stats = ppo.policy_loss(mb_logprobs, mb_old_logprobs, mb_advantages, every,
                                                 config.clip, tokens)
            loss.backward()
            mb_values = response_values(mb_rows, mb_responses)
            v_loss = ppo.value_loss(mb_values, mb_old_values, mb_returns, every, config.value_clip,
                                    tokens)
            v_loss.backward()
            for key, value in {**policy_stats, "policy_loss": loss.detach(),
                               "value_loss": v_loss.detach()}.items():
                stats[key] = stats.get(key, 0) + value
        return stats

    # ---- loop ----
    state = run.load_checkpoint(folder / "rl" / "resume.pt", config)
    metrics, watch = run.Metrics(folder, "rl", anew=not state), run.Watch("rl")
    time_to_save = run.every(config.save_minutes)
    if state:
        policy.load_state_dict(state["policy"])
        value_model.load_state_dict(state["value_model"])
        policy_optimizer.load_state_dict(state["policy_optimizer"])
        value_optimizer.load_state_dict(state["value_optimizer"])
        first, kl_coef, seconds = state["step"], state["kl_coef"], state["seconds"]
        micro_batch = min(micro_batch, state["micro_batch"])         # so that sums round as before
        slots = min(slots, state["slots"])
        print(f"rl: going on after step {first}")
    bar = run.Bar(range(first, config.steps), initial=first, total=config.steps, desc="rl",
                  unit="step")
    with run.interruptible() as stop, bar:
        for step in bar:
            # A step's questions, samples and minibatches follow from the seed and the step: a resumed run does the same.
            rng = random.Random(f"rl {config.seed} {step}")
            chosen = rng.sample(questions, min(config.prompts, len(questions)))
            chosen += rng.choices(questions, k=config.prompts - len(chosen))                          # fewer questions than a step wants
            chosen = [q["id"] for q in chosen for _ in range(config.samples)]

            # ---- rollout ----
            responses = [None] * batch_size
            for i, j, sample in generate(policy, [prompts[id_] for id_ in chosen[::config.samples]], n=config.samples,
                                         temperature=config.temperature, max_new_tokens=config.max_new_tokens, slots=slots,
                                         eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, seed=rng.getrandbits(63)):
                responses[i * config.samples + j] = sample
            rows = [prompts[id_] + r.tokens for id_, r in zip(chosen, responses)]
            lengths = [len(r.tokens) for r in responses]
            ended = torch.tensor([r.ended for r in responses]).to(device)                             # (B,)
            response_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)  # (B, R), True = a sampled token

            # ---- scores, logprobs, values, rewards, advantages ----
            (old_logprobs, entropy, ref_logprobs, old_values, scores), micro_batch = \
                run.halve_when_full(describe, micro_batch, "--micro-batch", rows, responses,
                                    response_mask)
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
                    mb_stats, micro_batch = run.halve_when_full(
                        gradients, micro_batch, "--micro-batch", order[start:start + minibatch],
                        rows, responses, old_logprobs, advantages, old_values, returns)
                    if not updates:
                        first_minibatch = mb_stats
                    for key, value in mb_stats.items():
                        stats[key] = stats.get(key, 0) + value
                    updates += 1
                    # The one sync of an update.
                    stopped = not mb_stats["approx_kl"].item() <= config.kl_limit
                    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), config.max_grad_norm)
                             for m in (policy, value_model)]
                    if not stopped:
                        policy_optimizer.step()
                    value_optimizer.step()
                    watch(step, *mb_stats.values(), *norms, kl, scores.sum())
                    policy_optimizer.zero_grad(set_to_none=True)
                    value_optimizer.zero_grad(set_to_none=True)
                    if stopped:
                        break
                if stopped:
                    break
            watch.settle()
            if config.kl_control == "adaptive":
                kl_coef = ppo.adapt_kl(kl_coef, kl.item(), config.kl_target, batch_size)

            # ---- metrics ----
            # By the sampler, flat.
            sampled = torch.tensor([p for r in responses for p in r.logprobs]).to(device)
            gap = sampled - old_logprobs.flatten()[places(lengths, range(batch_size))]
            texts = [tokenizer.decode(r.tokens) if r.ended else "" for r in responses]
            answered = [task.extract_answer(text, asked[id_]) is not None
                        for id_, text in zip(chosen, texts)]
            row = metrics(
                step, score=scores.mean(), rewards=rewards.sum(1).mean(), kl=kl, kl_coef=kl_coef,
                learning_rate=policy_optimizer.param_groups[0]["lr"],
                **{f"first_{key}": first_minibatch[key]
                   for key in ("ratio", "approx_kl", "clipfrac")},
                **{key: value / updates for key, value in stats.items()}, updates=updates,
                sampler_gap=gap.abs().max(),
                explained_variance=ppo.explained_variance(old_values, returns, response_mask),
                entropy=ppo.masked_mean(entropy, response_mask),
                length=sum(lengths) / batch_size, ended=ended.float().mean(),
                answered=sum(answered) / batch_size,
                **evaluation.true_accuracy(task, "train", chosen, texts))
            shown = {"score": "score", "kl": "kl", "true_accuracy": "true", "length": "length"}
            bar.set_postfix({shown[k]: f"{row[k]:.2f}" for k in shown if k in row})

            # ---- save ----
            # Asked once a step: an interrupt between two askings would not be saved.
            stopping = stop()
            if stopping or time_to_save():
                watch.settle(policy, value_model)
                run.save_checkpoint(folder / "rl" / "resume.pt", config, policy=policy.state_dict(), value_model=value_model.state_dict(),
                                    policy_optimizer=policy_optimizer.state_dict(), value_optimizer=value_optimizer.state_dict(),
                                    step=step + 1, kl_coef=kl_coef, micro_batch=micro_batch, slots=slots,
                                    seconds=metrics.seconds(seconds))
            if stopping:
                sys.exit("stopped after saving; the same command goes on from here")
    watch.settle(policy)
    if first < config.steps:
        print(f"rl: in the last step {1 - row['ended']:.1%} of the responses were cut off, "
              f"{row['ended'] - row['answered']:.1%} ended without an answer")
    metrics(config.steps, seconds=metrics.seconds(seconds))
    (folder / "report.md").unlink(missing_ok=True)                   # of an earlier student
    weights.save(policy, folder / "rl", folder / "sft")
    print(f"rl: -> {folder / 'rl'}")
    (folder / "rl" / "resume.pt").unlink(missing_ok=True)
    run.need(False, folder / "report.md", "eval.py", config)


if __name__ == "__main__":
    run.guard(main)
