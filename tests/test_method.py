"""docs/method.md: its worked example, recomputed, and its links.

    python -m tests.test_method out/s21          the figures of "Why the loss hardly moves"
"""

import collections
import json
import math
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import train_rl
from data import arithmetic, prompts_of
from nanodistill import files, generate, ppo, process, responses, run, vote, weights
from nanodistill.tokenizer import Tokenizer


ROOT = Path(__file__).resolve().parents[1]

STEP = re.compile(r"Step \d+: (\d+) ([-+*]) (\d+) = (\d+)")
TINY = ROOT / "data" / "tiny" / "student"


# ---- how the loss of arithmetic responses splits ----

def kinds(words):
    """Of each token, as text, what it says: "choice", "result", "answer", or "form"."""
    found, now = [], "form"
    for word in words:
        now = {"\n####": "answer", " =": "result", "": "form"}.get(word, now)
        now = "choice" if "Step" in word else now
        found.append("form" if word in ("\n####", " =", "") or "Step" in word else now)
    return found


def choices(terms):
    """All that `arithmetic.work` may do with the terms: [(probability, a, op, b, which terms go,
    the sign of what comes)]."""
    products = [(i,) for i, (_, factors) in enumerate(terms) if len(factors) == 2]
    singles = [i for i, (_, factors) in enumerate(terms) if len(factors) == 1]
    options = products * 2 + [(i, j) for i in singles for j in singles if i != j]
    for which in options:
        if len(which) == 1:
            sign, (a, b) = terms[which[0]]
            yield 0.5 / len(options), a, "*", b, which, sign
            yield 0.5 / len(options), b, "*", a, which, sign
        else:
            (sign, (a,)), (other, (b,)) = (terms[i] for i in which)
            op = "+" if sign == other else "-"
            if op == "-" and a < b:
                sign, a, b = other, b, a
            yield 1 / len(options), a, op, b, which, sign


def order_nats(problem, text):
    """-log P(the order of the steps) under `arithmetic.work`, whatever the results; None where a
    step is none of those it may take."""
    states, nats = {tuple(problem.terms): 1.0}, 0.0
    for a, op, b, result in STEP.findall(text):
        after = collections.Counter()
        for terms, p in states.items():
            for q, x, its, y, which, sign in choices(terms):
                if (x, its, y) == (int(a), op, int(b)):
                    rest = [term for i, term in enumerate(terms) if i not in which]
                    after[tuple(sorted([*rest, (sign, (int(result),))]))] += p * q
        total = sum(after.values())
        if not total:
            return None
        states, nats = {terms: p / total for terms, p in after.items()}, nats - math.log(total)
    return nats


@torch.no_grad()
def logprobs(model, rows):
    """Log-probabilities of each response's tokens, a list for each of rows [(prompt, response)]."""
    found = []
    for start in range(0, len(rows), 64):
        some = rows[start:start + 64]
        counts = [len(response) for _, response in some]
        batch = responses.batch([p + r for p, r in some], counts, range(len(some)), "cpu")
        table, _ = responses.logprobs(model, batch, 1.0)
        found += [row[:n].tolist() for row, n in zip(table, counts)]
    return found


def show_split(folder):
    """Print how the loss of the held-out good responses splits, for the base, sft/ and rl/; and how
    many steps of the evaluation's responses are right."""
    seed = json.loads((folder / "report.json").read_text())["seed"]
    tokenizer, task = Tokenizer(folder / "sft"), arithmetic.Arithmetic(seed)
    problems = arithmetic.draw_split(seed, "train", task.sizes["train"])
    labels = {r["id"]: r["labels"] for r in files.read_jsonl(folder / "labels.jsonl", "labels")}
    asked = [r for r in files.read_jsonl(folder / "teacher.jsonl", "id", "responses")
             if r["id"] in labels and run.held_out(r["id"])]
    prompts = prompts_of(task, tokenizer, asked)
    good = [(r["id"], text) for r in asked for text in sorted(
        {x["text"] for x, label in zip(r["responses"], labels[r["id"]]) if label})]
    rows = [(prompts[id_], tokenizer.encode(text) + [tokenizer.eos_ids[0]]) for id_, text in good]
    said = [kinds([tokenizer.decode([token]) for token in row]) for _, row in rows]
    nats = [(order_nats(problems[id_], text), len(row)) for (id_, text), (_, row) in
            zip(good, rows)]
    nats = [(x, n) for x, n in nats if x is not None]
    tokens = collections.Counter(kind for row in said for kind in row)
    print(f"{len(rows)} responses to {len({id_ for id_, _ in good})} questions, "
          f"{tokens.total()} tokens; {len(nats)} in an order that the corpus may have, which alone "
          f"is {sum(x for x, _ in nats) / sum(n for _, n in nats):.4f} nats per token")
    for name, path in (("base", TINY), ("sft", folder / "sft"), ("rl", folder / "rl")):
        losses = logprobs(weights.load(path, dtype=torch.float32), rows)
        sums = collections.Counter()
        for row, its in zip(losses, said):
            for x, kind in zip(row, its):
                sums[kind] -= x
        print(f"\n{name}: loss {sums.total() / tokens.total():.4f}")
        for kind, n in tokens.items():
            print(f"  {kind:8}{n / tokens.total():6.1%} of the tokens  {sums[kind] / n:.4f} per "
                  f"token  {sums[kind] / sums.total():6.1%} of the loss")
        facts = []                                   # (log-probability, is it true?)
        for (_, text), row, its in zip(good, losses, said):
            # A result of two digits is two tokens.
            starts = [i + 1 for i, kind in enumerate(its) if kind == "form" and its[i + 1:i + 2] ==
                      ["result"]]
            stated = [sum(row[i:i + its[i:].index("form")]) for i in starts]
            facts += zip(stated, (arithmetic.exact(int(a), op, int(b)) == int(c)
                                  for a, op, b, c in STEP.findall(text)))
        unsure, true = [x for x, _ in facts if math.exp(x) < 0.9], [x for x, ok in facts if ok]
        print(f"  {len(unsure) / len(facts):.1%} of the facts have P < 0.9, and "
              f"{sum(unsure) / sum(x for x, _ in facts):.1%} of the results' loss; of the true "
              f"ones {sum(math.exp(x) < 0.5 for x in true) / len(true):.1%} have P < 0.5")
        steps = collections.Counter()
        for line in files.read_jsonl(folder / "samples" / f"{name}.jsonl")[1:]:
            how = "greedy" if "greedy" in line["what"] else "sampled"
            for r in line["responses"] if "test" in line["id"] else []:
                right = [arithmetic.exact(int(a), op, int(b)) == int(c)
                         for a, op, b, c in STEP.findall(r["text"])]
                steps.update({(how, "all"): len(right), (how, "right"): sum(right),
                              (how, "texts"): 1, (how, "whole"): all(right)})
        for how in ("greedy", "sampled"):
            share, each = (steps[how, "right"] / steps[how, "all"],
                           steps[how, "all"] / steps[how, "texts"])
            print(f"  {how}: {share:.1%} of the steps right, {each:.2f} steps: {share ** each:.1%};"
                  f" {steps[how, 'whole'] / steps[how, 'texts']:.1%} have all right")


def test_each_token_is_of_one_kind():
    tokenizer = Tokenizer(TINY)
    words = [tokenizer.decode([token]) for token in tokenizer.encode("Step 1: 4 + 8 = 12\n#### 12")]
    assert "".join(words + [""]) == "Step 1: 4 + 8 = 12\n#### 12"
    assert kinds(words + [""]) == ["form", *["choice"] * 3, "form", "result", "result", "form",
                                   "answer", "answer", "form"]


def test_the_nats_of_an_order_are_those_of_the_corpus():
    """Against drawn workings; and the probabilities of all of them add up to 1."""
    problem, rng = arithmetic.Problem("", [(1, (9,)), (-1, (2, 3)), (1, (4,))], 7), random.Random(0)
    drawn = collections.Counter(arithmetic.work(problem, rng) for _ in range(3000))
    shares = {text: math.exp(-order_nats(problem, text)) for text in drawn}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(abs(n / 3000 - shares[text]) < 0.04 for text, n in drawn.items())
    assert order_nats(problem, "Step 1: 9 + 9 = 18\n#### 18") is None


# ---- faults of docs/bugs.md that are looked for nowhere else ----

def test_the_value_model_learns_returns_of_advantages_that_are_not_whitened(tmp_path, monkeypatch):
    """Scores are 4 and -4, values are 0, a response is one token: half the mean square is 8. Of
    whitened advantages it would be 1/2."""
    from test_meaning import ppo, ppo_folder, toy_policy, toy_reward
    monkeypatch.setattr(process, "need", lambda *given: None)
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=4, b=-4))
    (row,) = ppo(folder, "--whiten-advantages", value_from="policy")
    assert row["value_loss"] == pytest.approx(8, rel=1e-3)


def test_ppo_trains_on_the_tokens_that_were_sampled(tmp_path, monkeypatch):
    """B, e and n, whose text the tokenizer makes one token of."""
    from test_meaning import EOS, TOKENIZER, ppo, ppo_folder, toy_policy, toy_reward
    tokens = [TOKENIZER.encode(letter)[0] for letter in "Ben"]
    assert TOKENIZER.decode(tokens) == "Ben" and len(TOKENIZER.encode("Ben")) == 1
    described, seen = train_rl.describe, []

    def describe(micro_batch, config, models, rows, counts, scored_rows):
        seen.extend(rows)
        return described(micro_batch, config, models, rows, counts, scored_rows)

    monkeypatch.setattr(process, "need", lambda *given: None)
    monkeypatch.setattr(train_rl, "describe", describe)
    monkeypatch.setattr(train_rl, "sample_all", lambda model, prompts, n, **how: [
        generate.Sample([*tokens, EOS], [0.0] * 4, True)] * n * len(prompts))
    ppo(ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward()), max_new_tokens=4)
    assert len(seen) == 64 and all(row[-4:] == [*tokens, EOS] for row in seen)


# ---- docs/method.md ----

PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


def printed(name):
    """The numbers behind `name` in the worked example: fp64 (n,), and how many decimals."""
    example = PAGE.split("## A worked example\n")[1].split("\n## ")[0]
    (numbers,) = re.findall(rf"^ *{name} +(?:=[^=\n]*= +)?((?:-?[\d.]+ *)+)$", example,
                            re.MULTILINE)
    values = [float(x) for x in numbers.split()]
    return (torch.tensor(values, dtype=torch.float64),
            max(len(x.partition(".")[2]) for x in numbers.split()))


def stands(name, found):
    """`found` is what is printed behind `name`, to its last decimal."""
    values, decimals = printed(name)
    torch.testing.assert_close(found.double().reshape(-1), values, rtol=0,
                               atol=0.5 * 10**-decimals + 1e-6)


def test_the_worked_example_is_what_the_library_computes():
    answers = [str(int(x)) for x in printed("answers")[0]]
    assert vote.majority(answers, 0.4) == vote.Vote("8", 0.4, 10)
    assert vote.labels(answers, vote.majority(answers)).count(True) == 4
    old, ref, values, new, new_values = (printed(name)[0][None] for name in (
        "old_logprobs", "ref_logprobs", "old_values", "new_logprobs", "new_values"))
    mask = torch.ones(1, 6, dtype=torch.bool)
    score = torch.tensor([1.943]).sigmoid().double().round(decimals=4)
    assert score.item() == 0.8747 and "sigmoid(1.943) = 0.8747" in PAGE

    rewards = ppo.shape_rewards(score, old, ref, mask, 0.05)
    advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    stands("rewards", rewards)
    stands("deltas", ppo.gae(rewards, values, mask, gamma=1.0, lam=0.0)[0])
    stands("advantages", advantages)
    stands("returns", returns)
    # Whitened among 618 others, half of them low and half high, that make the step's mean and
    # deviation what is printed.
    mean, deviation = -0.0705, 0.1978
    assert f"tokens have advantages of mean {mean} and deviation {deviation}:" in PAGE
    middle = (624 * mean - advantages.sum()) / 618
    around = ((624 * (deviation**2 + mean**2) - advantages.square().sum()) / 618 - middle**2).sqrt()
    others = torch.stack([middle - around, middle + around]).repeat(309)[None]
    step = torch.cat([advantages, others], dim=1)                                  # (1, 624)
    white = ppo.whiten(step, torch.ones_like(step, dtype=torch.bool))[:, :6]
    stands("whitened", white)

    stands("ratios", (new - old).exp())
    each = [ppo.policy_loss(new[:, t:t + 1], old[:, t:t + 1], white[:, t:t + 1], mask[:, :1])[0]
            for t in range(6)]
    stands("losses", torch.stack(each))
    loss, measured = ppo.policy_loss(new, old, white, mask)
    stands("policy loss", loss)
    stands("approx_kl", measured["approx_kl"])
    errors = [2 * ppo.value_loss(*(x[:, t:t + 1] for x in (new_values, values, returns)),
                                 mask[:, :1]) for t in range(6)]
    stands("errors", torch.stack(errors))
    stands("value loss", ppo.value_loss(new_values, values, returns, mask))

    # Above the ratio 1.2 the loss stays, and has no gradient.
    far = (old[:, 2:3] + torch.tensor(1.3).log()).requires_grad_()
    clipped, _ = ppo.policy_loss(far, old[:, 2:3], white[:, 2:3], mask[:, :1])
    clipped.backward()
    assert f"the loss stays {clipped.item():.4f}," in PAGE and far.grad.item() == 0
    assert old[0, 2].exp() * 1.2 == pytest.approx(0.82, abs=0.005)


@pytest.mark.parametrize("page", ["method.md", "bugs.md"])
def test_what_a_page_names_is_there(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(((?!http|#)[^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link
    # `name` in [file.py](...): a function or a class there.
    for names, link in re.findall(r"((?:`\w+`(?:, |,\n)?)+) in\s\[[^]]+\]\(([^)]+\.py)\)", text):
        source = (ROOT / "docs" / link).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE), (name, link)
    for name, test in re.findall(r"(test_\w+\.py)::(\w+)", text):
        assert f"def {test}(" in (ROOT / "tests" / name).read_text(encoding="utf-8"), test


def test_each_broken_line_of_the_museum_stands_once_in_the_code():
    faults = runpy.run_path(str(ROOT / "docs" / "museum.py"))["FAULTS"]
    assert len({fault.name for fault in faults}) == len(faults) == 12
    for fault in faults:
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, fault.name
        compile(text.replace(fault.old, fault.new), fault.file, "exec")


if __name__ == "__main__":
    show_split(Path(sys.argv[1]))
