"""Stage 2, reward model: learns the vote's labels from teacher and student responses alike.

    python train_rm.py                                   the tiny student
    python train_rm.py --rm-data teacher --rm-loss bt    without the student's own responses;
                                                         Bradley-Terry pairs
    python train_rm.py --rm-votes teacher                labels by the teacher's vote alone

Reads teacher.jsonl, labels.jsonl and sft/ (runs the stages before it if something is missing).
Samples the SFT student on the training questions with a vote into student.jsonl, labels the
responses by a vote, and trains the SFT student's trunk with a scalar head on both. Writes rm/, an
HF folder. PPO will ask for scores of what the *student* writes: hence its responses in the data.

The paper's vote is the teacher's. With --rm-votes both the question is voted on once more, by the
teacher's and the student's answers, each side with the same say: where SFT has made the student
better than its teacher, fewer votes are wrong (docs/results.md). What ties then is left out;
--teacher.min-agreement is of the first vote alone.

What to look at: AUC on held-out student responses (0.5 is chance, 1 ranks every good response above
every bad one); its calibration (sigmoid(score) is a probability: of the responses with 0.8, about
80% should be good); and the line before the last, which shows that a score does not depend on
padding. The weights kept are those of the best held-out AUC on student responses.

The score is the output at the last token. With bce, earlier tokens learn to foresee it (arXiv
2110.14168 found this to help its verifiers), which is also what PPO's value model starts from. The
loss and the base (the SFT student) are our choice, not the paper's.
"""

import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import train_sft
from data import prompts_of, ready, response_ids, task_of
from data.teacher import collect, local, shares
from nanodistill import files, lora, optim, parallel, process, run, settings, vote, weights
from nanodistill.batches import pack
from nanodistill.model import ScalarModel
from nanodistill.reward import bce_loss, bt_loss, score, score_sequences
from nanodistill.settings import Training, flag
from nanodistill.stats import calibration, measure, within
from nanodistill.tokenizer import Tokenizer


# ---- config ----

@dataclass
class Config(Training):
    samples: int = flag(None, "responses of the SFT student per question", least=1)
    rm_data: str = flag("both", "whose responses are trained on", ("teacher", "student", "both"))
    rm_loss: str = flag("bce", "bce: good or not, each by itself; bt: a good one above a bad one "
                        "of the same question", ("bce", "bt"))
    rm_votes: str = flag(None, "whose answers are voted on, for the labels", ("teacher", "both"))
    token_loss: float = flag(0.5, "with bce: weight of the same loss before each response token, "
                             "where the outcome is predicted; 0 = the last token alone", least=0,
                             only=("rm_loss", "bce"))
    epochs: float = flag(1.0, "passes over the responses (over the questions' pairs for bt)",
                         above=0)
    batch_size: int = flag(None, "responses (or pairs) per optimizer step", least=1)
    optimizer: str = flag(None, "muon: orthogonalised updates for the layers' matrices, AdamW for "
                          "the rest", ("adamw", "muon"))
    learning_rate: float = flag(None, "peak; rises over the first steps, then falls linearly to a "
                                "tenth", above=0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises", least=0,
                         most=1)
    weight_decay: float = flag(0.0, "AdamW's", least=0)
    evals: int = flag(6, "held-out evaluations in the whole run", least=1)


STAGES = {**train_sft.STAGES, "rm": Config}


def main(argv=None):
    configs = settings.parse("rm", STAGES, __doc__, argv)
    config = configs["rm"]
    if config.dry_run:
        return print(ready.dry_run("rm", configs))
    if weights.complete(Path(config.out, "rm")):
        return run.keep(config.out, "rm")
    ready.check("rm", configs)
    folder, device, dtype = run.start(configs, "rm")
    process.need(weights.complete(folder / "sft"), folder / "sft", "train_sft.py", config)
    train(config, folder, device, dtype)


@dataclass
class Example:
    id: str                                 # of the question
    prompt_length: int                      # in tokens
    ids: list                               # token ids, prompt + response
    label: bool                             # is its answer the vote?


def pairs_of(examples, seed):
    """[(good, bad)] of token ids: as many pairs per question as its rarer kind allows."""
    by_question = {}
    for e in examples:
        by_question.setdefault(e.id, {True: [], False: []})[e.label].append(e.ids)
    shuffler, pairs = random.Random(seed), []
    for kinds in by_question.values():
        shuffler.shuffle(kinds[True])
        shuffler.shuffle(kinds[False])
        pairs += zip(kinds[True], kinds[False])
    return pairs


def summed_bce(model, examples, count, tokens, token_loss):
    """BCE at each example's last token, divided by the batch's `count` of examples; plus
    `token_loss` times the BCE before each response token, divided by the batch's `tokens`."""
    # From the prompt's last token on: these are the value model's states.
    counts = [len(e.ids) - e.prompt_length + 1 if token_loss else 1 for e in examples]
    labels = [int(e.label) for e, n in zip(examples, counts) for _ in range(n)]
    ends = [end - 1 for end in itertools.accumulate(counts)]
    packed = pack([e.ids for e in examples], model.score.weight.device, counts=counts,
                  more=(labels, ends))
    labels, ends = packed.more
    scores = model(packed).index_select(0, packed.last)                        # (sum of counts,)
    loss_weights = torch.full_like(scores, token_loss / max(tokens, 1))
    return bce_loss(scores, labels.float(), loss_weights.index_fill(0, ends, 1 / count))


def gradients(micro_batch, config, model, optimizers, batch):
    """Make the gradients of a batch's mean loss, `micro_batch` sequences at a time, but a pair at
    least; returns the loss."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    pairs, total = config.rm_loss == "bt", 0.0
    tokens = 0 if pairs else sum(len(e.ids) - e.prompt_length for e in batch)
    size = max(micro_batch // 2, 1) if pairs else micro_batch
    for some, real in parallel.micro_batches(batch, size):
        if pairs:
            scores = score(model, [ids for pair in some for ids in pair])      # (2 x pairs,)
            good, bad = scores.view(-1, 2).unbind(1)
            loss = real * bt_loss(good, bad, len(batch))
        else:
            loss = real * summed_bce(model, some, len(batch), tokens, config.token_loss)
        loss.backward()
        total += loss.detach()
    parallel.sum_gradients(model)
    parallel.sum_(total)
    return total


def evaluate(micro_batch, model, held_out):
    """Scores of the held-out responses, and their figures, by source; and --micro-batch."""
    scores, figures = {}, {}
    for source, rows in held_out.items():
        # One at a time: a process that begins anew must not gather what the others have gathered.
        scores[source], micro_batch = run.halve_when_full(
            lambda size, rows: score_sequences(model, [e.ids for e in rows], size), micro_batch,
            rows)
        labels = [e.label for e in rows]
        figures[source] = measure(scores[source], labels) | within(
            [e.id for e in rows], scores[source], labels)
    return scores, figures, micro_batch


def train(config, folder, device, dtype):
    # ---- data: the student's samples, then {source: [Example]}, trained on and held out ----
    tokenizer, task = Tokenizer(folder / "sft", config.date), task_of(config)
    shape = weights.load_config(folder / "sft")
    votes = {row["id"]: row["vote"]
             for row in files.read_jsonl(folder / "labels.jsonl", "id", "vote")
             if row["vote"] is not None}
    teacher_rows = {row["id"]: row
                    for row in files.read_jsonl(folder / "teacher.jsonl", "id", "responses")}
    teacher_rows = [teacher_rows[id_] for id_ in sorted(teacher_rows.keys() & votes.keys())]
    prompts = prompts_of(task, tokenizer, teacher_rows,
                         shape.max_position_embeddings - config.max_new_tokens)
    teacher_rows = [row for row in teacher_rows if row["id"] in prompts]
    if not prompts:
        sys.exit(f"No question has both a vote in {folder / 'labels.jsonl'} and a prompt that "
                 "fits the student's positions: there is nothing to learn from.")
    batch_size = config.batch_size
    choice = run.fitted("rm", config, shape, dtype, device,
                        max(map(len, prompts.values())), config.max_new_tokens,
                        batch=batch_size * (2 if config.rm_loss == "bt" else 1),
                        jobs=len(prompts) * config.samples)
    micro_batch = choice.micro_batch
    run.made_from(folder, "student.jsonl", "sft")
    sampler = local(weights.load(folder / "sft", device=device, dtype=dtype), tokenizer, task,
                    config.max_new_tokens, choice.slots)
    student_rows = collect(
        folder / "student.jsonl", [{k: row[k] for k in ("id", "question")} for row in teacher_rows],
        task, sampler, [1.0] * config.samples, "student", keep_tokens=True)
    del sampler
    if config.rm_votes == "both":
        said = {row["id"]: [r["answer"] for r in row["responses"]] for row in teacher_rows}
        again = {row["id"]: vote.together(said[row["id"]], [r["answer"] for r in row["responses"]])
                 .answer for row in student_rows}
        print(f"rm: with the student's answers {sum(again[id_] != votes[id_] for id_ in again)} of "
              f"{len(again)} votes change, of which {sum(v is None for v in again.values())} tie")
        votes = again
    run.made_from(folder, "rm", "teacher.jsonl", "labels.jsonl", "student.jsonl", "sft")
    training, held_out = {"teacher": [], "student": []}, {"teacher": [], "student": []}
    for source, rows in (("teacher", teacher_rows), ("student", student_rows)):
        for row in rows:
            prompt, right = prompts[row["id"]], votes[row["id"]]
            split = held_out if run.held_out(row["id"]) else training
            for r in row["responses"]:
                if "failed" in r or right is None:
                    continue
                ids = prompt + response_ids(tokenizer, r)
                if len(ids) <= shape.max_position_embeddings:
                    label = task.equal(r["answer"], right)
                    split[source].append(Example(row["id"], len(prompt), ids, label))
    examples = [e for source, rows in training.items() if config.rm_data in (source, "both")
                for e in rows]
    if config.rm_loss == "bt":
        examples = pairs_of(examples, config.seed)
    kind = "pairs" if config.rm_loss == "bt" else "responses"
    shown = [f"{len(rows)} of the {source}, "
             f"{sum(e.label for e in rows) / max(len(rows), 1):.0%} good"
             for source, rows in held_out.items()]
    print(f"rm: {len(examples)} {kind} to train on; held out {', '.join(shown)}")
    if not examples:
        sys.exit("That leaves nothing to train on: more --questions or more samples.")
    if len(examples) < batch_size:
        batch_size = len(examples)
        print(f"rm: that is less than one batch of {config.batch_size}: a step takes all of them")
    batches = len(examples) // batch_size
    steps = max(int(config.epochs * batches), 1)

    # ---- model and optimizers ----
    model = weights.load_to_train(folder / "sft", ScalarModel, device, dtype, config.lora,
                                  choice.shards)
    model.model.checkpoint = choice.checkpoint
    run.compile_layers(steps * batch_size, model)
    if config.lora:
        print(f"rm: {lora.described(model)}")
    # Of a few thousand labels the tiny reward model learns far more facts with Muon: AUC 0.85 after
    # half a pass, where AdamW has 0.79 (docs/log.md).
    matrices, rest = [], []
    for name, p in lora.trained(model).items():
        for_muon = config.optimizer == "muon" and p.dim() == 2 and name.startswith("model.layers")
        (matrices if for_muon else rest).append(p)
    parts = dict(model=model, optimizer=torch.optim.AdamW(
        optim.groups(rest), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay,
        fused=True))
    if matrices:
        parts["muon"] = torch.optim.Muon(matrices, lr=0.0, weight_decay=config.weight_decay,
                                         adjust_lr_fn="match_rms_adamw")
    optimizers = [part for name, part in parts.items() if name != "model"]

    # ---- resume ----
    checkpoint = folder / "rm" / "resume.pt"
    state = run.load_checkpoint(checkpoint, config, parts)
    step, best, best_weights, seconds = 0, -1.0, None, 0.0
    if state:
        step, best, best_weights, seconds = (
            state[k] for k in ("step", "best", "best_weights", "seconds"))
        # At most what it was: then sums round as before.
        micro_batch = min(micro_batch, state["micro_batch"])
        print(f"rm: going on after step {step}")
    metrics, watch = run.Metrics(folder, "rm", anew=not state), run.Watch("rm")
    save = run.saver(checkpoint, config, parts, watch)

    # ---- loop ----
    bar = run.Bar(total=steps, initial=step, desc="rm", unit="step")
    with process.interruptible() as asked_to_stop, bar:
        while step < steps:
            if step and step % max(steps // config.evals, 1) == 0:
                watch.settle()
                _, figures, micro_batch = evaluate(micro_batch, model, held_out)
                metrics(step, **{f"{k}_{s}": v for s, f in figures.items() for k, v in f.items()})
                shown = [f"{s} AUC {f['auc']:.3f} accuracy {f['accuracy']:.3f}"
                         for s, f in figures.items()]
                bar.write(f"rm: step {step}, held out: {', '.join(shown)}")
                if figures["student"]["auc"] > best:
                    best, best_weights = figures["student"]["auc"], weights.on_host(model)

            # The order of an epoch follows from the seed and the epoch alone: a resumed run sees
            # the same batches.
            order = list(range(len(examples)))
            random.Random(f"{config.seed} {step // batches}").shuffle(order)
            batch = [examples[i] for i in order[step % batches * batch_size:][:batch_size]]
            total, micro_batch = run.halve_when_full(gradients, micro_batch, config, model,
                                                     optimizers, batch)
            rate = config.learning_rate * optim.schedule(step, steps, config.warmup, last=0.1)
            optim.set_rate(optimizers, rate)
            norm = optim.clipped_step(model, optimizers, config.max_grad_norm)
            step += 1
            watch(step, total, norm)
            bar.update()
            if step % 10 == 0:
                row = metrics(step, loss=total, grad_norm=norm, learning_rate=rate)
                bar.set_postfix(loss=f"{row['loss']:.4f}")

            save(asked_to_stop(), step=step, best=best, best_weights=best_weights,
                 micro_batch=micro_batch, seconds=metrics.seconds(seconds))

    # ---- save ----
    watch.settle(model)
    scores, figures, micro_batch = evaluate(micro_batch, model, held_out)
    if figures["student"]["auc"] < best:
        run.put_back(model, best_weights)
        scores, figures, micro_batch = evaluate(micro_batch, model, held_out)
    for source, f in figures.items():
        print(f"rm: held-out {source} responses: n {f['n']}, accuracy {f['accuracy']:.3f}, "
              f"AUC {f['auc']:.3f}, calibration error {f['ece']:.3f}")
    _, bins = calibration(scores["student"], [e.label for e in held_out["student"]])
    print("rm: sigmoid(score), share good, n on held-out student responses: "
          + "  ".join(f"{p:.2f} {good:.2f} {n}" for p, good, n in bins))
    some = [e.ids for e in held_out["student"][:32]]
    alone = [score_sequences(model, [ids], 1)[0] for ids in some]
    together = score_sequences(model, some, micro_batch)
    gap = max((abs(a - b) for a, b in zip(alone, together)), default=0.0)
    print(f"rm: score alone against score in a padded batch: largest difference {gap:.1e}")
    metrics(step, **{f"{k}_{s}": v for s, f in figures.items() for k, v in f.items()},
            padding_gap=gap, **shares(student_rows), seconds=metrics.seconds(seconds))
    weights.save(model, folder / "rm", folder / "sft", base=folder / "sft")
    checkpoint.unlink(missing_ok=True)
    print(f"rm: -> {folder / 'rm'}")


if __name__ == "__main__":
    process.guard(main)
