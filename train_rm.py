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
from tqdm import tqdm

from data import TASKS
from data.teacher import collect, local
from nanodistill import fit, run, weights
from nanodistill.model import ScalarModel, pack
from nanodistill.reward import bce_loss, bt_loss, calibration, measure, score, score_sequences
from nanodistill.tokenizer import Tokenizer


# ---- config ----

@dataclass
class Config(run.Common):
    samples: int = run.flag(30, "responses of the SFT student a question")
    max_new_tokens: int = run.flag(512, "a response is cut off here")
    slots: int = run.flag(64, "sequences sampled at once")
    rm_data: str = run.flag("both", "whose responses are trained on", ("teacher", "student", "both"))
    rm_loss: str = run.flag("bce", "bce: good or not, each by itself; bt: a good one above a bad one of the same question", ("bce", "bt"))
    token_loss: float = run.flag(0.5, "with bce: weight of the same loss at the response's earlier tokens, which predict the outcome; 0 = the last token alone")
    epochs: float = run.flag(1.0, "passes over the responses (over the questions' pairs for bt)")
    batch_size: int = run.flag(64, "responses (or pairs) an optimizer step")
    micro_batch: int = run.flag(8, "responses (or pairs) a forward and backward pass; the gradient does not depend on it")
    checkpoint: bool = run.flag(False, "activation checkpointing: a layer's activations are computed again in backward instead of kept")
    optimizer: str = run.flag("adamw", "muon: orthogonalised updates for the layers' matrices, AdamW for the rest", ("adamw", "muon"))
    learning_rate: float = run.flag(1e-5, "peak; rises over the first steps, then falls linearly to a tenth")
    warmup: float = run.flag(0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = run.flag(0.0, "AdamW's")
    max_grad_norm: float = run.flag(1.0, "gradients are scaled down to this norm")
    evals: int = run.flag(6, "held-out evaluations in the whole run")


TINY = dict(samples=4, max_new_tokens=56, slots=256, epochs=1.0, optimizer="muon", learning_rate=3e-3, batch_size=128, micro_batch=128)


def main(argv=None):
    config = run.parse(Config, __doc__, TINY, argv)
    if config.dry_run:
        return print(fit.report("rm", config))
    folder, device, dtype = run.start(config, "rm")
    run.need(folder / "sft" / weights.SINGLE, "train_sft.py", config)
    if (folder / "rm" / weights.SINGLE).exists():
        sys.exit(f"{folder / 'rm'} is complete; delete it to train again")

    # ---- data: the student's samples, then {source: [(question id, prompt length, prompt + response ids, label)]}, trained on and held out ----
    tokenizer, task = Tokenizer(folder / "sft"), TASKS[config.task](config.seed, config.data)
    metrics = run.Metrics(folder, "rm")
    votes = {row["id"]: row["vote"] for row in run.read_jsonl(folder / "labels.jsonl") if row["vote"] is not None}
    teacher_rows = sorted((row for row in run.read_jsonl(folder / "teacher.jsonl") if row["id"] in votes), key=lambda row: row["id"])
    sampler = local(weights.load(folder / "sft", device=device, dtype=dtype), tokenizer, task, config.max_new_tokens, config.slots)
    student_rows = collect(folder / "student.jsonl", [{"id": row["id"], "question": row["question"]} for row in teacher_rows],
                           task, sampler, [1.0] * config.samples, "student")
    del sampler
    train, held_out = {"teacher": [], "student": []}, {"teacher": [], "student": []}
    for source, rows in (("teacher", teacher_rows), ("student", student_rows)):
        for row in rows:
            prompt = tokenizer.prompt_ids(task.prompt(row["question"]))
            split = held_out if run.held_out(row["id"]) else train
            for r in row["responses"]:
                ids = prompt + tokenizer.encode(r["text"]) + [tokenizer.eos_ids[0]] * r["ended"]
                split[source].append((row["id"], len(prompt), ids, task.equal(r["answer"], votes[row["id"]])))
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
    if len(examples) < config.batch_size:
        sys.exit(f"That is less than one batch of {config.batch_size}: more --questions, more samples, or a smaller --batch-size.")

    # ---- model and optimizer ----
    model = weights.load(folder / "sft", ScalarModel, device=device).train()
    model.model.dtype, model.model.checkpoint = dtype, config.checkpoint
    # Of a few thousand labels the tiny reward model learns far more facts with Muon: AUC 0.85 after half a pass, where AdamW has 0.79 (docs/log.md).
    muon = [p for name, p in model.named_parameters() if config.optimizer == "muon" and p.dim() == 2 and name.startswith("model.layers")]
    rest = [p for p in model.parameters() if not any(p is m for m in muon)]
    optimizers = [torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=0.0, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    batches = len(examples) // config.batch_size
    steps = int(config.epochs * batches)

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

    # ---- evaluation ----
    def evaluate():
        """Scores of the held-out responses, and their figures, by source."""
        scores = {s: score_sequences(model, [ids for _, _, ids, _ in rows]) for s, rows in held_out.items()}
        return scores, {s: measure(scores[s], [label for *_, label in held_out[s]]) for s in scores}

    # ---- loop ----
    step, best, best_weights, seconds = 0, -1.0, None, 0.0
    state = run.load_checkpoint(folder / "rm" / "resume.pt", config)
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, best, best_weights, seconds = state["step"], state["best"], state["best_weights"], state["seconds"]
        print(f"rm: going on after step {step}")
    with run.interruptible() as stop, tqdm(total=steps, initial=step, desc="rm", unit="step") as bar:
        while step < steps:
            if step and step % max(steps // config.evals, 1) == 0:
                _, figures = evaluate()
                metrics(step, **{f"{k}_{s}": v for s, f in figures.items() for k, v in f.items()})
                bar.write(f"rm: step {step}, held out: " + ", ".join(f"{s} AUC {f['auc']:.3f} accuracy {f['accuracy']:.3f}" for s, f in figures.items()))
                if figures["student"]["auc"] > best:
                    best, best_weights = figures["student"]["auc"], {k: v.detach().clone() for k, v in model.state_dict().items()}
            order = list(range(len(examples)))
            random.Random(f"{config.seed} {step // batches}").shuffle(order)
            batch = [examples[i] for i in order[step % batches * config.batch_size:][:config.batch_size]]
            rate = config.learning_rate * min((step + 1) / max(config.warmup * steps, 1), 1 - 0.9 * step / steps)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            tokens = sum(len(e[2]) - e[1] for e in batch) if config.rm_loss == "bce" else 0
            total = torch.zeros((), device=device)
            for i in range(0, len(batch), config.micro_batch):
                loss = summed_loss(batch[i:i + config.micro_batch], len(batch), tokens)
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{metrics(step, loss=total, grad_norm=norm, learning_rate=rate)['loss']:.4f}")
            stopping = stop()                                        # asked once a step: an interrupt between two askings would not be saved
            if stopping or step % 500 == 0:
                run.save_checkpoint(folder / "rm" / "resume.pt", config, model=model.state_dict(), step=step, best=best,
                                    optimizers=[optimizer.state_dict() for optimizer in optimizers], best_weights=best_weights, seconds=metrics.seconds(seconds))
            if stopping:
                sys.exit("stopped after saving; the same command goes on from here")

    # ---- save ----
    scores, figures = evaluate()
    if figures["student"]["auc"] < best:
        model.load_state_dict(best_weights)
        scores, figures = evaluate()
    for source, f in figures.items():
        print(f"rm: held-out {source} responses: n {f['n']}, accuracy {f['accuracy']:.3f}, AUC {f['auc']:.3f}, calibration error {f['ece']:.3f}")
    print("rm: sigmoid(score), share good, n on held-out student responses: "
          + "  ".join(f"{p:.2f} {good:.2f} {n}" for p, good, n in calibration(scores["student"], [label for *_, label in held_out["student"]])[1]))
    some = [ids for _, _, ids, _ in held_out["student"][:32]]
    alone = [score_sequences(model, [ids])[0] for ids in some]
    gap = max((abs(a - b) for a, b in zip(alone, score_sequences(model, some))), default=0.0)
    print(f"rm: score alone against score in a padded batch: largest difference {gap:.1e}")
    metrics(step, **{f"{k}_{s}": v for s, f in figures.items() for k, v in f.items()}, padding_gap=gap, seconds=metrics.seconds(seconds))
    weights.save(model, folder / "rm", folder / "sft")
    (folder / "rm" / "resume.pt").unlink(missing_ok=True)
    print(f"rm: -> {folder / 'rm'}")


if __name__ == "__main__":
    main()
