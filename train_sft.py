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
from tqdm import tqdm

from data import TASKS
from nanodistill import fit, run, weights
from nanodistill.losses import linear_cross_entropy
from nanodistill.model import pack
from nanodistill.tokenizer import Tokenizer


# ---- config ----

@dataclass
class Config(run.Common):
    epochs: float = run.flag(3.0, "passes over the responses; the best held-out loss among the evaluations is kept")
    batch_size: int = run.flag(64, "responses an optimizer step")
    micro_batch: int = run.flag(8, "responses a forward and backward pass; the gradient does not depend on it")
    checkpoint: bool = run.flag(False, "activation checkpointing: a layer's activations are computed again in backward instead of kept")
    learning_rate: float = run.flag(1e-5, "peak; rises over the first steps, then falls linearly to a tenth")
    warmup: float = run.flag(0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = run.flag(0.0, "AdamW's")
    max_grad_norm: float = run.flag(1.0, "gradients are scaled down to this norm")
    evals_an_epoch: int = run.flag(2, "held-out evaluations an epoch")


TINY = dict(epochs=3.0, learning_rate=5e-4, micro_batch=64)


def main(argv=None):
    config = run.parse(Config, __doc__, TINY, argv)
    if config.dry_run:
        return print(fit.report("sft", config))
    folder, device, dtype = run.start(config, "sft")
    run.need(folder / "labels.jsonl", "data/teacher.py", config)
    if (folder / "sft" / weights.SINGLE).exists():
        sys.exit(f"{folder / 'sft'} is complete; delete it to train again")

    # ---- data: (prompt ids, response ids) of each distinct vote-consistent response ----
    source = weights.resolve(config.student, "student", config.revision)
    tokenizer, task = Tokenizer(source), TASKS[config.task](config.seed, config.data)
    labels = {row["id"]: row["labels"] for row in run.read_jsonl(folder / "labels.jsonl")}
    train, held_out = [], []
    for row in sorted(run.read_jsonl(folder / "teacher.jsonl"), key=lambda row: row["id"]):
        prompt = tokenizer.prompt_ids(task.prompt(row["question"]))
        good = {r["text"] for r, label in zip(row["responses"], labels.get(row["id"], [])) if label}
        split = held_out if run.held_out(row["id"]) else train
        split += [(prompt, tokenizer.encode(text) + [tokenizer.eos_ids[0]]) for text in sorted(good)]
    print(f"sft: {len(train)} responses to train on, {len(held_out)} held out, of {len(labels)} questions")
    if len(train) < config.batch_size:
        sys.exit(f"That is less than one batch of {config.batch_size}. Did the teacher's answers end in what the task asks for (look into {folder / 'teacher.jsonl'})? "
                 "If so: more --questions, more samples of the teacher, or a smaller --batch-size.")

    # ---- model and optimizer ----
    model = weights.load(source, device=device).train()
    model.model.dtype, model.model.checkpoint = dtype, config.checkpoint
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    batches = len(train) // config.batch_size
    steps = int(config.epochs * batches)
    eval_every = max(batches // config.evals_an_epoch, 1)

    def summed_loss(rows, denominator):
        """Cross-entropy of the response tokens of `rows`, summed, over `denominator`."""
        packed = pack([(prompt + response)[:-1] for prompt, response in rows], device)
        hidden = model.model(packed).index_select(0, packed.tail([len(response) for _, response in rows]))     # (response tokens, D)
        targets = torch.tensor([token for _, response in rows for token in response]).to(device)
        return linear_cross_entropy(hidden, model.head, targets, denominator, ignore_index=None)

    # ---- evaluation ----
    @torch.no_grad()
    def held_out_loss():
        tokens = sum(len(response) for _, response in held_out)
        rows = sorted(held_out, key=lambda row: len(row[0]) + len(row[1]))
        parts = [summed_loss(rows[i:i + config.micro_batch], tokens).item() for i in range(0, len(rows), config.micro_batch)]
        return sum(parts) if parts else float("nan")               # nothing is held out of a small run: the last weights are kept

    # ---- loop ----
    metrics = run.Metrics(folder, "sft")
    step, best, best_weights, seconds = 0, float("inf"), None, 0.0
    state = run.load_checkpoint(folder / "sft" / "resume.pt", config)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, best, best_weights, seconds = state["step"], state["best"], state["best_weights"], state["seconds"]
        print(f"sft: going on after step {step}")
    with run.interruptible() as stop, tqdm(total=steps, initial=step, desc="sft", unit="step") as bar:
        while step < steps:
            if step % eval_every == 0:
                loss = held_out_loss()
                metrics(step, held_out_loss=loss)
                bar.write(f"sft: step {step}, held-out loss {loss:.4f}")
                if loss < best:
                    best, best_weights = loss, {k: v.detach().clone() for k, v in model.state_dict().items()}
            # The order of an epoch follows from the seed and the epoch alone: a resumed run sees the same batches.
            order = list(range(len(train)))
            random.Random(f"{config.seed} {step // batches}").shuffle(order)
            rows = [train[i] for i in order[step % batches * config.batch_size:][:config.batch_size]]
            rows.sort(key=lambda row: len(row[0]) + len(row[1]))
            tokens = sum(len(response) for _, response in rows)
            rate = config.learning_rate * min((step + 1) / max(config.warmup * steps, 1), 1 - 0.9 * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = torch.zeros((), device=device)
            for i in range(0, len(rows), config.micro_batch):
                loss = summed_loss(rows[i:i + config.micro_batch], tokens)
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{metrics(step, loss=total, grad_norm=norm, learning_rate=rate, tokens=tokens)['loss']:.4f}")
            stopping = stop()                                        # asked once a step: an interrupt between two askings would not be saved
            if stopping or step % 500 == 0:
                run.save_checkpoint(folder / "sft" / "resume.pt", config, model=model.state_dict(), step=step, best=best,
                                    optimizer=optimizer.state_dict(), best_weights=best_weights, seconds=metrics.seconds(seconds))
            if stopping:
                sys.exit("stopped after saving; the same command goes on from here")

    # ---- save ----
    loss = held_out_loss()
    if loss > best:
        model.load_state_dict(best_weights)
    metrics(step, held_out_loss=loss, best=min(loss, best), seconds=metrics.seconds(seconds))
    print(f"sft: held-out loss {loss:.4f} at the end, best {min(loss, best):.4f}, kept -> {folder / 'sft'}")
    weights.save(model, folder / "sft", source)
    (folder / "sft" / "resume.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
