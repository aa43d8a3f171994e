"""Stage 2, reward model: learns the vote's labels from teacher and student responses alike.

    python train_rm.py                                   the tiny student
    python train_rm.py --rm-data teacher --rm-loss bt    without the student's own responses; Bradley-Terry pairs

Reads teacher.jsonl, labels.jsonl and sft/ (runs the stages before it if something is missing). Samples the SFT student on the training
questions into student.jsonl, labels those responses by the teacher's vote, and trains the SFT student's trunk with a scalar head on both.
Writes rm/, an HF folder. PPO will ask for scores of what the *student* writes, which is why its responses belong into the data.

What to look at: AUC on held-out student responses (0.5 is chance, 1 ranks every good response above every bad one), its calibration (ours is a
probability: of the responses with sigmoid(score) 0.8, about 80% should be good), and the last line, which shows that a score does not depend on
padding. The weights kept are those of the best held-out AUC on student responses. The score is the output at the last token; with bce, earlier
tokens learn to foresee it (arXiv 2110.14168 found this to help its verifiers), which is also what the value model of PPO starts from. The loss and
the base (the SFT student) are our choice, not the paper's.
"""

import random
import sys
from dataclasses import dataclass

import torch

import train_sft
from data import prompts_of, ready, response_ids, task_of
from data.teacher import collect, local, shares
from nanodistill import run, settings, weights
from nanodistill.model import ScalarModel, pack
from nanodistill.reward import bce_loss, bt_loss, calibration, measure, score, score_sequences
from nanodistill.settings import Common, flag
from nanodistill.tokenizer import Tokenizer


# ---- config ----

@dataclass
class Config(Common):
    samples: int = flag(None, "responses of the SFT student per question", least=1)
    rm_data: str = flag("both", "whose responses are trained on", ("teacher", "student", "both"))
    rm_loss: str = flag("bce", "bce: good or not, each by itself; bt: a good one above a bad one "
                        "of the same question", ("bce", "bt"))
    token_loss: float = flag(0.5, "with bce: weight of the same loss at the response's earlier "
                             "tokens, which predict the outcome; 0 = the last token alone", least=0)
    epochs: float = flag(1.0, "passes over the responses (over the questions' pairs for bt)",
                         above=0)
    batch_size: int = flag(None, "responses (or pairs) per optimizer step", least=1)
    micro_batch: int = flag(0, "responses (or pairs) per forward and backward pass; the gradient "
                            "does not depend on it; 0 = as many as fit the memory", least=0,
                            result=False)
    checkpoint: bool = flag(None, "activation checkpointing: a layer's activations are computed "
                            "again in backward instead of kept; not given: where it must be",
                            result=False)
    optimizer: str = flag(None, "muon: orthogonalised updates for the layers' matrices, AdamW for "
                          "the rest", ("adamw", "muon"))
    learning_rate: float = flag(None, "peak; rises over the first steps, then falls linearly to a "
                                "tenth", above=0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises", least=0,
                         most=1)
    weight_decay: float = flag(0.0, "AdamW's", least=0)
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm", above=0)
    evals: int = flag(6, "held-out evaluations in the whole run", least=1)
    save_minutes: float = flag(10.0, "time between checkpoints", above=0, result=False)

    def problems(self, given):
        idle = "token_loss" in given and self.rm_loss == "bt"
        return ["--token-loss does nothing with --rm-loss bt"] * idle


STAGES = {**train_sft.STAGES, "rm": Config}


def main(argv=None):
    configs = settings.parse("rm", STAGES, __doc__, argv)
    config = configs["rm"]
    if config.dry_run:
        return print(ready.dry_run("rm", configs))
    if run.finished(config.out, "rm"):
        return
    ready.check("rm", configs)
    folder, device, dtype = run.start(configs, "rm")
    run.need(weights.complete(folder / "sft"), folder / "sft", "train_sft.py", config)

    # ---- data: the student's samples, then {source: [(question id, prompt length, prompt +
    # response ids, label)]}, trained on and held out ----
    tokenizer, task = Tokenizer(folder / "sft", config.date), task_of(config)
    shape = weights.load_config(folder / "sft")
    votes = {row["id"]: row["vote"] for row in run.read_jsonl(folder / "labels.jsonl", "id", "vote")
             if row["vote"] is not None}
    teacher_rows = {row["id"]: row
                    for row in run.read_jsonl(folder / "teacher.jsonl", "id", "responses")}
    teacher_rows = [teacher_rows[id_] for id_ in sorted(teacher_rows.keys() & votes.keys())]
    prompts = prompts_of(task, tokenizer, teacher_rows,
                         shape.max_position_embeddings - config.max_new_tokens)
    teacher_rows = [row for row in teacher_rows if row["id"] in prompts]
    if not prompts:
        sys.exit(f"{folder / 'labels.jsonl'} holds no vote: there is nothing to learn from.")
    batch_size = config.batch_size
    choice = run.fitted("rm", config, shape, dtype, device,
                        max(map(len, prompts.values())), config.max_new_tokens,
                        batch=batch_size * (1 + (config.rm_loss == "bt")),
                        jobs=len(prompts) * config.samples)
    micro_batch = choice.micro_batch
    run.made_from(folder, "student.jsonl", "sft")
    sampler = local(weights.load(folder / "sft", device=device, dtype=dtype), tokenizer, task,
                    config.max_new_tokens, choice.slots)
    student_rows = collect(
        folder / "student.jsonl", [{k: row[k] for k in ("id", "question")} for row in teacher_rows],
        task, sampler, [1.0] * config.samples, "student", keep_tokens=True)
    del sampler
    run.made_from(folder, "rm", "teacher.jsonl", "labels.jsonl", "student.jsonl", "sft")
    train, held_out = {"teacher": [], "student": []}, {"teacher": [], "student": []}
    for source, rows in (("teacher", teacher_rows), ("student", student_rows)):
        for row in rows:
            prompt = prompts[row["id"]]
            split = held_out if run.held_out(row["id"]) else train
            for r in (r for r in row["responses"] if "failed" not in r):
                ids = prompt + response_ids(tokenizer, r)
                if len(ids) <= shape.max_position_embeddings:
                    split[source].append((row["id"], len(prompt), ids,
                                          task.equal(r["answer"], votes[row["id"]])))
    examples = [e for source, rows in train.items() if config.rm_data in (source, "both") for e in rows]
    if config.rm_loss == "bt":                                     # as many pairs a question as its rarer kind allows
        by_question = {}
        for id_, _, ids, label in examples:
            by_question.setdefault(id_, {True: [], False: []})[label].append(ids)
        shuffler = random.Random(config.seed)
        examples = []
        for kinds in by_question.values():
            shuffler.shuffle(kinds[True]), shuffler.shuffle(kinds[False])
            examples += [(good, bad) for good, bad in zip(kinds[True], kinds[False])]
    print(f"rm: {len(examples)} {'pairs' if config.rm_loss == 'bt' else 'responses'} to train on; held out "
          + ", ".join(f"{len(rows)} of the {source}, {sum(label for *_, label in rows) / max(len(rows), 1):.0%} good" for source, rows in held_out.items()))
    if not examples:
        sys.exit("That leaves nothing to train on: more --questions or more samples.")
    if len(examples) < batch_size:
        batch_size = len(examples)
        print(f"rm: that is less than one batch of {config.batch_size}: a step takes all of them")

    # ---- model and optimizer ----
    model = weights.load(folder / "sft", ScalarModel, device=device).train()
    model.model.dtype, model.model.checkpoint = dtype, choice.checkpoint
    # Of a few thousand labels the tiny reward model learns far more facts with Muon: AUC 0.85 after half a pass, where AdamW has 0.79 (docs/log.md).
    muon = [p for name, p in model.named_parameters() if config.optimizer == "muon" and p.dim() == 2 and name.startswith("model.layers")]
    rest = [p for p in model.parameters() if not any(p is m for m in muon)]
    optimizers = [torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=0.0, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    batches = len(examples) // batch_size
    steps = max(int(config.epochs * batches), 1)

    def summed_loss(examples, responses, tokens):
        """Loss of `examples`, summed, over the whole batch's count of responses (or pairs), and of earlier response tokens."""
        if config.rm_loss == "bt":
            good, bad = score(model, [ids for pair in examples for ids in pair]).view(-1, 2).unbind(1)
            return bt_loss(good, bad, responses)
        # Each by its last token, and from the prompt's last one on by the earlier ones: these are the value model's states.
        packed = pack([ids for _, _, ids, _ in examples], device)
        counts = [len(ids) - prompt + 1 if config.token_loss else 1 for _, prompt, ids, _ in examples]
        labels = torch.tensor([float(label) for (*_, label), n in zip(examples, counts) for _ in range(n)])
        shares = torch.tensor([share for n in counts for share in [config.token_loss / max(tokens, 1)] * (n - 1) + [1 / responses]])
        return bce_loss(model(packed).index_select(0, packed.tail(counts)), labels.to(device), shares.to(device))

    def gradients(micro_batch, batch):
        """Make the gradients of the batch's mean loss, some examples at a time; returns the loss."""
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(e[2]) - e[1] for e in batch) if config.rm_loss == "bce" else 0
        total = torch.zeros((), device=device)
        for i in range(0, len(batch), micro_batch):
            loss = summed_loss(batch[i:i + micro_batch], len(batch), tokens)
            loss.backward()
            total += loss.detach()
        return total

    # ---- evaluation ----
    def evaluate(micro_batch):
        """Scores of the held-out responses, and their figures, by source."""
        scores = {s: score_sequences(model, [ids for _, _, ids, _ in rows], micro_batch)
                  for s, rows in held_out.items()}
        return scores, {s: measure(scores[s], [label for *_, label in held_out[s]]) for s in scores}

    # ---- loop ----
    step, best, best_weights, seconds = 0, -1.0, None, 0.0
    state = run.load_checkpoint(folder / "rm" / "resume.pt", config)
    metrics, watch = run.Metrics(folder, "rm", anew=not state), run.Watch("rm")
    time_to_save = run.every(config.save_minutes)
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, best, best_weights, seconds = (
            state[k] for k in ("step", "best", "best_weights", "seconds"))
        micro_batch = min(micro_batch, state["micro_batch"])         # so that sums round as before
        print(f"rm: going on after step {step}")
    bar = run.Bar(total=steps, initial=step, desc="rm", unit="step")
    with run.interruptible() as stop, bar:
        while step < steps:
            if step and step % max(steps // config.evals, 1) == 0:
                watch.settle()
                (_, figures), micro_batch = run.halve_when_full(evaluate, micro_batch,
                                                                "--micro-batch")
                metrics(step, **{f"{k}_{s}": v for s, f in figures.items() for k, v in f.items()})
                bar.write(f"rm: step {step}, held out: " + ", ".join(f"{s} AUC {f['auc']:.3f} accuracy {f['accuracy']:.3f}" for s, f in figures.items()))
                if figures["student"]["auc"] > best:
                    best, best_weights = figures["student"]["auc"], weights.on_host(model)
            order = list(range(len(examples)))
            random.Random(f"{config.seed} {step // batches}").shuffle(order)
            batch = [examples[i] for i in order[step % batches * batch_size:][:batch_size]]
            rate = config.learning_rate * min((step + 1) / max(config.warmup * steps, 1), 1 - 0.9 * step / steps)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            total, micro_batch = run.halve_when_full(gradients, micro_batch, "--micro-batch", batch)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            watch(step, total, norm)
            bar.update()
            if step % 10 == 0:
                row = metrics(step, loss=total, grad_norm=norm, learning_rate=rate)
                bar.set_postfix(loss=f"{row['loss']:.4f}")
            # Asked once a step: an interrupt between two askings would not be saved.
            stopping = stop()
            if stopping or time_to_save():
                watch.settle(model)
                run.save_checkpoint(folder / "rm" / "resume.pt", config, model=model.state_dict(), step=step, best=best, micro_batch=micro_batch,
                                    optimizers=[optimizer.state_dict() for optimizer in optimizers], best_weights=best_weights, seconds=metrics.seconds(seconds))
            if stopping:
                sys.exit("stopped after saving; the same command goes on from here")

    # ---- save ----
    watch.settle(model)
    (scores, figures), micro_batch = run.halve_when_full(evaluate, micro_batch, "--micro-batch")
    if figures["student"]["auc"] < best:
        model.load_state_dict(best_weights, strict=False)
        scores, figures = evaluate(micro_batch)
    for source, f in figures.items():
        print(f"rm: held-out {source} responses: n {f['n']}, accuracy {f['accuracy']:.3f}, AUC {f['auc']:.3f}, calibration error {f['ece']:.3f}")
    print("rm: sigmoid(score), share good, n on held-out student responses: "
          + "  ".join(f"{p:.2f} {good:.2f} {n}" for p, good, n in calibration(scores["student"], [label for *_, label in held_out["student"]])[1]))
    some = [ids for _, _, ids, _ in held_out["student"][:32]]
    alone = [score_sequences(model, [ids], 1)[0] for ids in some]
    together = score_sequences(model, some, micro_batch)
    gap = max((abs(a - b) for a, b in zip(alone, together)), default=0.0)
    print(f"rm: score alone against score in a padded batch: largest difference {gap:.1e}")
    metrics(step, **{f"{k}_{s}": v for s, f in figures.items() for k, v in f.items()}, padding_gap=gap,
            **shares(student_rows), seconds=metrics.seconds(seconds))
    weights.save(model, folder / "rm", folder / "sft")
    (folder / "rm" / "resume.pt").unlink(missing_ok=True)
    print(f"rm: -> {folder / 'rm'}")


if __name__ == "__main__":
    run.guard(main)
