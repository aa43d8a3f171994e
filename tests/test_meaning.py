"""What a stage means: each script on a run folder made by hand, against numbers worked out here.

The models are small and random, or toys whose probabilities and scores are known by hand. The
tests see a script from outside: its run folder, its metrics.jsonl, and what it gives to a few
functions of the library, wherever the call to them stands.
"""

import copy
import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLER_GAP, random_model
from safetensors.torch import load_file

import eval as evaluation
import train_rl
import train_rm
import train_sft
from data import TASKS, hub, teacher
from nanodistill import files, process, run, settings, weights
from nanodistill.model import CausalLM, ScalarModel
from nanodistill.tokenizer import Tokenizer


ROOT = Path(__file__).resolve().parents[1]
SEED, QUESTIONS = 11, TASKS["arithmetic"](11).questions("train")[:16]
TEST = TASKS["arithmetic"](11).questions("test")[:4]
HELD_OUT = [q["id"] for q in QUESTIONS if run.held_out(q["id"])]         # two of them
UNVOTED = QUESTIONS[2]["id"]                                             # the vote dropped it
TOKENIZER = Tokenizer(hub.TINY / "student")
EOS, A, B = 3, 21, 22                                             # tokens of the toys
VOCABULARY = 448


# ---- what surrounds a script ----

def everywhere(monkeypatch, name, make):
    """Put make(original) for the library's function `name`, in every module of ours with it."""
    ours = [m for m in list(sys.modules.values())
            if Path(getattr(m, "__file__", None) or "/").is_relative_to(ROOT)]
    found = {f for m in ours if callable(f := vars(m).get(name))
             and f.__module__.startswith("nanodistill") and f is not settings.load}
    assert len(found) == 1, f"{name}: {found}"
    original = found.pop()
    replaced = make(original)
    for module in ours:
        if vars(module).get(name) is original:
            monkeypatch.setattr(module, name, replaced)


def listed(tensor):
    """Its numbers; None on the meta device, where a stage plans its memory by the same calls."""
    try:
        return tensor.flatten().tolist()
    except NotImplementedError:
        return None


def prompt_of(question):
    return TOKENIZER.prompt_ids(question["question"])


def answers(*texts):
    """Responses of a teacher; a text that ends in "..." was cut off there."""
    rows = []
    for text in texts:
        ended = not text.endswith("...")
        answer = text.rpartition("#### ")[2] if ended and "####" in text else None
        rows.append({"text": text.removesuffix("..."), "temperature": 1.0, "ended": ended,
                     "answer": answer})
    return rows


def ids_of(text):
    """A response's token ids, the EOS among them unless it was cut off."""
    return TOKENIZER.encode(text.removesuffix("...")) + [EOS] * (not text.endswith("..."))


def texts_of(k):
    """Six responses to question k, whose vote is 7: right in two ways, one of them twice; wrong;
    cut off before any answer; cut off at the right one, before the EOS."""
    worked = f"Step 1: {k} + 1 = 7\n#### 7"
    return [worked, "#### 7", worked, "#### 9", f"Step 1: {k}...",
            f"Step 1: {k} - 2 = 7\n#### 7..."]


def run_folder(folder, **models):
    """A run folder with the teacher's responses and votes, and models by name."""
    folder.mkdir()
    lines, labels = [], []
    for k, question in enumerate(QUESTIONS):
        lines.append({**question, "responses": answers(*texts_of(k))})
        voted = question["id"] != UNVOTED
        labels.append({"id": question["id"], "vote": "7" if voted else None, "agreement": 0.5,
                       "n": 6, "labels": [True, True, True, False, False, False] if voted
                       else [None] * 6})
    for name, rows in (("teacher", lines), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, model in models.items():
        weights.save(model, folder / name, hub.TINY / "student")
    return folder


def call(script, folder, *flags):
    """Run a script's main in `folder`, whose student/ is the student's base."""
    flags = [str(flag) for flag in flags]
    common = ["--student", str(folder / "student"), "--teacher", "tiny", "--task", "arithmetic",
              "--seed", str(SEED), "--questions", str(len(QUESTIONS)), "--threads", "1",
              "--device", "cpu", "--dtype", "fp32", "--out", str(folder)]
    if "--max-new-tokens" not in flags:
        common += ["--max-new-tokens", "32"]
    script.main([*common, *flags])


def figures(folder, stage, key):
    """Values of `key` in metrics.jsonl, in the order of the steps."""
    return [row[key] for row in run.read_metrics(folder, stage).values() if key in row]


def language_model(seed=0):
    return random_model(seed=seed, vocab_size=VOCABULARY, max_position_embeddings=256,
                        tie_word_embeddings=True)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def moved(before, after):
    """The largest change of any weight."""
    return max((after[name].float() - before[name].float()).abs().max().item() for name in before)


# ---- SFT ----

def good_responses(held_out):
    """(prompt, response with EOS) of each distinct response that the vote calls good."""
    return [(prompt_of(q), ids_of(text)) for k, q in enumerate(QUESTIONS)
            for text in texts_of(k)[:2] if q["id"] != UNVOTED and (q["id"] in HELD_OUT) == held_out]


def mean_cross_entropy(model, rows):
    """Of all response tokens of `rows`, from full logits, one sequence at a time."""
    losses = []
    for prompt, response in rows:
        logits = model(torch.tensor([prompt + response]))[0]             # (T, V)
        before = logits[len(prompt) - 1:-1]
        losses.append(F.cross_entropy(before, torch.tensor(response), reduction="none"))
    return torch.cat(losses).mean()


def test_sft_loss_is_the_mean_over_the_tokens_of_good_responses_with_eos(tmp_path):
    """Ten steps of a rate too small to matter: the tenth one's loss is the first one's."""
    student = language_model()
    folder = run_folder(tmp_path / "run", student=student)
    train, held_out = good_responses(False), good_responses(True)
    assert len(train) == 26 and len(held_out) == 4
    call(train_sft, folder, "--epochs", 10, "--batch-size", len(train), "--learning-rate", 1e-12)
    loss = mean_cross_entropy(student, train)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in student.parameters()]).norm().item()
    assert figures(folder, "sft", "loss") == pytest.approx([loss.item()], rel=1e-5)
    assert figures(folder, "sft", "grad_norm") == pytest.approx([norm], rel=1e-4)
    assert figures(folder, "sft", "tokens") == [sum(len(response) for _, response in train)]
    expected = mean_cross_entropy(student, held_out).item()
    logged = figures(folder, "sft", "held_out_loss")
    assert logged == pytest.approx([expected] * len(logged), rel=1e-5) and len(logged) > 2


def test_sft_takes_each_good_response_once_a_pass_and_nothing_else(tmp_path, monkeypatch):
    folder, seen = run_folder(tmp_path / "run", student=language_model()), []

    def make(original):
        def recorded(hidden, weight, targets, *args, **kwargs):
            if torch.is_grad_enabled() and listed(targets):
                seen.append([t for t in listed(targets) if t >= 0])
            return original(hidden, weight, targets, *args, **kwargs)
        return recorded

    everywhere(monkeypatch, "linear_cross_entropy", make)
    call(train_sft, folder, "--epochs", 2, "--batch-size", 13, "--micro-batch", 13,
         "--learning-rate", 1e-4)
    assert len(seen) == 4                                                # two batches a pass
    passes = []
    for half in (seen[:2], seen[2:]):
        responses, response = Counter(), []
        for token in [token for batch in half for token in batch]:
            response.append(token)
            if token == EOS:
                responses[tuple(response)] += 1
                response = []
        assert not response
        passes.append(responses)
    expected = Counter(tuple(response) for _, response in good_responses(False))
    assert passes == [expected, expected]
    assert sorted(map(tuple, seen[:2])) != sorted(map(tuple, seen[2:]))  # mixed anew


def test_a_step_of_sft_goes_down_the_gradient_as_far_as_the_rate_says(tmp_path):
    """Adam's first step moves each weight by the rate, against the gradient's sign."""
    student, rate = language_model(), 1e-3
    folder, train = run_folder(tmp_path / "run", student=student), good_responses(False)
    call(train_sft, folder, "--epochs", 1, "--batch-size", len(train), "--learning-rate", rate)
    mean_cross_entropy(student, train).backward()
    after = tensors(folder / "sft")
    for name, p in student.named_parameters():
        clear = p.grad.abs() > 1e-3
        change = (after[name] - p.detach())[clear]
        torch.testing.assert_close(change, -rate * p.grad[clear].sign(), rtol=0.01, atol=0)


def test_sft_teaches_the_good_responses_and_to_stop_after_them(tmp_path):
    student = language_model()
    folder, train = run_folder(tmp_path / "run", student=student), good_responses(False)
    call(train_sft, folder, "--epochs", 20, "--batch-size", 13, "--learning-rate", 1e-2)
    rows = [(prompt + response[:-1], response[-1:]) for prompt, response in train]
    after = weights.load(folder / "sft")
    with torch.no_grad():
        before, learned = mean_cross_entropy(student, train), mean_cross_entropy(after, train)
        assert learned < before / 2
        assert mean_cross_entropy(after, rows) < mean_cross_entropy(student, rows) / 2
    rates = figures(folder, "sft", "learning_rate")                      # 40 steps: after 10, 20...
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.75e-2 and 1e-3 <= rates[-1] < 1.5e-3             # down to a tenth


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
def test_sft_keeps_the_last_weights_whatever_the_held_out_loss(tmp_path, monkeypatch, losses):
    """Made-up losses before the first step, after two, and at the end, after three. With few
    questions the loss rises while accuracy grows: its minimum is the student as it was."""
    folder, moments = run_folder(tmp_path / "run", student=language_model()), []

    def make(original):
        def made_up(hidden, weight, *args, **kwargs):
            if torch.is_grad_enabled() or not listed(weight):
                return original(hidden, weight, *args, **kwargs)
            moments.append(weight.detach().clone())
            return torch.tensor(losses[len(moments) - 1])
        return made_up

    everywhere(monkeypatch, "linear_cross_entropy", make)
    call(train_sft, folder, "--epochs", 1.5, "--batch-size", 13, "--micro-batch", 64,
         "--evals-per-epoch", 1, "--learning-rate", 1e-3)
    assert figures(folder, "sft", "held_out_loss") == losses and len(moments) == 3
    assert not torch.equal(moments[0], moments[1]) and not torch.equal(moments[1], moments[2])
    kept = tensors(folder / "sft")["model.embed_tokens.weight"]
    assert torch.equal(kept, moments[2])


# ---- reward model ----

def student_texts(k):
    return [f"Step 1: {k} - 1 = 7\n#### 7", f"Step 1: {k} * 1 = 8\n#### 8",
            f"#### 7{'...' * (k % 2)}"]


def scripted(table, calls=None):
    """For `everywhere`: a `generate` of which the texts of question k are table(model, k,
    temperature). A text that ends in "..." was cut off there."""
    index = {tuple(prompt_of(q)): k for k, q in enumerate(QUESTIONS + TEST)}

    def make(original):
        def made_up(model, prompts, *, n=1, temperature=1.0, **rest):
            if calls is not None:
                calls.append(SimpleNamespace(model=model, prompts=prompts, n=n,
                                             temperature=temperature))
            for i, prompt in enumerate(prompts):
                for j, text in enumerate(table(model, index[tuple(prompt)], temperature)[:n]):
                    tokens = ids_of(text)
                    yield i, j, SimpleNamespace(tokens=tokens, logprobs=[-0.5] * len(tokens),
                                                ended=tokens[-1] == EOS)
        return made_up
    return make


def rm_rows(held_out, sources=("teacher", "student")):
    """(question id, prompt, response, label) as a person would write them down."""
    rows = []
    for k, question in enumerate(QUESTIONS):
        if question["id"] == UNVOTED or (question["id"] in HELD_OUT) != held_out:
            continue
        texts = (texts_of(k) if "teacher" in sources else []) + \
            (student_texts(k) if "student" in sources else [])
        for text in texts:
            label = text.endswith("#### 7")
            rows.append((question["id"], prompt_of(question), ids_of(text), label))
    return rows


def with_a_head(model):
    """The reward model that starts from `model`, with a head that is not zero."""
    scalar = ScalarModel(model.config).eval()
    scalar.load_state_dict(model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(5)
    scalar.score.weight.data = 0.3 * torch.randn(1, model.config.hidden_size, generator=generator)
    return scalar


def give_heads(original):
    """For `everywhere`: a fresh scalar head, which is zero, tells no position from another."""
    def load(folder, kind=CausalLM, *args, **kwargs):
        model = original(folder, kind, *args, **kwargs)
        if kind is ScalarModel:
            model.score.weight.data = with_a_head(language_model()).score.weight.data.clone()
        return model
    return load


def outputs(model, prompt, response):
    """The scalar model's output from the prompt's last token to the response's last."""
    return model(torch.tensor([prompt + response]))[0, len(prompt) - 1:]


def log_loss(scores, label):
    return -(F.logsigmoid(scores) if label else F.logsigmoid(-scores))


def hand_auc(scores, labels):
    """Share of the pairs of a good and a bad one in which the good one is above."""
    pairs = [(good > bad) + 0.5 * (good == bad) for good, g in zip(scores, labels) if g
             for bad, b in zip(scores, labels) if not b]
    return sum(pairs) / len(pairs)


ONE_BATCH = ["--samples", 3, "--epochs", 10, "--batch-size", 1000, "--optimizer", "adamw"]


@pytest.mark.parametrize("sources, token_loss", [
    (("teacher", "student"), 0.5), (("teacher",), 0.0), (("student",), 2.0)])
def test_reward_models_loss_and_figures_by_hand(tmp_path, monkeypatch, sources, token_loss):
    """Ten steps of a rate too small to matter. The last token by itself, and all from the prompt's
    last one on that come before it, learn whether the response's answer is the vote."""
    sft = language_model()
    folder = run_folder(tmp_path / "run", student=sft, sft=sft)
    everywhere(monkeypatch, "generate", scripted(lambda model, k, t: student_texts(k)))
    everywhere(monkeypatch, "load", give_heads)
    call(train_rm, folder, *ONE_BATCH, "--learning-rate", 1e-12, "--token-loss", token_loss,
         "--rm-data", "both" if len(sources) == 2 else sources[0])
    model, last, earlier = with_a_head(sft), [], []
    rows = rm_rows(False, sources)
    assert len(rows) == 13 * (6 * ("teacher" in sources) + 3 * ("student" in sources))
    for _, prompt, response, label in rows:
        losses = log_loss(outputs(model, prompt, response), label)
        last.append(losses[-1:])
        earlier.append(losses[:-1])
    loss = torch.cat(last).mean() + token_loss * torch.cat(earlier).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert figures(folder, "rm", "loss") == pytest.approx([loss.item()], rel=1e-5)
    assert figures(folder, "rm", "grad_norm") == pytest.approx([norm], rel=1e-4)
    for source in ("teacher", "student"):                                # held out of both, always
        rows = rm_rows(True, (source,))
        with torch.no_grad():
            scores = [outputs(model, p, r)[-1].item() for _, p, r, _ in rows]
        labels = [label for *_, label in rows]
        assert figures(folder, "rm", f"n_{source}")[-1] == len(rows)
        assert figures(folder, "rm", f"auc_{source}")[-1] == pytest.approx(hand_auc(scores, labels))
        right = sum((score > 0) == label for score, label in zip(scores, labels))
        assert figures(folder, "rm", f"accuracy_{source}")[-1] == pytest.approx(right / len(rows))


def test_labels_of_both_votes_by_hand(tmp_path, monkeypatch):
    """The teacher said 7, 7, 7, 9 and nothing twice: 3, 1 and 2 sixths. The student's three answers
    have two sixths each: three 8 win; one 9 ties with the 7, and the question goes."""
    sft = language_model()
    folder = run_folder(tmp_path / "run", student=sft, sft=sft, rl=sft)

    def said(k):
        return ["#### 9", "Step 1...", "Step 2..."] if k % 3 == 0 else [
            f"Step 1: {k} * 1 = 8\n#### 8", "#### 8", "#### 8"]
    everywhere(monkeypatch, "generate", scripted(lambda model, k, t: said(k)))
    everywhere(monkeypatch, "load", give_heads)
    call(train_rm, folder, *ONE_BATCH, "--learning-rate", 1e-12, "--token-loss", 0,
         "--rm-votes", "both")
    model, losses, held_out = with_a_head(sft), [], 0
    for k, question in enumerate(QUESTIONS):
        if question["id"] == UNVOTED or k % 3 == 0:
            continue
        if question["id"] in HELD_OUT:
            held_out += 1
            continue
        for text in texts_of(k) + said(k):
            output = outputs(model, prompt_of(question), ids_of(text))[-1:]
            losses.append(log_loss(output, text.endswith("#### 8")))
    assert figures(folder, "rm", "loss") == pytest.approx([torch.cat(losses).mean().item()],
                                                          rel=1e-5)
    assert figures(folder, "rm", "n_student")[-1] == 3 * held_out
    # The teacher's vote stays what it was.
    assert {row["vote"] for row in files.read_jsonl(folder / "labels.jsonl")} == {"7", None}
    # The evaluation judges the reward model by what it has learned: as the stage itself did.
    monkeypatch.setattr("nanodistill.report.plot", lambda *_: None)
    call(evaluation, folder, "--questions", 2, "--samples", 3)
    judged = json.loads((folder / "report.json").read_text())["reward_model"]["held_out"]
    last = [*run.read_metrics(folder, "rm").values()][-1]
    for name, source in (("teacher", "teacher"), ("sft", "student")):
        for key in ("n", "auc", "accuracy"):
            assert judged[name][key] == pytest.approx(last[f"{key}_{source}"], nan_ok=True)


def test_bradley_terry_loss_by_hand(tmp_path, monkeypatch):
    """A question has as many pairs as its rarer kind allows. Here each has one good response of the
    student and one bad one, so it is clear which two are a pair."""
    sft = language_model()
    folder = run_folder(tmp_path / "run", student=sft, sft=sft)
    everywhere(monkeypatch, "generate", scripted(lambda *_: ["#### 7", "#### 8", "#### 8"]))
    everywhere(monkeypatch, "load", give_heads)
    call(train_rm, folder, *ONE_BATCH, "--learning-rate", 1e-12, "--rm-data", "student",
         "--rm-loss", "bt")
    model, losses = with_a_head(sft), []
    for question in QUESTIONS:
        if question["id"] != UNVOTED and question["id"] not in HELD_OUT:
            good, bad = (outputs(model, prompt_of(question), ids_of(text))[-1]
                         for text in ("#### 7", "#### 8"))
            losses.append(-torch.log(torch.sigmoid(good - bad)))
    assert len(losses) == 13
    expected = torch.stack(losses).mean().item()
    assert figures(folder, "rm", "loss") == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("loss", ["bce", "bt"])
def test_the_reward_model_comes_to_score_good_responses_above_bad_ones(tmp_path, monkeypatch, loss):
    sft = language_model()
    folder = run_folder(tmp_path / "run", student=sft, sft=sft)
    everywhere(monkeypatch, "generate", scripted(lambda model, k, t: student_texts(k)))
    call(train_rm, folder, "--samples", 3, "--epochs", 4, "--batch-size", 13, "--optimizer",
         "adamw", "--learning-rate", 3e-3, "--rm-loss", loss)
    model, rows = weights.load(folder / "rm", ScalarModel), rm_rows(False)
    with torch.no_grad():
        scores = [outputs(model, prompt, response)[-1].item() for _, prompt, response, _ in rows]
    assert hand_auc(scores, [label for *_, label in rows]) > 0.9


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_reward_model_of_the_best_held_out_auc_on_student_responses_is_kept(
        tmp_path, monkeypatch, best):
    """Made-up scores: at the moment `best` the student's held-out responses are ranked right, at
    all others wrong; the teacher's are the other way round."""
    sft = language_model()
    folder, moments = run_folder(tmp_path / "run", student=sft, sft=sft), []
    everywhere(monkeypatch, "generate", scripted(lambda model, k, t: student_texts(k)))
    labels = {tuple(p + r): label for _, p, r, label in rm_rows(True)}
    teachers = {tuple(p + r) for _, p, r, _ in rm_rows(True, ("teacher",))}

    def make(original):
        def made_up(model, rows, *args, **kwargs):
            head = torch.cat([p.detach().flatten() for p in model.parameters()])
            at = next((i for i, h in enumerate(moments) if torch.equal(h, head)), len(moments))
            if at == len(moments):
                moments.append(head)
            right = (at == best) == (not all(tuple(row) in teachers for row in rows))
            return [1.0 if labels[tuple(row)] == right else -1.0 for row in rows]
        return made_up

    everywhere(monkeypatch, "score_sequences", make)
    call(train_rm, folder, "--samples", 3, "--epochs", 1, "--batch-size", 39, "--evals", 3,
         "--optimizer", "adamw", "--learning-rate", 1e-3)
    assert len(moments) >= 3                                             # of three steps
    kept = weights.load(folder / "rm", ScalarModel)
    kept = torch.cat([p.detach().flatten() for p in kept.parameters()])
    assert torch.equal(kept, moments[best])
    aucs = figures(folder, "rm", "auc_student")
    assert aucs[-1] == 1.0 and (best == 2 or aucs[best] == 1.0) and 0.0 in aucs[:3]


def test_the_sft_student_is_sampled_at_temperature_1_on_every_voted_question(tmp_path, monkeypatch):
    sft, calls = language_model(seed=3), []
    folder = run_folder(tmp_path / "run", student=language_model(), sft=sft)
    everywhere(monkeypatch, "generate", scripted(lambda model, k, t: student_texts(k), calls))
    call(train_rm, folder, "--samples", 3, "--epochs", 1, "--batch-size", 1000)
    (asked,) = calls
    assert sorted(asked.prompts) == sorted(prompt_of(q) for q in QUESTIONS if q["id"] != UNVOTED)
    temperatures = asked.temperature if isinstance(asked.temperature, list) else [asked.temperature]
    assert set(temperatures) == {1.0} and asked.n == 3
    for name, p in sft.named_parameters():
        assert torch.equal(dict(asked.model.named_parameters())[name].float(), p)
    rows = {row["id"]: row["responses"] for row in files.read_jsonl(folder / "student.jsonl")}
    assert set(rows) == {q["id"] for q in QUESTIONS} - {UNVOTED}
    for k, question in enumerate(QUESTIONS):
        for response, text in zip(rows.get(question["id"], []), student_texts(k), strict=False):
            assert response["text"] == text.removesuffix("...")
            assert response["ended"] == (not text.endswith("..."))
            assert response["answer"] == (text[-1] if response["ended"] else None)


# ---- PPO ----

TOY = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32,
       "num_hidden_layers": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-12}
TOKENS = {"eos": EOS, "a": A, "b": B}


def toy_policy(**logits):
    """Says EOS, A and B, whatever came before, with the probabilities that `logits` mean."""
    model = random_model(**TOY)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or p.shape == (VOCABULARY, 32):
                p.zero_()                                                # layers add nothing
            elif p.dim() == 1:
                p.fill_(1.0)
        model.model.embed_tokens.weight[:, 0] = 10.0                     # normed: sqrt(32)
        model.lm_head.weight[:, 0] = -400 / 32**0.5
        for name, logit in logits.items():
            model.lm_head.weight[TOKENS[name], 0] = logit / 32**0.5
    return model


def toy_reward(**scores):
    """Scores a sequence by its last token alone: with one of `scores`, else with 0."""
    model = random_model(ScalarModel, **TOY)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or p.shape in ((VOCABULARY, 32), (1, 32)):
                p.zero_()                                                # layers add nothing
            elif p.dim() == 1:
                p.fill_(1.0)
        model.model.embed_tokens.weight[:, 9] = 10.0                     # read by nobody
        for channel, (name, score) in enumerate(scores.items()):         # one for each
            row = model.model.embed_tokens.weight[TOKENS[name]]
            row[channel], row[9] = 10.0, 0.0                             # normed: sqrt(32)
            model.score.weight[0, channel] = score / 32**0.5
    return model


def ppo_folder(folder, policy, reward):
    return run_folder(folder, student=policy, sft=policy, rm=reward)


PLAIN = {"steps": 1, "prompts": 16, "samples": 4, "ppo-epochs": 1, "minibatches": 1,
         "max-new-tokens": 1, "learning-rate": 1e-12, "value-learning-rate": 1e-12, "warmup": 0,
         "kl-coef": 0, "kl-limit": 1e9, "no-eos-penalty": 0, "score": "logit", "gamma": 1, "lam": 1}


def ppo(folder, *switches, **changes):
    """PPO with nothing but the rollout, the score and one gradient step, but for `changes`."""
    flags = {**PLAIN, **{name.replace("_", "-"): value for name, value in changes.items()}}
    whiten = [f"--no-{name}" for name in ("whiten-scores", "whiten-advantages")
              if f"--{name}" not in switches]
    call(train_rl, folder, *(x for name, value in flags.items() for x in (f"--{name}", value)),
         *whiten, *switches)
    return [row for row in run.read_metrics(folder, "rl").values() if "score" in row]


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(process, "need", lambda *_: None)


@pytest.fixture
def rollouts(monkeypatch, no_evaluation):
    """What was sampled at each step: prompts, the model as it was, [(prompt, Sample)]."""
    seen = []

    def make(original):
        def recorded(model, prompts, *args, **kwargs):
            step = SimpleNamespace(model=copy.deepcopy(model), prompts=prompts, samples=[],
                                   temperature=kwargs.get("temperature", 1.0))
            seen.append(step)
            for i, j, sample in original(model, prompts, *args, **kwargs):
                step.samples.append((prompts[i], sample))
                yield i, j, sample
        return recorded

    everywhere(monkeypatch, "generate", make)
    return seen


def probability(folder, *tokens):
    """The probability of `tokens` after a question, by the policy in `folder`, mean over the
    questions."""
    model = weights.load(folder)
    with torch.no_grad():
        probabilities = torch.stack([                                # (questions, V)
            model(torch.tensor([prompt_of(q)]))[0, -1].softmax(-1) for q in QUESTIONS])
    return probabilities[:, list(tokens)].sum(1).mean().item()


@pytest.mark.parametrize("liking", [1, -1])
def test_ppo_says_more_often_what_is_liked_and_less_often_what_is_not(
        tmp_path, no_evaluation, liking):
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=liking, b=-liking))
    assert probability(folder / "sft", A) == pytest.approx(0.5)
    ppo(folder, steps=4, learning_rate=0.02, ppo_epochs=2, minibatches=2, max_new_tokens=2)
    after = probability(folder / "rl", A)
    assert after > 0.75 if liking > 0 else after < 0.25
    assert probability(folder / "rl", A, B) > 0.99


@pytest.mark.parametrize("kl_coef", [0, 20])
def test_a_large_kl_coef_keeps_the_policy_where_it_was(tmp_path, no_evaluation, kl_coef):
    """With the score 1 for A and -1 for B the best policy says A and B as exp(2 / kl_coef) to 1."""
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=1, b=-1))
    ppo(folder, steps=8, learning_rate=0.02, kl_coef=kl_coef, ppo_epochs=2)
    after = probability(folder / "rl", A)
    assert 0.4 < after < 0.65 if kl_coef else after > 0.9


def test_every_step_logs_what_hand_counts_of_its_rollout_give(tmp_path, rollouts):
    """Score by the last token, KL to the student of the start, their sum less the penalty, length
    and entropy, while the policy moves away from that student."""
    sft = toy_policy(eos=0, a=0, b=0)
    folder = ppo_folder(tmp_path / "run", sft, toy_reward(eos=1, a=2, b=-1))
    rows = ppo(folder, steps=3, learning_rate=0.05, kl_coef=0.5, no_eos_penalty=3, max_new_tokens=3)
    assert len(rows) == len(rollouts) == 3
    for row, step in zip(rows, rollouts):
        scores, kls, unended, entropies, lengths = [], [], [], [], []
        for prompt, sample in step.samples:
            ids = torch.tensor([prompt + sample.tokens])
            with torch.no_grad():
                now, before = (m(ids)[0, len(prompt) - 1:-1].log_softmax(-1)
                               for m in (step.model, sft))                # (response, V)
            chosen = torch.tensor(sample.tokens)[:, None]
            kls.append((now - before).gather(1, chosen).sum().item())
            entropies += (-now.exp() * now).sum(-1).tolist()
            scores.append({EOS: 1, A: 2, B: -1}[sample.tokens[-1]])
            unended.append(sample.tokens[-1] != EOS)
            lengths.append(len(sample.tokens))
        n = len(scores)
        assert n == 64 and 0 < sum(unended) < n
        assert row["score"] == pytest.approx(sum(scores) / n, abs=1e-4)
        assert row["kl"] == pytest.approx(sum(kls) / n, abs=1e-4)
        rewards = [s - 0.5 * kl - 3 * cut for s, kl, cut in zip(scores, kls, unended)]
        assert row["rewards"] == pytest.approx(sum(rewards) / n, abs=1e-3)
        assert row["ended"] == pytest.approx(1 - sum(unended) / n)
        assert row["length"] == pytest.approx(sum(lengths) / n)
        assert row["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
        assert row["sampler_gap"] < SAMPLER_GAP
    assert max(abs(row["kl"]) for row in rows[1:]) > 0.02                # it did move


def test_not_ending_is_penalised_and_ending_is_not(tmp_path, no_evaluation):
    """The score is 0, so the penalty is all there is: -2 of those that did not end. The policy
    learns to end."""
    folder = ppo_folder(tmp_path / "run", toy_policy(eos=0, a=math.log(3)), toy_reward())
    rows = ppo(folder, steps=4, learning_rate=0.05, no_eos_penalty=2)
    assert rows[0]["ended"] == pytest.approx(0.25, abs=0.15)
    for row in rows:
        assert row["rewards"] == pytest.approx(-2 * (1 - row["ended"]), abs=1e-4)
    assert probability(folder / "rl", EOS) > 0.4


def test_the_penalty_is_taken_from_the_whitened_score(tmp_path, no_evaluation):
    folder = ppo_folder(tmp_path / "run", toy_policy(eos=0, a=0), toy_reward(eos=4, a=-4))
    (row,) = ppo(folder, "--whiten-scores", no_eos_penalty=2)
    assert row["rewards"] == pytest.approx(-2 * (1 - row["ended"]), abs=1e-3)


def test_whitened_scores_have_variance_1(tmp_path, no_evaluation):
    """Values are 0 and a response is one token: the value loss is half the scores' mean square."""
    losses = []
    for switches in ((), ("--whiten-scores",)):
        folder = ppo_folder(tmp_path / f"run{len(losses)}", toy_policy(a=0, b=0),
                            toy_reward(a=4, b=-4))
        (row,) = ppo(folder, *switches, value_from="policy")
        losses.append(row["value_loss"])
    assert losses == pytest.approx([0.5 * 16, 0.5], rel=1e-3)


@pytest.mark.parametrize("whiten, loss", [(False, -2.0), (True, 0.0)])
def test_advantages_are_whitened_or_what_they_are(tmp_path, no_evaluation, whiten, loss):
    """Every response scores 2 and values are 0: the first minibatch's policy loss is -2."""
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=2, b=2))
    (row,) = ppo(folder, *["--whiten-advantages"] * whiten, value_from="policy")
    assert row["policy_loss"] == pytest.approx(loss, abs=1e-3)


def test_gamma_and_lambda_discount_what_comes_later(tmp_path, no_evaluation):
    """Two tokens, score 1 at the second, values 0: advantages 0.8 * 0.5 = 0.4 and 1."""
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=1, b=1))
    (row,) = ppo(folder, gamma=0.8, lam=0.5, max_new_tokens=2, value_from="policy")
    assert row["policy_loss"] == pytest.approx(-(0.4 + 1) / 2, abs=1e-4)
    assert row["value_loss"] == pytest.approx(0.5 * (0.4**2 + 1) / 2, abs=1e-4)


def test_the_value_model_starts_from_the_reward_model_and_learns_the_returns(
        tmp_path, no_evaluation):
    """One token, score 1: at the prompt's last token the reward model says 0, so the value loss
    is 1/2, until the value model has learned."""
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=1, b=1))
    rows = ppo(folder, steps=4, value_learning_rate=0.02)
    losses = [row["value_loss"] for row in rows]
    assert losses[0] == pytest.approx(0.5, abs=1e-4)
    assert max(losses[2:]) < 0.25
    assert moved(tensors(folder / "sft"), tensors(folder / "rl")) < 1e-6  # the policy has no rate


def test_where_the_reward_model_foresees_the_score_there_is_nothing_to_learn(
        tmp_path, no_evaluation):
    """A after A: the value at the first A is the score of an A, 2. The first token's value, at the
    prompt's end, is 0, so the loss is half of 2 squared and 0, and with a probability as score
    half of (sigmoid(2) - 1/2) squared and 0."""
    folder = ppo_folder(tmp_path / "logit", toy_policy(a=0), toy_reward(a=2))
    (row,) = ppo(folder, max_new_tokens=2)
    assert row["value_loss"] == pytest.approx(0.5 * (2**2 + 0) / 2, abs=1e-4)
    folder = ppo_folder(tmp_path / "probability", toy_policy(a=0), toy_reward(a=2))
    (row,) = ppo(folder, max_new_tokens=2, score="probability")
    good = 1 / (1 + math.exp(-2))
    assert row["score"] == pytest.approx(good, abs=1e-4)
    assert row["value_loss"] == pytest.approx(0.5 * ((good - 0.5)**2 + 0) / 2, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rollouts_and_logprobs_are_of_the_same_temperature(tmp_path, rollouts, temperature):
    """9 to 1 at temperature 1 is 3 to 1 at temperature 2."""
    folder = ppo_folder(tmp_path / "run", toy_policy(eos=math.log(9), a=0), toy_reward())
    (row,) = ppo(folder, temperature=temperature, samples=32)
    p = {1.0: 0.9, 2.0: 0.75}[temperature]
    assert row["ended"] == pytest.approx(p, abs=0.05)                    # of 512: 2.6 deviations
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert row["entropy"] == pytest.approx(entropy, abs=1e-4)
    assert row["sampler_gap"] < SAMPLER_GAP and row["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert row["kl"] == pytest.approx(0, abs=1e-5)                       # the reference's as well


def test_the_policys_gradient_is_of_the_temperature_too(tmp_path, no_evaluation):
    """The first Adam step of a head's row goes by the gradient's sign; a second one in the same
    batch sees ratios of softmax(logits / T), which its KL tells."""
    kls = []
    for temperature in (1.0, 4.0):
        folder = ppo_folder(tmp_path / str(temperature), toy_policy(a=0, b=0),
                            toy_reward(a=1, b=-1))
        (row,) = ppo(folder, temperature=temperature, ppo_epochs=2, learning_rate=0.01, samples=16)
        kls.append(row["approx_kl"])
    assert kls[0] == pytest.approx(16 * kls[1], rel=0.35)                # KL goes by logits squared


@pytest.mark.parametrize("limit, updates", [(1e-9, 2), (1e9, 8)])
def test_the_update_ends_where_the_policy_has_gone_too_far(
        tmp_path, no_evaluation, limit, updates):
    """The first minibatch has no KL; the second has, and the policy takes no step for it. So it
    has taken one of Adam's steps, of which none is longer than the rate."""
    rate = 0.003
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=1, b=-1))
    (row,) = ppo(folder, kl_limit=limit, learning_rate=rate, ppo_epochs=2, minibatches=4)
    assert row["updates"] == updates
    change = moved(tensors(folder / "sft"), tensors(folder / "rl"))
    assert change == pytest.approx(rate, rel=0.02) if updates == 2 else change > 3 * rate


def test_learning_rates_of_ppo(tmp_path, no_evaluation):
    """Of four steps half are warm-up; without it the last quarter is left at the last step."""
    for warmup, factors in ((0, [1, 0.75, 0.5, 0.25]), (0.5, [0.5, 0.75, 0.5, 0.25])):
        folder = ppo_folder(tmp_path / str(warmup), toy_policy(a=0, b=0), toy_reward(a=1))
        rows = ppo(folder, steps=4, learning_rate=1e-3, warmup=warmup)
        assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * f for f in factors])


def test_the_adaptive_kl_coef_falls_while_there_is_less_kl_than_wanted(tmp_path, no_evaluation):
    """With no KL at all the error is -1, which counts as -0.2, times 64 samples in 10,000."""
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=1))
    rows = ppo(folder, steps=3, kl_coef=0.1, kl_control="adaptive", kl_target=1)
    first, second, third = (row["kl_coef"] for row in rows)
    assert 0.1 * 0.99 < first <= 0.1
    assert second / first == third / second == pytest.approx(1 - 0.2 * 64 / 10000)


def test_ppo_asks_voted_questions_that_are_not_held_out_and_other_ones_each_step(
        tmp_path, rollouts):
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0, eos=0), toy_reward(a=1))
    ppo(folder, steps=4, prompts=6, samples=2, max_new_tokens=4)
    allowed = {tuple(prompt_of(q)) for q in QUESTIONS if q["id"] not in (*HELD_OUT, UNVOTED)}
    asked = [[tuple(prompt) for prompt in step.prompts] for step in rollouts]
    assert all(len(set(prompts)) == 6 and set(prompts) <= allowed for prompts in asked)
    assert len({frozenset(prompts) for prompts in asked}) > 1
    drawn = [[sample.tokens for _, sample in step.samples] for step in rollouts]
    assert len({str(tokens) for tokens in drawn}) == 4                   # no noise comes twice
    assert all(len(tokens) == 12 for tokens in drawn)


# ---- evaluation ----

def by_name(folder):
    """A function of a model that says which of the run's it is."""
    heads = {name: tensors(path)["model.embed_tokens.weight"].float() for name, path in (
        ("teacher", hub.TINY / "teacher"), ("base", folder / "student"),
        ("sft", folder / "sft"), ("rl", folder / "rl"))}
    return lambda model: next(name for name, head in heads.items()
                              if head.shape == model.head.shape and torch.equal(head, model.head))


def test_the_report_says_what_was_sampled(tmp_path, monkeypatch):
    """Made-up samples of four models on four test questions, and scores by a rule."""
    models = [language_model(seed) for seed in range(3)]
    folder = run_folder(tmp_path / "run", student=models[0], sft=models[1], rl=models[2])
    gold = [TASKS["arithmetic"](SEED).gold("test")[q["id"]] for q in TEST]
    name_of, calls = by_name(folder), []
    samples = {                                                          # R right; w, v wrong
        "teacher": ["RRRw", "RRRR", "RRRR", "RRRR"], "base": ["wwww", "wwww", "wwww", "wRvw"],
        "sft": ["RRRR", "wwww", "wvww", "wvww"], "rl": ["RRRw", "wwvR", "wwvC", "RwRv"]}
    greedy = {"teacher": "RRRR", "base": "CCCC", "sft": "RwvC", "rl": "RRwR"}
    asides = ["#### 7", "Step 1: 9 - 2 = 7\n#### 7", "#### 6", "Step 1: 9 - 2 = 7\n#### 7..."]

    def spell(letter, k):
        return {"R": f"#### {gold[k]}", "C": f"#### {gold[k]}...", "v": "#### 98",
                "w": "Step 1: 9 * 9 = 99\n#### 99"}[letter]

    def table(model, k, temperature):
        if k < len(QUESTIONS):
            return asides                                                # held-out questions
        k -= len(QUESTIONS)
        letters = greedy[name_of(model)][k] if temperature == 0 else samples[name_of(model)][k]
        return [spell(letter, k) for letter in letters]

    def rule(original):
        return lambda model, rows, *_: [float(sum(row) % 5) for row in rows]

    # The reward model's stage writes student.jsonl.
    monkeypatch.setattr("nanodistill.report.plot", lambda *_: None)
    with monkeypatch.context() as patch:
        everywhere(patch, "generate", scripted(lambda model, k, t: student_texts(k)))
        call(train_rm, folder, "--samples", 3, "--epochs", 1, "--batch-size", 1000)
    everywhere(monkeypatch, "generate", scripted(table, calls))
    everywhere(monkeypatch, "score_sequences", rule)
    call(evaluation, folder, "--questions", 4, "--samples", 4)
    report = json.loads((folder / "report.json").read_text())

    assert set(report["models"]) == set(greedy)
    for name, m in report["models"].items():
        hits = [letters.count("R") for letters in samples[name]]
        majority = {"teacher": 4, "base": 0, "sft": 1, "rl": 2}[name]
        assert m["greedy"]["accuracy"] == greedy[name].count("R") / 4 and m["greedy"]["n"] == 4
        assert m["mean@4"] == sum(hits) / 16
        assert m["maj@4"] == majority / 4
        assert m["pass@4"] == sum(hit > 0 for hit in hits) / 4
        said = [spell(c, k) for k, letters in enumerate(samples[name]) for c in letters]
        assert m["length"] == pytest.approx(sum(len(ids_of(text)) for text in said) / 16)
        truth = [text == spell("R", k // 4) for k, text in enumerate(said)]
        rows = [prompt_of(TEST[k // 4]) + ids_of(text) for k, text in enumerate(said)]
        if name != "base":
            scored = report["reward_model"]["auc_gold"][name]
            assert scored == pytest.approx(hand_auc([sum(row) % 5 for row in rows], truth))
            own = report["reward_model"]["auc_own_logprob"][name]
            assert own == pytest.approx(hand_auc([-len(ids_of(text)) for text in said], truth))
    assert report["pairs"]["rl-sft"]["difference"] == pytest.approx(3 / 4 - 1 / 4)
    assert report["pairs"]["sft-teacher"]["difference"] == pytest.approx(1 / 4 - 1)

    # The reward model on the two held-out questions, against the vote.
    held_out = [k for k, q in enumerate(QUESTIONS) if q["id"] in HELD_OUT]
    for name, texts in (("teacher", texts_of), ("sft", student_texts), ("rl", lambda k: asides)):
        rows = [(prompt_of(QUESTIONS[k]) + ids_of(text), text.endswith("#### 7"))
                for k in held_out for text in texts(k)]
        scores, labels = [sum(row) % 5 for row, _ in rows], [label for _, label in rows]
        figure = report["reward_model"]["held_out"][name]
        assert figure["n"] == len(rows)
        assert figure["auc"] == pytest.approx(hand_auc(scores, labels))
        assert report["reward_model"]["auc"][name] == figure["auc"]

    # Who was asked what, and how.
    expected = []
    for name in greedy:
        expected += [(name, 1, 0, "test"), (name, 4, 1, "test")]
    expected.append(("rl", 4, 1, "held out"))
    asked = []
    for c in calls:
        test = sorted(c.prompts) == sorted(map(prompt_of, TEST))
        assert test or sorted(c.prompts) == sorted(prompt_of(QUESTIONS[k]) for k in held_out)
        asked.append((name_of(c.model), c.n, c.temperature, "test" if test else "held out"))
    assert sorted(asked) == sorted(expected)

    truths = TASKS["arithmetic"](SEED).gold("train")
    right = [truths[q["id"]] == "7" for q in QUESTIONS if q["id"] != UNVOTED]
    votes = {"kept": 15 / 16, "agreement": 0.5, "accuracy": sum(right) / 15}
    assert report["votes"] == pytest.approx(votes)


def test_the_second_vote_is_of_questions_that_both_have_answered(tmp_path):
    for name, said in (("teacher", {"a": ["7", "7", "8"], "b": ["1", "1"], "c": ["4"]}),
                       ("student", {"a": ["8"], "b": ["2", "2"]})):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(
            {"id": id_, "responses": [{"answer": x} for x in row]}) + "\n"
            for id_, row in said.items()))
    rows = {row["id"]: row for row in evaluation.second_vote(tmp_path)}
    assert rows == {"a": {"id": "a", "vote": "8", "agreement": 4 / 6, "n": 6},
                    "b": {"id": "b", "vote": None, "agreement": 0.5, "n": 4}}


def test_no_question_that_a_run_trains_on_is_a_test_question_of_any():
    """Whole splits of three seeds: without a rule some twenty questions would be in both."""
    tasks = [TASKS["arithmetic"](seed) for seed in (1, 2, SEED)]
    train, test = ({q["question"] for task in tasks for q in task.questions(split)}
                   for split in ("train", "test"))
    assert len(train) > 17000 and len(test) > 2900 and not train & test


# ---- teacher ----

def test_the_teacher_answers_at_each_temperature_in_turn_and_votes(tmp_path, monkeypatch):
    """Votes by hand: half of the samples agree on 7; a tie; a winner with a third of them."""
    folder, calls = run_folder(tmp_path / "run", student=language_model()), []
    (folder / "teacher.jsonl").unlink(), (folder / "labels.jsonl").unlink()
    tie = ["#### 5", "#### 6", "#### 5...", "#### 6", "#### 5", "I do not know"]
    weak = ["#### 5", "#### 6", "#### 5...", "#### 4", "#### 5", "I do not know"]

    def texts(k):
        return [texts_of(k), tie, weak][k % 3]

    everywhere(monkeypatch, "generate", scripted(lambda model, k, t: texts(k), calls))
    call(teacher, folder, "--samples", 6, "--temperatures", "0.5,1.0", "--min-agreement", 0.4)
    (asked,) = calls
    assert asked.n == 6 and list(asked.temperature) == [0.5, 1.0] * 3
    assert sorted(asked.prompts) == sorted(map(prompt_of, QUESTIONS))
    assert asked.model.config.num_hidden_layers == weights.load_config(
        hub.TINY / "teacher").num_hidden_layers
    rows = {row["id"]: row for row in files.read_jsonl(folder / "teacher.jsonl")}
    labels = {row["id"]: row for row in files.read_jsonl(folder / "labels.jsonl")}
    assert len(rows) == len(labels) == 16
    for k, q in enumerate(QUESTIONS):
        for j, (r, text) in enumerate(zip(rows[q["id"]]["responses"], texts(k), strict=True)):
            (wanted,) = answers(text)
            assert {key: r[key] for key in wanted} == {**wanted, "temperature": [0.5, 1.0][j % 2]}
        vote = labels[q["id"]]
        assert vote["vote"] == ("7" if k % 3 == 0 else None) and vote["n"] == 6
        assert vote["labels"] == ([True] * 3 + [False] * 3 if k % 3 == 0 else [None] * 6)
        assert vote["agreement"] == pytest.approx([1 / 2, 1 / 3, 1 / 3][k % 3])
