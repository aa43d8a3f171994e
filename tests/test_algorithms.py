"""PPO, RLOO and GRPO, and where scores and the reference come from: train_rl.py from outside."""

import json
import shutil
import statistics

import pytest
import test_meaning
import torch
from test_meaning import (
    HELD_OUT,
    QUESTIONS,
    UNVOTED,
    A,
    everywhere,
    figures,
    ids_of,
    language_model,
    moved,
    outputs,
    ppo,
    ppo_folder,
    probability,
    prompt_of,
    run_folder,
    scripted,
    tensors,
    toy_policy,
    toy_reward,
    with_a_head,
)
from test_stages import StopAfter

import eval as evaluation
import train_rl
from data import TASKS, hub, ready
from nanodistill import lora, process, settings, weights


ALGORITHMS = ["ppo", "rloo", "grpo"]
# A response to each question whose vote, 7, it is; another; one cut off; one without an answer.
SAID = ["#### 7", "#### 8", "#### 7...", "Step 1"]


@pytest.fixture(autouse=True)
def stages_run(monkeypatch):
    """What would have been run before or after, which nothing is."""
    asked = []
    monkeypatch.setattr(process, "need", lambda there, path, script, config: (
        None if there else asked.append(script)))
    return asked


@pytest.fixture
def scores(monkeypatch):
    """What each step's responses were given, in the order of the rows."""
    seen = []

    def make(original):
        def recorded(scores, *args):
            seen.append(scores.tolist())
            return original(scores, *args)
        return recorded

    everywhere(monkeypatch, "shape_rewards", make)
    return seen


def without_rm(folder, policy):
    return run_folder(folder, student=policy, sft=policy)


def of(algorithm, reward="model"):
    """The flags of an algorithm, for `ppo`, whose defaults are PPO's."""
    flags = ["--algorithm", algorithm, "--reward", reward]
    return flags + ["--value-from", "policy"] * (algorithm == "ppo" and reward != "model")


@pytest.fixture
def plain(monkeypatch):
    """`ppo` of test_meaning.py for all three: each is given the flags that it has."""
    def steps(folder, *switches, **changes):
        needless = [] if "ppo" in switches else ["value-learning-rate", "gamma", "lam"]
        needless += ["score"] * ("model" not in switches)
        with monkeypatch.context() as patch:
            patch.setattr(test_meaning, "PLAIN", {name: value for name, value in
                                                  test_meaning.PLAIN.items()
                                                  if name not in needless})
            return ppo(folder, *switches, **changes)
    return steps


# ---- algorithms ----

@pytest.mark.parametrize("liking", [1, -1])
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_what_is_liked_is_said_more_often_without_a_value_model(
        tmp_path, plain, algorithm, liking):
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=liking, b=-liking))
    rows = plain(folder, *of(algorithm), steps=4, learning_rate=0.02, ppo_epochs=2, minibatches=2,
                 max_new_tokens=2)
    after = probability(folder / "rl", A)
    assert after > 0.75 if liking > 0 else after < 0.25
    assert not {"value_loss", "explained_variance"} & set(rows[0])


@pytest.mark.parametrize("reward", ["model", "vote", "self"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_step_starts_from_the_policy_that_sampled(tmp_path, plain, algorithm, reward):
    policy = toy_policy(eos=0, a=0, b=0)
    folder = ppo_folder(tmp_path / "run", policy, toy_reward(a=1, b=-1))
    if reward != "model":
        shutil.rmtree(folder / "rm")
    rows = plain(folder, *of(algorithm, reward), steps=3, learning_rate=0.02, max_new_tokens=3,
                 ppo_epochs=2, no_eos_penalty=1)
    for row in rows:
        assert row["first_ratio"] == pytest.approx(1, abs=1e-5)
        assert row["first_approx_kl"] == pytest.approx(0, abs=1e-9) and row["first_clipfrac"] == 0
    assert rows[0]["ratio"] != 1                                 # it did move
    assert ("value_loss" in rows[0]) == (algorithm == "ppo")


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_kl_term_is_in_the_rewards_of_each_algorithm(tmp_path, plain, monkeypatch, algorithm):
    """Scores are alike: only the drift from the reference tells responses apart, and where the
    policy is away from it, it comes nearer. It is in the rewards, not in what GRPO divides."""
    seen = []

    def make(original):
        def recorded(rewards, mask, samples, kind, scores):
            seen.append((rewards.sum(1).std().item(), scores.std().item()))
            return original(rewards, mask, samples, kind, scores)
        return recorded

    everywhere(monkeypatch, "group_advantages", make)
    folder = ppo_folder(tmp_path / "run", toy_policy(a=3, b=0), toy_reward())
    away = probability(folder / "sft", A)
    teacher = hub_like(tmp_path / "teacher", toy_policy(a=0, b=0))
    plain(folder, *of(algorithm), "--teacher", teacher, "--reference", "teacher", steps=6,
          learning_rate=0.02, kl_coef=1, ppo_epochs=2)
    assert away > 0.9 and probability(folder / "rl", A) < away - 0.2
    assert len(seen) == 6 and all(of_rewards > 0.1 and of_scores == 0
                                  for of_rewards, of_scores in seen)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_advantages_are_of_the_responses_to_one_question(tmp_path, plain, monkeypatch, algorithm):
    """Two tokens each, the second one scored: A is 1 above B."""
    seen = []

    def make(original):
        def recorded(rewards, mask, samples, kind, scores):
            seen.append((rewards.sum(1).tolist(),
                         original(rewards, mask, samples, kind, scores), samples))
            return seen[-1][1]
        return recorded

    everywhere(monkeypatch, "group_advantages", make)
    folder = ppo_folder(tmp_path / "run", toy_policy(a=0, b=0), toy_reward(a=1))
    plain(folder, *of(algorithm), samples=4, max_new_tokens=2)
    ((rewards, advantages, samples),) = seen
    assert samples == 4 and advantages.shape == (64, 2) and len({round(r, 4) for r in rewards}) == 2
    for b, reward in enumerate(rewards):
        group = rewards[b // 4 * 4:b // 4 * 4 + 4]
        by_hand = 4 / 3 * (reward - sum(group) / 4)              # less the mean of the other three
        if algorithm == "grpo":
            by_hand = (reward - sum(group) / 4) / (statistics.stdev(group) + 1e-4)
        assert advantages[b].tolist() == pytest.approx([by_hand] * 2, abs=1e-3)


# ---- where scores come from ----

def give(monkeypatch, reward):
    """Scripts are called with a function as the reward."""
    main = train_rl.main
    monkeypatch.setattr(train_rl, "main", lambda argv: main(argv, reward))


def test_a_response_scores_1_exactly_if_its_answer_is_the_teachers_vote(
        tmp_path, monkeypatch, plain, scores, stages_run):
    """Whatever its gold answer is. No reward model is there, none is trained, and the evaluation
    does without."""
    everywhere(monkeypatch, "generate", scripted(lambda *_: SAID))
    folder = without_rm(tmp_path / "run", language_model())
    (row,) = plain(folder, *of("rloo", "vote"), max_new_tokens=32)
    assert scores == [[1, 0, 0, 0] * 16] and row["score"] == 0.25 and row["answered"] == 0.5
    # One in four: deviation sqrt(3) / 4.
    assert row["within_auc"] == row["vote_within_auc"] == 1
    assert row["alike"] == row["vote_alike"] == 0
    assert row["spread"] == row["vote_spread"] == pytest.approx(3**0.5 / 4)
    assert stages_run == ["eval.py"] and not (folder / "rm").exists()
    evaluation.main(["--student", str(folder / "student"), "--teacher", "tiny", "--task",
                     "arithmetic", "--threads", "1", "--device", "cpu", "--seed", "11", "--date",
                     settings.load(folder)["rl"]["date"], "--samples", "2", "--questions", "4",
                     "--max-new-tokens", "32", "--out", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    assert "reward_model" not in report and {"sft", "rl"} <= set(report["models"])


def test_a_response_scores_by_the_majority_of_its_own_group(tmp_path, monkeypatch, plain, scores):
    """Of five: three agree; two and two tie; none answers. A question needs no vote."""
    texts = [["#### 3", "#### 3", "#### 5", "#### 3", "Step 1"],
             ["#### 3", "#### 5", "#### 5", "#### 3", "#### 9"], ["Step 1"] * 5]
    by_hand = [[1, 1, 0, 1, 0], [0.5, 0.5, 0.5, 0.5, 0], [0] * 5]
    asked = []
    everywhere(monkeypatch, "generate", scripted(lambda model, k, t: asked.append(k) or
                                                 texts[k % 3]))
    folder = without_rm(tmp_path / "run", language_model())
    plain(folder, *of("grpo", "self"), samples=5, prompts=14, max_new_tokens=32)
    assert scores == [[s for k in asked for s in by_hand[k % 3]]]
    unheld = {k for k, q in enumerate(QUESTIONS) if q["id"] not in HELD_OUT}
    assert set(asked) == unheld and UNVOTED in {QUESTIONS[k]["id"] for k in asked}


@pytest.mark.parametrize("reward", ["vote", "self"])
def test_neither_the_vote_nor_the_majority_depends_on_gold(tmp_path, monkeypatch, plain, reward):
    """Whatever the gold answers are, or none: the weights are the very same."""
    everywhere(monkeypatch, "generate", scripted(lambda *_: SAID[:2] + SAID[:1] + SAID[3:]))
    for name, gold in (("true", None), ("false", "8"), ("none", {})):
        folder = without_rm(tmp_path / name, language_model())
        with monkeypatch.context() as patch:
            if gold is not None:
                patch.setattr(TASKS["arithmetic"], "gold", lambda self, split, gold=gold: gold and {
                    q["id"]: gold for q in self.questions(split)})
            (row,) = plain(folder, *of("rloo", reward), max_new_tokens=32, learning_rate=1e-3)
        assert ("true_accuracy" in row) == (name != "none")
        assert moved(tensors(tmp_path / "true" / "rl"), tensors(folder / "rl")) == 0
    assert moved(tensors(folder / "sft"), tensors(folder / "rl")) > 1e-4


def test_a_function_of_python_may_score(tmp_path, monkeypatch, plain, scores):
    """It sees the question's id and the text, which is empty where the response was cut off."""
    everywhere(monkeypatch, "generate", scripted(lambda *_: SAID))
    folder, seen = without_rm(tmp_path / "run", language_model()), []

    def by_length(ids, texts):
        seen.extend(zip(ids, texts))
        return [len(text) / 100 for text in texts]

    give(monkeypatch, by_length)
    (row,) = plain(folder, "--algorithm", "rloo", max_new_tokens=32)
    by_hand = [0.06, 0.06, 0, 0.06]
    assert scores == [pytest.approx(by_hand * 16)] and row["score"] == pytest.approx(0.045)
    assert [text for _, text in seen[:4]] == ["#### 7", "#### 8", "", "Step 1"]
    assert len({id_ for id_, _ in seen[:4]}) == 1 and len(seen) == 64
    assert settings.load(folder)["rl"]["reward"] == "function"


def test_a_function_must_be_there_and_score_every_response(tmp_path, monkeypatch, plain):
    folder = without_rm(tmp_path / "run", toy_policy(a=0))
    with pytest.raises(SystemExit, match=r"train_rl.main\(argv, reward\)"):
        plain(folder, *of("rloo", "function"))
    give(monkeypatch, lambda ids, texts: [1.0])
    with pytest.raises(ValueError, match="1 scores of 64 responses"):
        plain(folder, "--algorithm", "rloo")


# ---- the reference ----

def hub_like(folder, model):
    """A model in a folder, as --teacher names it."""
    weights.save(model, folder, hub.TINY / "student")
    return str(folder)


def test_the_kl_is_to_the_teacher_if_that_is_the_reference(tmp_path, plain):
    """One token: A with 3/4 here, with 1/4 there: 3/4 log 3 - 1/4 log 3 nats; none to the student
    of the start."""
    log3 = torch.tensor(3.0).log().item()
    folder = ppo_folder(tmp_path / "run", toy_policy(a=log3, b=0), toy_reward())
    teacher = hub_like(tmp_path / "teacher", toy_policy(a=0, b=log3))
    named = ["--teacher", teacher, "--reference"]
    (row,) = plain(folder, *of("ppo"), *named, "teacher", samples=32)
    assert row["kl"] == pytest.approx(log3 / 2, abs=0.1)
    assert str(tmp_path / "teacher") in json.loads((folder / "inputs.json").read_text())["rl"]
    shutil.rmtree(folder / "rl")
    (row,) = plain(folder, *of("ppo"), *named, "sft", samples=32)
    assert row["kl"] == pytest.approx(0, abs=1e-5)


def test_without_a_score_a_student_comes_to_say_what_the_teacher_says(
        tmp_path, monkeypatch, plain):
    """On-policy distillation: kl_coef 1, gamma 0, a reward of nothing. The teacher says A with
    exp(2) / (1 + exp(2)), 0.88."""
    folder = without_rm(tmp_path / "run", toy_policy(a=0, b=0))
    teacher = hub_like(tmp_path / "teacher", toy_policy(a=2, b=0))
    give(monkeypatch, lambda ids, texts: [0] * len(ids))
    rows = plain(folder, "--algorithm", "ppo", "--value-from", "policy", "--teacher", teacher,
                 "--reference", "teacher", steps=10, learning_rate=0.02, ppo_epochs=2, kl_coef=1,
                 gamma=0, max_new_tokens=2)
    assert rows[0]["kl"] > 0.5 and abs(rows[-1]["kl"]) < 0.1
    assert probability(folder / "rl", A) == pytest.approx(0.88, abs=0.08)


def test_a_teacher_that_reads_other_tokens_is_no_reference(tmp_path, plain):
    def changed(name, file, change):
        folder = tmp_path / name
        hub_like(folder, toy_policy(a=0))
        path = folder / file
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return folder

    def other_words(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        one, two = list(vocab)[-2:]
        vocab[one], vocab[two] = vocab[two], vocab[one]
        return tokenizer

    words = changed("words", "tokenizer.json", other_words)
    short = changed("short", "config.json", lambda c: {**c, "max_position_embeddings": 128})
    template = changed("template", "tokenizer_config.json", lambda c: {
        **c, "chat_template": "{{ messages[0]['content'] }}" + (
            "{% for m in messages[1:] %}{{ m['content'] }}{{ eos_token }}{% endfor %}")})
    student = tmp_path / "student"
    hub_like(student, toy_policy(a=0))
    ready.comparable(student, student, "2026-01-31")
    for teacher, what in ((words, "vocabulary"), (template, "chat template"), (short, "positions")):
        with pytest.raises(ValueError, match=f"differ in {what}, so it can't say"):
            ready.comparable(teacher, student, "2026-01-31")
    folder = without_rm(tmp_path / "run", toy_policy(a=0))
    with pytest.raises(SystemExit, match="differ in vocabulary"):
        plain(folder, *of("rloo", "vote"), "--teacher", str(words), "--reference", "teacher")
    assert not (folder / "rl").exists()


# ---- resume, LoRA ----

@pytest.mark.parametrize("algorithm, reward", [("rloo", "model"), ("grpo", "self"),
                                               ("ppo", "vote")])
def test_stopped_and_resumed_equals_unbroken(tmp_path, monkeypatch, plain, algorithm, reward):
    changes = dict(steps=3, learning_rate=0.02, max_new_tokens=3, kl_coef=0.5, minibatches=4,
                   no_eos_penalty=1)
    for name in ("whole", "broken"):
        folder = ppo_folder(tmp_path / name, toy_policy(eos=0, a=0, b=0), toy_reward(a=1, b=-1))
        monkeypatch.setattr(process, "interruptible", StopAfter(2 if name == "broken" else 99))
        if name == "broken":
            with pytest.raises(SystemExit, match="stopped after saving"):
                plain(folder, *of(algorithm, reward), **changes)
            assert (folder / "rl" / "resume.pt").exists()
            monkeypatch.setattr(process, "interruptible", StopAfter(99))
        plain(folder, *of(algorithm, reward), **changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert moved(tensors(whole / "rl"), tensors(broken / "rl")) == 0
    assert moved(tensors(whole / "sft"), tensors(whole / "rl")) > 1e-3
    for key in ("score", "kl", "policy_loss"):
        assert figures(whole, "rl", key) == figures(broken, "rl", key) != []


@pytest.mark.parametrize("reward", ["model", "vote"])
def test_lora_without_a_value_model(tmp_path, monkeypatch, plain, scores, reward):
    """One trunk: the reference is it, the policy has an adapter, and so has the reward model."""
    sft = language_model()
    folder = without_rm(tmp_path / "run", sft)
    if reward == "model":
        adapted = lora.adapt(with_a_head(sft), 4)
        weights.save(adapted, folder / "rm", hub.TINY / "student", base=folder / "sft")
    everywhere(monkeypatch, "generate", scripted(lambda *_: SAID))
    rows = plain(folder, *of("rloo", reward), "--lora", "4", steps=2, learning_rate=0.01,
                 max_new_tokens=32)
    assert [row["first_ratio"] for row in rows] == pytest.approx([1, 1], abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[1]["kl"] != 0
    assert (folder / "rl" / "adapter" / "adapter_model.safetensors").exists()
    if reward == "model":                                        # as the weights without LoRA say
        plain_reward = with_a_head(sft)
        k = next(k for k, q in enumerate(QUESTIONS) if q["id"] not in (*HELD_OUT, UNVOTED))
        with torch.no_grad():
            by_hand = [outputs(plain_reward, prompt_of(QUESTIONS[k]), ids_of(text))[-1].item()
                       for text in SAID]
        groups = [scores[0][i:i + 4] for i in range(0, 64, 4)]
        assert any(group == pytest.approx(by_hand, abs=1e-4) for group in groups)


# ---- what is run first ----

def test_no_reward_model_is_trained_where_none_scores(tmp_path):
    for flags, without in ((["--algorithm", "rloo", "--samples", "2", "--reward", "vote"], {"rm"}),
                           (["--algorithm", "rloo", "--samples", "2"], set())):
        configs = settings.parse("rl", train_rl.STAGES, "doc", [*flags, "--out", str(tmp_path)])
        assert set(configs) - set(ready.missing("rl", configs)) == without
        text = ready.dry_run("rl", configs)
        assert "value model" not in text and ("reward model" in text) == (not without)


@pytest.mark.parametrize("reward, script", [("model", "train_rm.py"), ("self", "train_sft.py")])
def test_the_stage_before_is_the_one_that_is_needed(tmp_path, plain, stages_run, reward, script):
    folder = without_rm(tmp_path / "run", toy_policy(a=0))
    shutil.rmtree(folder / "sft")
    with pytest.raises(FileNotFoundError):                       # for none is run here
        plain(folder, *of("rloo", reward))
    assert stages_run == [script]
