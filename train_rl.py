"""Stage 3, PPO: the student writes, the reward model scores, the student learns what scores well.

    python train_rl.py                                the tiny student, from nothing to the table
    python train_rl.py --steps 100 --kl-coef 0.1      longer, and closer to the SFT student
    python train_rl.py --algorithm rloo --samples 4 --reward vote       policy and reference alone

Runs whatever stage before it is missing (data/teacher.py, train_sft.py, train_rm.py), then PPO,
then eval.py. Writes rl/, an HF folder; a line per step to metrics.jsonl, and a few of its
responses, token by token, to rollouts.jsonl. Four models take part:

    policy         from sft/, trained
    reference      sft/ again, frozen: what the policy is kept near to
    reward model   rm/, frozen; with --reward model
    value model    from rm/, trained: it knows already what makes a response good; with ppo

What to look at: ratio 1 and approx_kl 0 in the first minibatch of each step; score rising; kl (nats
per response from the SFT student) rising slowly; and true_accuracy, a diagnostic measured against
gold that nothing here trains on or decides by. Score up with true_accuracy down is reward hacking.
Left out: an entropy bonus; a choice among checkpoints (the last one is the result).
Per-token quantities are (B, R) tensors, padded on the right: B responses, R tokens of the longest.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import train_rm
from data import grading, hub, prompts_of, ready, task_of
from nanodistill import fit, lora, optim, parallel, ppo, process, responses, run, settings, weights
from nanodistill.batches import on_device
from nanodistill.files import read_jsonl
from nanodistill.generate import sample_all
from nanodistill.model import CausalLM, ScalarModel
from nanodistill.reward import score, score_answers, squash_of
from nanodistill.rollouts import writer
from nanodistill.settings import Training, flag
from nanodistill.stats import within
from nanodistill.tokenizer import Tokenizer


# ---- config ----

PPO = "algorithm", "ppo"                    # of flags that no other algorithm reads


@dataclass
class Config(Training):
    # Sampling.
    steps: int = flag(None, "PPO steps; one step samples a batch and learns from it", least=1)
    prompts: int = flag(None, "questions per step", least=1)
    samples: int = flag(None, "responses to each", least=1)
    temperature: float = flag(1.0, "of sampling and of scoring alike", above=0)
    # Optimization.
    ppo_epochs: int = flag(None, "passes over a step's responses", least=1)
    minibatches: int = flag(4, "optimizer steps per pass", least=1)
    learning_rate: float = flag(None, "of the policy", above=0)
    value_learning_rate: float = flag(None, "of the value model", above=0, only=PPO)
    warmup: float = flag(0.05, "share of the steps in which the learning rates rise; then they "
                         "fall linearly towards 0", least=0, most=1)
    # The algorithm.
    algorithm: str = flag("ppo", "what a reward is held against: ppo: what a value model expects, "
                          "token by token; rloo: the mean of the other responses to the question; "
                          "grpo: the mean of all, over their deviation", ("ppo", "rloo", "grpo"))
    clip: float = flag(0.2, "the ratio is kept within 1 - clip and 1 + clip", above=0)
    value_clip: float = flag(0.2, "values are kept this near to the old ones", above=0, only=PPO)
    gamma: float = flag(1.0, "discount per token", least=0, most=1, only=PPO)
    lam: float = flag(0.95, "GAE's lambda", least=0, most=1, only=PPO)
    reference: str = flag("sft", "what the policy is kept near to: the SFT student; or the "
                          "teacher, a local one of the same tokens", ("sft", "teacher"))
    kl_coef: float = flag(0.05, "reward lost per nat of drift from the reference", least=0)
    kl_control: str = flag("fixed", "adaptive: kl_coef follows kl_target", ("fixed", "adaptive"))
    kl_target: float = flag(6.0, "nats per response that adaptive control aims at", above=0,
                            only=("kl_control", "adaptive"))
    kl_limit: float = flag(0.1, "an update ends early above this approx_kl per token", above=0)
    # Scores and values.
    reward: str = flag("model", "the score; model: the reward model's; vote: 1 for the teacher's "
                       "vote; self: 1 for the answer that most responses to the question give in "
                       "the step; function: of Python", ("model", "vote", "self", "function"))
    score: str = flag(None, "the reward model's output, or (after bce) its sigmoid; values alike",
                      ("logit", "probability"))
    whiten_scores: bool = flag(None, "scores to mean 0 and variance 1, before the KL penalty")
    whiten_advantages: bool = flag(True, "advantages to mean 0 and variance 1 within a step")
    no_eos_penalty: float = flag(None, "taken from the (whitened) score of a response that never "
                                 "ends", least=0)
    value_from: str = flag("reward", "the value model at the start", ("reward", "policy"), only=PPO)
    rollouts: int = flag(8, "responses of each step that rollouts.jsonl keeps, token by token",
                         least=0, result=False)

    def problems(self, given):
        batch, (scored, valued) = self.prompts * self.samples, fit.taking_part(self).values()
        rules = [
            ("score" in given and not scored, f"--score does nothing with --reward {self.reward}"),
            (self.lora and self.value_from == "policy", "--value-from policy: not with --lora"),
            (self.reference == "teacher" and (self.lora or self.teacher_url), "--reference teacher"
             ": not with --lora, whose trunk is the reference, nor with a server"),
            (self.samples < 2 and (not valued or self.reward == "self"), f"--samples "
             f"{self.samples}: the responses to a question are compared, 2 at least"),
            (valued and not scored and self.value_from == "reward", f"--reward {self.reward} needs "
             "--value-from policy, for no reward model is trained, or --algorithm rloo"),
            (batch % self.minibatches, f"{batch} responses (--prompts x --samples) do not split "
             f"into --minibatches {self.minibatches}")]
        return [message for wrong, message in rules if wrong]


STAGES = {**train_rm.STAGES, "rl": Config, **grading.STAGES}


def main(argv=None, reward=None):
    """reward: a function (question ids, texts) -> scores, B each; for --reward function."""
    argv = sys.argv[1:] if argv is None else argv
    if reward and "--reward" not in argv:
        argv = [*argv, "--reward", "function"]
    configs = settings.parse("rl", STAGES, __doc__, argv)
    config = configs["rl"]
    if config.dry_run:
        return print(ready.dry_run("rl", configs))
    if weights.complete(Path(config.out, "rl")):
        run.keep(config.out, "rl")
        report = Path(config.out, "report.md")
        process.need(report.exists(), report, "eval.py", config)
        return print(f"\n{report.read_text(encoding='utf-8')}")
    if (config.reward == "function") != bool(reward):
        sys.exit(f"--reward {config.reward}: a function is given in Python, and only then: "
                 "train_rl.main(argv, reward)")
    ready.check("rl", configs)
    folder, device, dtype = run.start(configs, "rl")
    inputs = ["sft"] + ["rm"] * (config.reward == "model")
    process.need(weights.complete(folder / inputs[-1]), folder / inputs[-1],
                 f"train_{inputs[-1]}.py", config)
    teacher = (hub.resolve(config.teacher, "teacher", config.teacher_revision).resolve()
               if config.reference == "teacher" else None)
    run.made_from(folder, "rl", "labels.jsonl", *inputs, *filter(None, [teacher]))
    train(config, folder, device, dtype, reward, teacher)
    process.need(False, folder / "report.md", "eval.py", config)


@dataclass
class Experience:
    """What an update learns from."""
    rows: list                              # B lists of token ids, prompt + response
    counts: list                            # B numbers: tokens of each response
    response_mask: torch.Tensor             # (B, R), True = a sampled token, the EOS included
    old_logprobs: torch.Tensor              # (B, R) of the policy that sampled
    old_values: torch.Tensor                # (B, R) of the value model then; 0 without one
    advantages: torch.Tensor                # (B, R)
    returns: torch.Tensor                   # (B, R)


def describe(micro_batch, config, models, rows, counts, scored_rows):
    """What the models say of B responses, `micro_batch` at a time: old_logprobs, entropy,
    ref_logprobs, old_values (B, R), and scores (B,) of `scored_rows`; 0 where there is none."""
    policy, reference, reward_model, value_model = models
    B, R, device, squash = len(rows), max(counts), policy.head.device, squash_of(config)
    said = [*torch.zeros(4, B, R, device=device), torch.zeros(B, device=device)]
    with torch.no_grad():
        for mb, real in responses.alike(range(B), rows, micro_batch):
            batch = responses.batch(rows, counts, mb, device)
            found = (*responses.logprobs(policy, batch, config.temperature),
                     responses.logprobs(reference, batch, config.temperature)[0],
                     responses.values(value_model, batch, squash) if value_model else 0,
                     squash(score(reward_model, [scored_rows[b] for b in mb]))
                     if reward_model else 0)
            for x, its in zip(said, found):
                x[batch.at] += real * its
    # Each process has filled in its own responses.
    parallel.sum_(*said)
    return said


def gradients(micro_batch, config, models, optimizers, minibatch, experience):
    """Make the gradients of a minibatch's losses, `micro_batch` responses at a time; returns
    losses and measurements, each a mean over the minibatch's response tokens."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    (policy, _, _, value_model), e = models, experience
    # Every loss is divided by this: the gradient is the same whatever the micro-batch.
    tokens, parts = sum(e.counts[b] for b in minibatch), []
    for mb, real in responses.alike(minibatch, e.rows, micro_batch):
        batch = responses.batch(e.rows, e.counts, mb, policy.head.device)
        at, mb_mask = batch.at, e.response_mask[batch.at] & (real > 0)         # (micro_batch, R)
        new_logprobs, _ = responses.logprobs(policy, batch, config.temperature)
        policy_loss, measured = ppo.policy_loss(
            new_logprobs, e.old_logprobs[at], e.advantages[at], mb_mask, config.clip, tokens)
        policy_loss.backward()
        parts.append({**measured, "policy_loss": policy_loss.detach()})
        if value_model:
            new_values = responses.values(value_model, batch, squash_of(config))
            value_loss = ppo.value_loss(
                new_values, e.old_values[at], e.returns[at], mb_mask, config.value_clip, tokens)
            value_loss.backward()
            parts[-1]["value_loss"] = value_loss.detach()
    measured = ppo.total(parts)
    parallel.sum_gradients(*filter(None, (policy, value_model)))
    parallel.sum_(*measured.values())
    return measured


def train(config, folder, device, dtype, reward=None, teacher=None):
    """reward: see `main`. teacher: the folder of a reference that is not the SFT student."""
    B, (scored, valued) = config.prompts * config.samples, fit.taking_part(config).values()
    minibatch_size = B // config.minibatches

    # ---- data: the questions that have a vote, if one is needed, less the held-out ones ----
    tokenizer, task = Tokenizer(folder / "sft", config.date), task_of(config)
    shape = weights.load_config(folder / "sft")
    votes = {row["id"]: row["vote"] for row in read_jsonl(folder / "labels.jsonl", "id", "vote")
             if row["vote"] is not None or config.reward in ("self", "function")}
    questions = [q for q in task.questions("train")
                 if q["id"] in votes and not run.held_out(q["id"])]
    prompts = prompts_of(task, tokenizer, questions,
                         shape.max_position_embeddings - config.max_new_tokens)
    asked = {q["id"]: q["question"] for q in questions}
    if not prompts:
        sys.exit(f"{folder / 'labels.jsonl'} holds no vote on a question that is not held out.")
    print(f"rl: {len(prompts)} questions, {B} responses per step, "
          f"{config.ppo_epochs} x {config.minibatches} minibatches of {minibatch_size}")
    choice = run.fitted("rl", config, shape, dtype, device, max(map(len, prompts.values())),
                        config.max_new_tokens, batch=minibatch_size, jobs=B,
                        reference=teacher and weights.load_config(teacher))
    micro_batch, slots = choice.micro_batch, choice.slots

    # ---- models: what is trained is fp32, what is frozen has the arithmetic's dtype ----
    shards = choice.shards                     # over how many processes weights are split
    reference = weights.load(teacher or folder / "sft", CausalLM, device, dtype, shards)
    reward_model = value_model = None
    if config.lora:
        # One trunk: the reference is it, the others are its weights and an adapter.
        policy = lora.adapt(lora.share(reference), config.lora)
        reward_model, value_model = (
            weights.load_adapter(folder / "rm" / "adapter", reference, ScalarModel) if there
            else None for there in (scored, valued))
        print(f"rl: {lora.described(policy)}")
    else:
        policy = weights.load_to_train(folder / "sft", CausalLM, device, dtype, 0, shards)
        if scored:
            reward_model = weights.load(folder / "rm", ScalarModel, device, dtype, shards)
        if valued:
            value_from = folder / ("rm" if config.value_from == "reward" else "sft")
            value_model = weights.load_to_train(value_from, ScalarModel, device, dtype, 0, shards)
    for model in filter(None, (reference, reward_model)):
        model.requires_grad_(False)
    models = policy, reference, reward_model, value_model
    run.compile_layers(config.steps * B, *filter(None, models))
    trained = {"policy": policy} | ({"value_model": value_model} if value_model else {})
    rates = {"policy": config.learning_rate, "value_model": config.value_learning_rate}
    optimizers = {name: torch.optim.AdamW(
        optim.groups(lora.trained(model).values()), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0,
        fused=True) for name, model in trained.items()}
    for model in trained.values():
        model.model.checkpoint = choice.checkpoint

    # ---- resume ----
    checkpoint = folder / "rl" / "resume.pt"
    parts = {**trained, **{f"{name}_optimizer": o for name, o in optimizers.items()}}
    state = run.load_checkpoint(checkpoint, config, parts)
    first, kl_coef, seconds = 0, config.kl_coef, 0.0
    if state:
        first, kl_coef, seconds = (state[k] for k in ("step", "kl_coef", "seconds"))
        # At most what it was: then sums round as before.
        micro_batch, slots = min(micro_batch, state["micro_batch"]), min(slots, state["slots"])
        print(f"rl: going on after step {first}")
    metrics, watch = run.Metrics(folder, "rl", anew=not state), run.Watch("rl")
    keep = writer(folder / "rollouts.jsonl", config.rollouts, tokenizer, anew=not state)
    save = run.saver(checkpoint, config, parts, watch)

    # ---- loop ----
    bar = run.Bar(range(first, config.steps), initial=first, total=config.steps, desc="rl",
                  unit="step")
    with process.interruptible() as asked_to_stop, bar:
        for step in bar:
            # Questions, samples and minibatches follow from the seed and the step alone: a resumed
            # run repeats them.
            rng = random.Random(f"rl {config.seed} {step}")

            # ---- 1. rollout: the policy answers a batch of questions ----
            chosen = rng.sample([*prompts], min(config.prompts, len(prompts)))
            # There may be fewer questions than a step wants.
            chosen += rng.choices([*prompts], k=config.prompts - len(chosen))
            ids = [id_ for id_ in chosen for _ in range(config.samples)]       # B
            samples = sample_all(
                policy, [prompts[id_] for id_ in chosen], n=config.samples,
                temperature=config.temperature, max_new_tokens=config.max_new_tokens, slots=slots,
                eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, seed=rng.getrandbits(63))
            rows = [prompts[id_] + s.tokens for id_, s in zip(ids, samples)]
            counts = [len(s.tokens) for s in samples]
            texts = [tokenizer.decode(s.tokens) if s.ended else "" for s in samples]
            answers = [task.extract_answer(text, asked[id_]) for id_, text in zip(ids, texts)]
            ended, = on_device(device, [s.ended for s in samples])             # (B,)
            response_mask = responses.mask(counts, device)                     # (B, R)

            # ---- 2. what the four models say of the responses, before anything is learned ----
            # The reward model has learned one stop token: it stands for whichever came.
            closed = [row[:-1] + [tokenizer.eos_ids[0]] if s.ended else row
                      for row, s in zip(rows, samples)]
            said, micro_batch = run.halve_when_full(describe, micro_batch, config, models, rows,
                                                    counts, closed)
            old_logprobs, entropy, ref_logprobs, old_values, scores = said
            if not reward_model:
                said = score_answers(config, votes, reward, ids, texts, answers)
                scores, = on_device(device, said)                              # (B,)

            # ---- 3. rewards: the score at the last token, less the drift from the reference ----
            shaped = ppo.whiten(scores, torch.ones_like(ended)) if config.whiten_scores else scores
            shaped = shaped - config.no_eos_penalty * ~ended
            rewards = ppo.shape_rewards(shaped, old_logprobs, ref_logprobs, response_mask, kl_coef)
            kl = (ppo.kl_k1(old_logprobs, ref_logprobs) * response_mask).sum(1).mean()    # nats

            # ---- 4. advantages: what came after each token, less what was expected before it ----
            if value_model:
                advantages, returns = ppo.gae(rewards, old_values, response_mask, config.gamma,
                                              config.lam)
            else:
                advantages = returns = ppo.group_advantages(
                    rewards, response_mask, config.samples, config.algorithm, shaped)
            if config.whiten_advantages:
                # A group's mean is 0 already: without that, where all are alike would teach too.
                advantages = ppo.whiten(advantages, response_mask, shift_mean=bool(value_model))
            experience = Experience(rows, counts, response_mask, old_logprobs, old_values,
                                    advantages, returns)

            # ---- 5. update: clipped gradient steps, until the policy has moved far enough ----
            # The gradients are noisy, and a falling rate averages the noise out.
            rate = optim.schedule(step, config.steps, config.warmup, last=0.0)
            for name, optimizer in optimizers.items():
                optim.set_rate([optimizer], rate * rates[name])
            history = []                                  # what each minibatch measured
            for minibatch in responses.minibatches(B, minibatch_size, config.ppo_epochs, rng):
                measured, micro_batch = run.halve_when_full(
                    gradients, micro_batch, config, models, optimizers.values(), minibatch,
                    experience)
                history.append(measured)
                # NaN exceeds too.
                kl_exceeded = not measured["approx_kl"].item() <= config.kl_limit
                norms = [optim.clipped_step(model, [optimizers[name]], config.max_grad_norm)
                         for name, model in trained.items()
                         if not (kl_exceeded and model is policy)]
                watch(step, *measured.values(), *norms, kl, scores.sum())
                if kl_exceeded:
                    optimizers["policy"].zero_grad(set_to_none=True)
                    break
            watch.settle()
            if config.kl_control == "adaptive":
                kl_coef = ppo.adapt_kl(kl_coef, kl.item(), config.kl_target, B)

            # ---- metrics ----
            by_sampler, = on_device(device, [p for s in samples for p in s.logprobs])
            by_sampler = old_logprobs.masked_scatter(response_mask, by_sampler)    # (B, R)
            right = [task.equal(a, votes[id_]) for a, id_ in zip(answers, ids)]     # by the vote
            its_scores = scores.tolist()
            row = metrics(
                step, score=scores.mean(), rewards=rewards.sum(1).mean(), kl=kl, kl_coef=kl_coef,
                learning_rate=rate * config.learning_rate,
                **{f"first_{key}": history[0][key] for key in ("ratio", "approx_kl", "clipfrac")},
                **{key: value / len(history) for key, value in ppo.total(history).items()},
                updates=len(history), sampler_gap=(by_sampler - old_logprobs).abs().max(),
                sampler_kl=ppo.masked_mean(ppo.kl_k3(by_sampler, old_logprobs), response_mask),
                **({"explained_variance": ppo.explained_variance(
                    old_values, returns, response_mask)} if value_model else {}),
                entropy=ppo.masked_mean(entropy, response_mask), length=sum(counts) / B,
                ended=ended.float().mean(), answered=sum(a is not None for a in answers) / B,
                **within(ids, its_scores, right),
                **{f"vote_{key}": value for key, value in within(ids, right, right).items()},
                **task.true_accuracy("train", ids, texts))
            keep(step, [s.tokens for s in samples], id=ids, question=[asked[id_] for id_ in ids],
                 answer=answers, vote=[votes[id_] for id_ in ids], right=right, score=its_scores,
                 ended=[s.ended for s in samples], logprobs=old_logprobs, entropy=entropy,
                 ref_logprobs=ref_logprobs, rewards=rewards, advantages=advantages,
                 returns=returns, **({"values": old_values} if value_model else {}))
            shown = ("score", "kl", "true_accuracy", "length")
            bar.set_postfix({key: f"{row[key]:.2f}" for key in shown if key in row})

            save(asked_to_stop(), step=step + 1, kl_coef=kl_coef, micro_batch=micro_batch,
                 slots=slots, seconds=metrics.seconds(seconds))
    watch.settle(policy)
    if first < config.steps:
        print(f"rl: in the last step {1 - row['ended']:.1%} of the responses were cut off, "
              f"{row['ended'] - row['answered']:.1%} ended without an answer")
    metrics(config.steps, seconds=metrics.seconds(seconds))
    for name in ("report.md", "report.html"):                     # of an earlier student
        (folder / name).unlink(missing_ok=True)
    weights.save(policy, folder / "rl", folder / "sft", base=folder / "sft")
    print(f"rl: -> {folder / 'rl'}")
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    process.guard(main)
