"""Stage 1, SFT: the student learns to answer as the teacher does where the teacher agrees with itself.

    python train_sft.py                        the tiny student
    python train_sft.py --epochs 5 --learning-rate 3e-4

Reads teacher.jsonl and labels.jsonl (runs data/teacher.py first if they are missing), trains on the responses whose answer is the vote,
and writes sft/, an HF folder. The loss is the mean cross-entropy of the response tokens, the EOS included; prompts bear none.

What to look at: the held-out loss (questions kept out of training) falls, then stops. The weights kept are those of its minimum. The longer
schedules that were tried on tiny models reached no lower loss than three passes (docs/log.md).
Left out: a learning-rate search.
"""

import random
import sys
from dataclasses import dataclass

import torch

from data import hub, prompts_of, ready, task_of, teacher
from nanodistill import run, settings, weights
from nanodistill.losses import linear_cross_entropy
from nanodistill.model import pack
from nanodistill.settings import Common, flag
from nanodistill.tokenizer import Tokenizer


# ---- config ----

@dataclass
class Config(Common):
    epochs: float = flag(None, "passes over the responses; the best held-out loss among the "
                         "evaluations is kept", above=0)
    batch_size: int = flag(64, "responses per optimizer step", least=1)
    micro_batch: int = flag(0, "responses per forward and backward pass; the gradient does not "
                            "depend on it; 0 = as many as fit the memory", least=0, result=False)
    checkpoint: bool = flag(None, "activation checkpointing: a layer's activations are computed "
                            "again in backward instead of kept; not given: where it must be",
                            result=False)
    learning_rate: float = flag(None, "peak; rises over the first steps, then falls linearly to a "
                                "tenth", above=0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises", least=0,
                         most=1)
    weight_decay: float = flag(0.0, "AdamW's", least=0)
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm", above=0)
    evals_an_epoch: int = flag(2, "held-out evaluations per epoch", least=1)
    save_minutes: float = flag(10.0, "time between checkpoints", above=0, result=False)


STAGES = {**teacher.STAGES, "sft": Config}


def main(argv=None):
    configs = settings.parse("sft", STAGES, __doc__, argv)
    config = configs["sft"]
    if config.dry_run:
        return print(ready.dry_run("sft", configs))
    if run.finished(config.out, "sft"):
        return
    ready.check("sft", configs)
    folder, device, dtype = run.start(configs, "sft")
    run.need((folder / "labels.jsonl").exists(), folder / "labels.jsonl", "data/teacher.py",
             config)
    source = hub.resolve(config.student, "student", config.revision)
    run.made_from(folder, "sft", "teacher.jsonl", "labels.jsonl", source.resolve())

    # ---- data: (prompt ids, response ids) of each distinct vote-consistent response ----
    tokenizer, task = Tokenizer(source, config.date), task_of(config)
    labels = {row["id"]: row["labels"] for row in run.read_jsonl(folder / "labels.jsonl", "labels")}
    rows = {row["id"]: row for row in run.read_jsonl(folder / "teacher.jsonl", "id", "responses")}
    rows = [rows[id_] for id_ in sorted(rows.keys() & labels.keys())]
    prompts = prompts_of(task, tokenizer, rows)
    train, held_out, longest = [], [], weights.load_config(source).max_position_embeddings
    for row in rows:
        good = {r["text"] for r, label in zip(row["responses"], labels[row["id"]]) if label}
        split = held_out if run.held_out(row["id"]) else train
        split += [(prompts[row["id"]], tokenizer.encode(text) + [tokenizer.eos_ids[0]])
                  for text in sorted(good)]
    for split in (train, held_out):
        fitting = [row for row in split if len(row[0]) + len(row[1]) <= longest]
        if len(fitting) < len(split):
            print(f"sft: {len(split) - len(fitting)} responses left out: with their questions they "
                  f"exceed the student's {longest} positions")
        split[:] = fitting
    print(f"sft: {len(train)} responses to train on, {len(held_out)} held out, "
          f"of {len(labels)} questions")
    if not train:
        sys.exit("The vote left no response to train on. Did the teacher's answers end in what the "
                 f"task asks for (look into {folder / 'teacher.jsonl'})? If so: more --questions or "
                 "more --teacher.samples.")
    batch_size = min(config.batch_size, len(train))
    if batch_size < config.batch_size:
        print(f"sft: that is less than one batch of {config.batch_size}: a step takes all of them")

    # ---- model and optimizer ----
    choice = run.fitted("sft", config, weights.load_config(source), dtype, device,
                        max(len(prompt) for prompt, _ in train + held_out),
                        max(len(response) for _, response in train + held_out), batch=batch_size)
    model = weights.load(source, device=device).train()
    model.model.dtype, model.model.checkpoint = dtype, choice.checkpoint
    micro_batch = choice.micro_batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    batches = len(train) // batch_size
    steps = max(int(config.epochs * batches), 1)
    eval_every = max(batches // config.evals_an_epoch, 1)

    def summed_loss(rows, denominator):
        """Cross-entropy of the response tokens of `rows`, summed, over `denominator`."""
        packed = pack([(prompt + response)[:-1] for prompt, response in rows], device)
        hidden = model.model(packed).index_select(0, packed.tail([len(response) for _, response in rows]))     # (response tokens, D)
        targets = torch.tensor([token for _, response in rows for token in response]).to(device)
        return linear_cross_entropy(hidden, model.head, targets, denominator, ignore_index=None)

    def gradients(micro_batch, rows):
        """Make the gradients of the batch's mean loss, some rows at a time; returns the loss."""
        optimizer.zero_grad(set_to_none=True)
        tokens, total = sum(len(response) for _, response in rows), torch.zeros((), device=device)
        for i in range(0, len(rows), micro_batch):
            loss = summed_loss(rows[i:i + micro_batch], tokens)
            loss.backward()
            total += loss.detach()
        return total

    # ---- evaluation ----
    @torch.no_grad()
    def held_out_loss(micro_batch):
        tokens = sum(len(response) for _, response in held_out)
        rows = sorted(held_out, key=lambda row: len(row[0]) + len(row[1]))
        parts = [summed_loss(rows[i:i + micro_batch], tokens).item()
                 for i in range(0, len(rows), micro_batch)]
        return sum(parts) if parts else float("nan")               # nothing is held out of a small run: the last weights are kept

    # ---- loop ----
    step, best, best_weights, seconds = 0, float("inf"), None, 0.0
    state = run.load_checkpoint(folder / "sft" / "resume.pt", config)
    metrics, watch = run.Metrics(folder, "sft", anew=not state), run.Watch("sft")
    time_to_save = run.every(config.save_minutes)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, best, best_weights, seconds = (
            state[k] for k in ("step", "best", "best_weights", "seconds"))
        micro_batch = min(micro_batch, state["micro_batch"])         # so that sums round as before
        print(f"sft: going on after step {step}")
    bar = run.Bar(total=steps, initial=step, desc="sft", unit="step")
    with run.interruptible() as stop, bar:
        while step < steps:
            if step % eval_every == 0:
                watch.settle()
                loss, micro_batch = run.halve_when_full(held_out_loss, micro_batch, "--micro-batch")
                watch(step, torch.tensor(loss if held_out else 0.0))
                watch.settle()
                metrics(step, held_out_loss=loss)
                bar.write(f"sft: step {step}, held-out loss {loss:.4f}")
                if loss < best:
                    best, best_weights = loss, weights.on_host(model)
            # The order of an epoch follows from the seed and the epoch alone: a resumed run sees the same batches.
            order = list(range(len(train)))
            random.Random(f"{config.seed} {step // batches}").shuffle(order)
            rows = [train[i] for i in order[step % batches * batch_size:][:batch_size]]
            rows.sort(key=lambda row: len(row[0]) + len(row[1]))
            rate = config.learning_rate * min((step + 1) / max(config.warmup * steps, 1), 1 - 0.9 * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total, micro_batch = run.halve_when_full(gradients, micro_batch, "--micro-batch", rows)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            watch(step, total, norm)
            bar.update()
            if step % 10 == 0:
                row = metrics(step, loss=total, grad_norm=norm, learning_rate=rate,
                              tokens=sum(len(response) for _, response in rows))
                bar.set_postfix(loss=f"{row['loss']:.4f}")
            # Asked once a step: an interrupt between two askings would not be saved.
            stopping = stop()
            if stopping or time_to_save():
                watch.settle(model)
                run.save_checkpoint(folder / "sft" / "resume.pt", config, model=model.state_dict(), step=step, best=best, micro_batch=micro_batch,
                                    optimizer=optimizer.state_dict(), best_weights=best_weights, seconds=metrics.seconds(seconds))
            if stopping:
                sys.exit("stopped after saving; the same command goes on from here")

    # ---- save ----
    watch.settle(model)
    loss, micro_batch = run.halve_when_full(held_out_loss, micro_batch, "--micro-batch")
    watch(step, torch.tensor(loss if held_out else 0.0))
    watch.settle()
    if loss > best:
        model.load_state_dict(best_weights, strict=False)
    metrics(step, held_out_loss=loss, best=min(loss, best), seconds=metrics.seconds(seconds))
    print(f"sft: held-out loss {loss:.4f} at the end, best {min(loss, best):.4f}, kept -> {folder / 'sft'}")
    weights.save(model, folder / "sft", source)
    (folder / "sft" / "resume.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    run.guard(main)
