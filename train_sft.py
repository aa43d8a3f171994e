"""Stage 1, SFT: the student learns to answer as the teacher does where the teacher agrees with
itself.

    python train_sft.py                        the tiny student
    python train_sft.py --epochs 5 --learning-rate 3e-4

Reads teacher.jsonl and labels.jsonl (runs data/teacher.py first if they are missing), trains on the
responses whose answer is the vote, and writes sft/, an HF folder. The loss is the mean
cross-entropy of the response tokens, the EOS included; prompts bear none.

What to look at: the held-out loss (of questions kept out of training). It falls, then stops; with
few questions it rises while accuracy still grows (docs/method.md), so the last weights are kept,
not those of its minimum.
Left out: a learning-rate search.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data import hub, prompts_of, ready, task_of, teacher
from nanodistill import files, lora, optim, parallel, process, responses, run, settings, weights
from nanodistill.losses import linear_cross_entropy
from nanodistill.model import CausalLM
from nanodistill.settings import Training, flag
from nanodistill.tokenizer import Tokenizer


# ---- config ----

@dataclass
class Config(Training):
    epochs: float = flag(None, "passes over the responses", above=0)
    batch_size: int = flag(64, "responses per optimizer step", least=1)
    learning_rate: float = flag(None, "peak; rises over the first steps, then falls linearly to a "
                                "tenth", above=0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises", least=0,
                         most=1)
    weight_decay: float = flag(0.0, "AdamW's", least=0)
    evals_per_epoch: int = flag(2, "held-out evaluations per epoch", least=1)


STAGES = {**teacher.STAGES, "sft": Config}


def main(argv=None):
    configs = settings.parse("sft", STAGES, __doc__, argv)
    config = configs["sft"]
    if config.dry_run:
        return print(ready.dry_run("sft", configs))
    if weights.complete(Path(config.out, "sft")):
        return run.keep(config.out, "sft")
    ready.check("sft", configs)
    folder, device, dtype = run.start(configs, "sft")
    process.need((folder / "labels.jsonl").exists(), folder / "labels.jsonl", "data/teacher.py",
             config)
    source = hub.resolve(config.student, "student", config.revision)
    run.made_from(folder, "sft", "teacher.jsonl", "labels.jsonl", source.resolve())
    train(config, folder, source, device, dtype)


def summed_loss(model, rows, denominator):
    """Cross-entropy of the response tokens of `rows`: their sum divided by `denominator`.

    rows: [(prompt ids, response ids)].
    """
    batch = responses.batch([prompt + response for prompt, response in rows],
                            [len(response) for _, response in rows], range(len(rows)),
                            model.head.device)

    def loss(hidden, head):
        before_each = hidden.index_select(0, batch.packed.last)      # (response tokens, D)
        return linear_cross_entropy(before_each, head, batch.targets, denominator,
                                    ignore_index=None)
    return model(batch.packed, loss)


def gradients(micro_batch, model, optimizer, rows):
    """Make the gradients of a batch's mean loss, `micro_batch` rows at a time; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    tokens, total = sum(len(response) for _, response in rows), 0.0
    for some, real in parallel.micro_batches(rows, micro_batch):
        loss = real * summed_loss(model, some, tokens)
        loss.backward()
        total += loss.detach()
    parallel.sum_gradients(model)
    parallel.sum_(total)
    return total


@torch.no_grad()
def held_out_loss(micro_batch, model, rows):
    """Mean loss of the response tokens; nan where nothing is held out of a small run."""
    tokens = sum(len(response) for _, response in rows)
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    parts = [real * summed_loss(model, some, tokens)
             for some, real in parallel.micro_batches(rows, micro_batch)]
    if not parts:
        return float("nan")
    return sum(sum(part) for part in parallel.gather(torch.stack(parts).tolist()))


def train(config, folder, source, device, dtype):
    # ---- data: (prompt ids, response ids) of each distinct vote-consistent response ----
    tokenizer, task = Tokenizer(source, config.date), task_of(config)
    shape = weights.load_config(source)
    labels = {row["id"]: row["labels"]
              for row in files.read_jsonl(folder / "labels.jsonl", "labels")}
    rows = {row["id"]: row for row in files.read_jsonl(folder / "teacher.jsonl", "id", "responses")}
    rows = [rows[id_] for id_ in sorted(rows.keys() & labels.keys())]
    prompts = prompts_of(task, tokenizer, rows)
    training, held_out, too_long = [], [], 0
    for row in rows:
        split, prompt = held_out if run.held_out(row["id"]) else training, prompts[row["id"]]
        good = {r["text"] for r, label in zip(row["responses"], labels[row["id"]]) if label}
        for text in sorted(good):
            response = tokenizer.encode(text) + [tokenizer.eos_ids[0]]
            if len(prompt) + len(response) <= shape.max_position_embeddings:
                split.append((prompt, response))
            else:
                too_long += 1
    if too_long:
        print(f"sft: {too_long} responses left out: with their questions they exceed the student's "
              f"{shape.max_position_embeddings} positions")
    print(f"sft: {len(training)} responses to train on, {len(held_out)} held out, "
          f"of {len(labels)} questions")
    if not training:
        sys.exit("The vote left no response to train on. Did the teacher's answers end in what the "
                 f"task asks for (look into {folder / 'teacher.jsonl'})? If so: more --questions "
                 "or more --teacher.samples.")
    batch_size = min(config.batch_size, len(training))
    if batch_size < config.batch_size:
        print(f"sft: that is less than one batch of {config.batch_size}: a step takes all of them")
    batches = len(training) // batch_size
    steps = max(int(config.epochs * batches), 1)
    eval_every = max(batches // config.evals_per_epoch, 1)

    # ---- model and optimizer ----
    choice = run.fitted("sft", config, shape, dtype, device,
                        max(len(prompt) for prompt, _ in training + held_out),
                        max(len(response) for _, response in training + held_out), batch=batch_size)
    micro_batch = choice.micro_batch
    model = weights.load_to_train(source, CausalLM, device, dtype, config.lora, choice.shards)
    model.model.checkpoint = choice.checkpoint
    run.compile_layers(steps * batch_size, model)
    if config.lora:
        print(f"sft: {lora.described(model)}")
    optimizer = torch.optim.AdamW(optim.groups(lora.trained(model).values()), lr=0.0,
                                  betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)

    # ---- resume ----
    checkpoint, parts = folder / "sft" / "resume.pt", dict(model=model, optimizer=optimizer)
    state = run.load_checkpoint(checkpoint, config, parts)
    step, seconds = 0, 0.0
    if state:
        step, seconds = state["step"], state["seconds"]
        # At most what it was: then sums round as before.
        micro_batch = min(micro_batch, state["micro_batch"])
        print(f"sft: going on after step {step}")
    metrics, watch = run.Metrics(folder, "sft", anew=not state), run.Watch("sft")
    save = run.saver(checkpoint, config, parts, watch)

    # ---- loop ----
    bar = run.Bar(total=steps, initial=step, desc="sft", unit="step")
    with process.interruptible() as asked_to_stop, bar:
        while True:
            if step % eval_every == 0 or step == steps:
                watch.settle()
                loss, micro_batch = run.halve_when_full(held_out_loss, micro_batch, model, held_out)
                if held_out:
                    watch(step, torch.tensor(loss))
                watch.settle()
                metrics(step, held_out_loss=loss)
                bar.write(f"sft: step {step}, held-out loss {loss:.4f}")
            if step == steps:
                break

            # The order of an epoch follows from the seed and the epoch alone: a resumed run sees
            # the same batches.
            order = list(range(len(training)))
            random.Random(f"{config.seed} {step // batches}").shuffle(order)
            rows = [training[i] for i in order[step % batches * batch_size:][:batch_size]]
            rows.sort(key=lambda row: len(row[0]) + len(row[1]))
            total, micro_batch = run.halve_when_full(gradients, micro_batch, model,
                                                     optimizer, rows)
            rate = config.learning_rate * optim.schedule(step, steps, config.warmup, last=0.1)
            optim.set_rate([optimizer], rate)
            norm = optim.clipped_step(model, [optimizer], config.max_grad_norm)
            step += 1
            watch(step, total, norm)
            bar.update()
            if step % 10 == 0:
                row = metrics(step, loss=total, grad_norm=norm, learning_rate=rate,
                              tokens=sum(len(response) for _, response in rows))
                bar.set_postfix(loss=f"{row['loss']:.4f}")

            save(asked_to_stop(), step=step, micro_batch=micro_batch,
                 seconds=metrics.seconds(seconds))

    # ---- save ----
    watch.settle(model)
    metrics(step, seconds=metrics.seconds(seconds))
    print(f"sft: -> {folder / 'sft'}")
    weights.save(model, folder / "sft", source, base=config.student)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    process.guard(main)
