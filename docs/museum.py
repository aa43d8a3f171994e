"""The runs and pictures of docs/bugs.md: the tiny run with one line broken, beside the right one.

    python train_rl.py --seed 25 --rm.rm-votes teacher --out out/s25    what the faults start from
    python docs/museum.py --base out/s25 --out out/museum           all runs, 20 to 30 minutes
    python docs/museum.py --base out/s25 --out out/museum --only kl-sign
    python docs/museum.py --out out/museum                          pictures of the runs there
    python docs/museum.py --base out/s25 --start                    numbers before any update

After a change of STEPS, of a fault's flags or of the base, delete OUT first: what is done stays.
Each fault is a line of the code, replaced in a copy of the tree; where its old text does not stand
there exactly once, nothing is run. A fault of SFT starts from the votes, one of PPO from sft/ and
rm/ too. Runs have one thread and the same seed, so that a pair differs in the broken line alone.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SFT, RL, PPO, RESPONSES, RUN = ("train_sft.py", "train_rl.py", "nanodistill/ppo.py",
                                "nanodistill/responses.py", "nanodistill/run.py")
# `flags`: what this pair of runs is told after its stage's STEPS. `shown`: keys of metrics.jsonl.
Fault = namedtuple("Fault", "name file old new shown stage flags", defaults=("rl", ""))
STEPS = {"rl": "--steps 60 --prompts 128 --micro-batch 16",
         "sft": "--epochs 0.25 --evals-per-epoch 48"}
BASE = {"rl": ("settings.json", "inputs.json", "teacher.jsonl", "labels.jsonl", "student.jsonl",
               "sft", "rm"),
        "sft": ("settings.json", "teacher.jsonl", "labels.jsonl")}
# A student of its own comes without the base's settings.
STUDENT = ("--student {student} --teacher tiny --task arithmetic --learning-rate 5e-4 "
           "--max-new-tokens 56 --seed {seed}")
BLUE, RED = "#2a6f97", "#d1495b"
LOGARITHMIC = {"sampler_gap", "sampler_kl"}
# A stage, less the evaluation that would follow.
ALONE = "import {0}; {0}.process.need = lambda *given: None; {0}.process.guard({0}.main)"

FAULTS = [Fault(*entry) for entry in [
    ("score-a-token-early", RL, "[scored_rows[b] for b in mb]", "[scored_rows[b][:-1] for b in mb]",
     "score true_accuracy kl"),
    ("pad-is-eos", RL, "response_mask = responses.mask(counts, device)  ",
     "response_mask = responses.mask(counts, device); "
     "response_mask[torch.arange(B), response_mask.sum(1) - 1] = ~ended",
     "true_accuracy first_ratio sampler_gap"),
    ("temperature", RL, "temperature=config.temperature", "temperature=0.7",
     "true_accuracy first_ratio sampler_kl"),
    ("kl-sign", RL, "response_mask, kl_coef)", "response_mask, -kl_coef)",
     "score rewards kl"),
    ("whiten-padding", PPO,
     "mean = masked_mean(x, mask)\n    variance = masked_mean((x - mean) ** 2, mask)",
     "mean, variance = x.mean(), x.var(correction=0)", "policy_loss true_accuracy kl"),
    ("no-eos", SFT, " + [tokenizer.eos_ids[0]]", "", "held_out_loss", "sft", STUDENT),
    ("retokenised", RL, "+ s.tokens for id_", "+ tokenizer.encode(tokenizer.decode(s.tokens)) "
     "+ [tokenizer.eos_ids[0]] * s.ended for id_", "true_accuracy first_ratio sampler_gap", "rl",
     "--temperature 1.6 --steps 20"),
    ("best-of-nan", RUN,
     "bad = tensors and not torch.stack([x.isfinite().all() for x in tensors]).all()",
     "bad = False", "held_out_loss", "sft",
     "--epochs 0.03 --evals-per-epoch 80 --learning-rate 1e30"),
    ("returns-of-whitened", RL, "response_mask, shift_mean=bool(value_model))",
     "response_mask); returns = advantages + old_values",
     "value_loss explained_variance true_accuracy"),
    ("old-is-new", RL, "new_logprobs, e.old_logprobs[at]", "new_logprobs, new_logprobs.detach()",
     "true_accuracy approx_kl clipfrac"),
    ("value-a-token-off", RESPONSES, "model(batch.packed).index_select(0, batch.packed.last)",
     "model(batch.packed).index_select(0, batch.packed.last - 1)",
     "explained_variance value_loss true_accuracy"),
    ("mean-of-each-micro-batch", PPO, "return masked_mean(losses, mask, denominator), stats",
     "return masked_mean(losses, mask), stats", "policy_loss approx_kl true_accuracy"),
]]


def seed_of(folder):
    return json.loads((folder / "settings.json").read_text())["sft"]["seed"]


def folder_of(fault, broken):
    """Faults that are told nothing of their own share the right run."""
    return fault.name if broken else f"right-{fault.name if fault.flags else fault.stage}"


def without_an_end(out):
    """The tiny student as if it had never seen its EOS: whose embedding, which is its output too,
    is the mean of all."""
    from safetensors.torch import load_file, save_file

    student = out / "student-without-an-end"
    shutil.rmtree(student, ignore_errors=True)
    shutil.copytree(ROOT / "data" / "tiny" / "student", student)
    weights = load_file(student / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[json.loads((student / "config.json").read_text())["eos_token_id"]] = (
        embedding.float().mean(0).to(embedding.dtype))
    save_file(weights, student / "model.safetensors")
    return student


def made(out, fault, broken, base):
    """The run folder of a fault's stage, broken or right; run if it is not there."""
    folder, tree = out / folder_of(fault, broken), out / "tree"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(tree, ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", "out", "__pycache__", ".venv")
    shutil.copytree(ROOT, tree, ignore=ignored)
    path = tree / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        sys.exit(f"{fault.name}: its old text stands {text.count(fault.old)} times in {fault.file}")
    if broken:
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    folder.mkdir(parents=True)
    own = "{student}" in fault.flags
    for item in BASE[fault.stage]:
        if own and item == "settings.json":
            continue
        (shutil.copytree if (base / item).is_dir() else shutil.copy)(base / item, folder / item)
    known = {"student": own and without_an_end(out), "seed": seed_of(base)}
    flags = [flag.format(**known)
             for flag in f"{STEPS[fault.stage]} {fault.flags} --threads 1".split()]
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(f"train_{fault.stage}"), *flags, "--out", folder],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    (folder / "said.txt").write_text(done.stdout)
    print(f"{folder.name}: exit status {done.returncode}", flush=True)
    (folder / "done").touch()
    return folder


def curve(folder, stage, key):
    """Steps and numbers of a key in metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == stage and key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


@contextlib.contextmanager
def picture(name, panels):
    """Axes of so many panels; then saved as docs/bugs/NAME.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, panels, figsize=(8, 2), layout="constrained", squeeze=False)
    yield axes[0]
    axes[0][0].legend(frameon=False)
    (ROOT / "docs" / "bugs").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / "bugs" / f"{name}.png", dpi=65)
    plt.close(figure)


def draw(fault, broken, right):
    """A fault's picture: a panel per key of `shown`, the right run and the broken one."""
    keys = fault.shown.split()
    with picture(fault.name, len(keys)) as axes:
        for key, ax in zip(keys, axes):
            draw_panel(ax, key, fault.stage, broken, right)


def draw_panel(ax, key, stage, broken, right):
    for folder, color, label in ((right, BLUE, "right"), (broken, RED, "broken")):
        steps, values = curve(folder, stage, key)
        first, last = (sum(some) / len(some) for some in (values[:5], values[-10:]))
        print(f"{folder.name}, {key}: {first:.4g} in the first five, {last:.4g} in the last ten, "
              f"{min(values):.3g} to {max(values):.3g}")
        # Where steps are many: each as a dot, and a line through the means of five.
        wide = 2 * (len(steps) > 15)
        means = [sum(some) / len(some) for some in (
            values[max(i - wide, 0):i + wide + 1] for i in range(len(values)))]
        ax.plot(steps, values, ".", markersize=2 if wide else 6, alpha=0.5 if wide else 1,
                color=color)
        ax.plot(steps, means, "--" if folder == right else "-", color=color, label=label)
        lost = [step for step, value in zip(steps, values) if not math.isfinite(value)]
        if lost:
            ax.axvspan(lost[0], lost[-1], color=color, alpha=0.2, linewidth=0)
            ax.text(sum(lost) / len(lost), sum(ax.get_ylim()) / 2, "nan", color=color, ha="center")
    ax.set_title(key, fontsize=8)
    ax.set_xlabel("step")
    if key in LOGARITHMIC:
        ax.set_yscale("log")


def sft_student(folder):
    """What became of a run's SFT student, in words: of 256 responses to test questions, how many
    end and have an answer."""
    sys.path.insert(0, str(ROOT))
    from data import prompts_of
    from data.arithmetic import Arithmetic
    from nanodistill import weights
    from nanodistill.generate import respond
    from nanodistill.tokenizer import Tokenizer

    if not weights.complete(folder / "sft"):
        return "none was saved"
    tokenizer, task = Tokenizer(folder / "sft"), Arithmetic(seed_of(folder), test=256)
    try:
        model = weights.load(folder / "sft")
    except ValueError as error:
        return f"it is refused: {str(error)[:200]} ..."
    said = [(sample.ended, task.extract_answer(text)) for *_, text, sample in respond(
        model, tokenizer, prompts_of(task, tokenizer, task.questions("test")), n=1, temperature=1.0,
        max_new_tokens=56, seed=1)]
    ended, answered = (sum(map(bool, column)) for column in zip(*said))
    return f"of {len(said)} responses {ended} end, {answered} have an answer"


def before_an_update(base):
    """Print what some faults make of one rollout of 256 responses, before anything is learned: by
    the SFT student, and by the RL student, which has moved away from it."""
    sys.path.insert(0, str(ROOT))
    import torch

    from data import prompts_of
    from data.arithmetic import Arithmetic
    from nanodistill import ppo, responses, weights
    from nanodistill.generate import sample_all
    from nanodistill.model import CausalLM, ScalarModel
    from nanodistill.reward import score
    from nanodistill.stats import auc
    from nanodistill.tokenizer import Tokenizer

    torch.set_grad_enabled(False)
    tokenizer, task = Tokenizer(base / "sft"), Arithmetic(seed_of(base))
    prompts, gold = prompts_of(task, tokenizer, task.questions("train")[:256]), task.gold("train")
    sft, rl = (weights.load(base / name, CausalLM, dtype=torch.float32) for name in ("sft", "rl"))
    reward_model = weights.load(base / "rm", ScalarModel, dtype=torch.float32)

    def sampled(policy):
        samples = sample_all(policy, [*prompts.values()], temperature=1.0, seed=5,
                             max_new_tokens=56, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
        rows = [prompt + s.tokens for prompt, s in zip(prompts.values(), samples)]
        counts = [len(s.tokens) for s in samples]
        batch, mask = responses.batch(rows, counts, range(len(rows)), "cpu"), responses.mask(counts)
        old = responses.logprobs(policy, batch, 1.0)[0]
        right = [task.extract_answer(tokenizer.decode(s.tokens)) == gold[id_]
                 for id_, s in zip(prompts, samples)]
        print(f"\n{sum(right) / len(right):.1%} right")
        return rows, right, batch, mask, old

    # The pictures of the second, the SFT student, are kept.
    for policy in rl, sft:
        rows, right, batch, mask, old = sampled(policy)
        longest, good = max(map(len, rows)), torch.tensor(right)
        with picture("score-a-token-early-start", 3) as axes:
            for ax, where, read in zip(
                    axes, ("at the EOS", "a token early", "in column -1"),
                    (rows, [row[:-1] for row in rows],
                     [row + [tokenizer.pad_id] * (longest - len(row)) for row in rows])):
                scores = score(reward_model, read).sigmoid()
                title = f"score {where}: AUC {auc(scores, right):.3f}"
                print(f"{title}, mean {scores.mean():.3f}")
                ax.hist([scores[good].numpy(), scores[~good].numpy()], bins=20, range=(0, 1),
                        stacked=True, color=(BLUE, RED), label=("right answer", "wrong answer"))
                ax.set_title(title, fontsize=8)
        scores = score(reward_model, rows).sigmoid()
        ref, hidden = responses.logprobs(sft, batch, 1.0)[0], reward_model(batch.packed)
        rewards = ppo.shape_rewards(scores, old, ref, mask, 0.05)
        with picture("value-a-token-off-start", 1) as (ax,):
            for early, color, label in ((0, BLUE, "right"), (1, RED, "a token early")):
                values = batch.grid(hidden.index_select(0, batch.packed.last - early).sigmoid())
                _, returns = ppo.gae(rewards, values, mask)
                print(f"values {early} tokens early: explained variance "
                      f"{ppo.explained_variance(values, returns, mask):.3f}")
                errors = (values - scores[:, None]).square()
                ends = mask.sum(1)
                ax.plot(range(-12, 0), [errors[torch.arange(len(ends)), ends + t].mean()
                                        for t in range(-12, 0)], color=color, label=label)
            ax.set_title("mean square of value - score, by token from the end", fontsize=8)
        values = responses.values(reward_model, batch, torch.sigmoid)
        advantages, _ = ppo.gae(rewards, values, mask)
        white = ppo.whiten(advantages, mask)
        print(f"returns of whitened: {(white + values)[mask].min():.1f} to "
              f"{(white + values)[mask].max():.1f}, explained variance "
              f"{ppo.explained_variance(values, white + values, mask):.3f}")
        counted = ppo.whiten(advantages, torch.ones_like(mask))[mask]
        with picture("whiten-padding-start", 1) as (ax,):
            ax.hist([white[mask].numpy(), counted.numpy()], bins=60, range=(-5, 4),
                    histtype="step", color=(BLUE, RED), label=("right", "padding counted"))
            ax.set_title("whitened advantages of the response tokens", fontsize=8)
        print(f"padding, {1 - mask.float().mean():.0%}, whitened too: mean {counted.mean():.3f}, "
              f"deviation {counted.std():.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a finished tiny run; missing: draw alone")
    parser.add_argument("--out", type=Path, default=Path("out/museum"), help="where the runs go")
    parser.add_argument("--only", action="append", metavar="NAME", help="may be given again")
    parser.add_argument("--start", action="store_true", help="what faults do before any update")
    asked = parser.parse_args()
    out = asked.out.resolve()
    if asked.start:
        return before_an_update(asked.base)
    for fault in FAULTS:
        if asked.only and fault.name not in asked.only:
            continue
        if asked.base:
            for broken in (False, True):
                made(out, fault, broken, asked.base)
        right, broken = (out / folder_of(fault, is_broken) for is_broken in (False, True))
        if not all((folder / "done").exists() for folder in (right, broken)):
            print(f"{fault.name}: not run yet")
            continue
        draw(fault, broken, right)
        if fault.stage == "sft":
            print(f"{fault.name}: the right run's student: {sft_student(right)}; "
                  f"the broken one's: {sft_student(broken)}")


if __name__ == "__main__":
    main()
