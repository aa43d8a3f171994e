"""Sampling, losses and stages on a CUDA device give what the CPU gives.

Run where PyTorch sees a card, or a stub of its driver, which logs kernels and runs none. Beside the
stub lies emulate.py: in its mode the CPU computes each operator's values, and all else (devices,
copies, what waits for what) is as on a card. With the stub's folder in FAKE_CUDA and in LD_PRELOAD,
and its emulate.py on PYTHONPATH:

    python -m pytest tests/test_emulated.py

There what is compiled runs eagerly, as nothing can compute a compiled kernel's values, and so does
what a CUDA graph would launch.
"""

import contextlib
import importlib.util
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

import train_rl
import train_rm
import train_sft
from data import TASKS, hub
from nanodistill import generate, losses, run, settings, weights
from nanodistill.model import CausalLM, Config, init_weights


STUB = "FAKE_CUDA" in os.environ
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, nor a stub of one"),
    pytest.mark.skipif(STUB and not importlib.util.find_spec("emulate"),
                       reason="the stub's emulate.py is not on PYTHONPATH")]


@pytest.fixture
def card(monkeypatch):
    """The device. On the stub the CPU computes its values, until the test ends."""
    with contextlib.ExitStack() as stack:
        if STUB:
            from emulate import Emulate
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(Emulate())
            monkeypatch.setattr(generate, "recorded", lambda step, _: SimpleNamespace(replay=step))
        yield torch.device("cuda")


def there(model, device):
    """The same model on the device."""
    copy = type(model)(model.config).to(device)
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False)


# ---- sampling ----

@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "qwen2"},
                                     {"model_type": "qwen3"}])
def test_the_same_seed_draws_the_tokens_that_the_cpu_draws(card, graphs, changes):
    model = random_model(**changes).requires_grad_(False)
    prompts = [[1 + i % 7] * (3 + i % 5) for i in range(7)]
    # Fewer slots than samples, so that some are refilled.
    how = dict(eos_ids=[*range(5, 14)], pad_id=0, max_new_tokens=20, n=3, slots=8, seed=3,
               temperature=[0.0, 1.0, 0.7])
    wanted = {(i, j): sample for i, j, sample in generate.generate(model, prompts, **how)}
    drawn = {(i, j): sample for i, j, sample in generate.generate(
        there(model, card), prompts, graphs=graphs, **how)}
    assert drawn.keys() == wanted.keys()
    assert len({len(sample.tokens) for sample in wanted.values()}) > 3
    for key, sample in wanted.items():
        assert (drawn[key].tokens, drawn[key].ended) == (sample.tokens, sample.ended)
        assert drawn[key].logprobs == pytest.approx(sample.logprobs, abs=1e-4)


# ---- losses ----

def weighed(value):
    """Sum over tokens, each with a weight of its own."""
    return (value * torch.linspace(-1, 2, len(value), device=value.device)).sum()


LOSSES = {
    "cross-entropy": lambda h, w, t: losses.linear_cross_entropy(h, w, t, ignore_index=None),
    "logprobs": lambda h, w, t: weighed(losses.linear_logprobs(h, w, t, 0.7)[0]),
    "entropy": lambda h, w, t: sum(map(weighed, losses.linear_logprobs(h, w, t, 0.7))),
    **{kind: lambda h, w, t, kind=kind: losses.linear_distillation(h, w, h.flip(0), w.flip(0), kind)
       for kind in ("forward_kl", "reverse_kl", "jsd")}}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", [losses.BUDGET, 4096])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_losses_and_gradients_are_the_cpus(card, name, budget, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(losses, "BUDGET", budget)              # the smaller: several chunks
    torch.manual_seed(0)
    # Without ignored targets, which cross-entropy finds by an index of unknown length: the stub
    # would take any number for it.
    hidden, weight, targets = torch.randn(45, 16), torch.randn(64, 16), torch.arange(45)

    def on(device):
        h, w = (x.to(device).requires_grad_() for x in (hidden, weight))
        # The weight stays in fp32, as what is trained does.
        loss = LOSSES[name](h.to(dtype), w, targets.to(device))
        loss.backward()
        return [x.detach().cpu() for x in (loss, h.grad, w.grad)]
    torch.testing.assert_close(on(card), on("cpu"), rtol=10 * tolerance, atol=tolerance)


# ---- stages ----

FLAGS = {
    "sft": ["--epochs", "1", "--batch-size", "8"],
    "rm": ["--epochs", "0.5", "--samples", "2", "--batch-size", "16", "--optimizer", "adamw"],
    "rl": ["--steps", "2", "--prompts", "8", "--samples", "2", "--minibatches", "2",
           "--kl-limit", "1e9"]}
COMMON = ["--max-new-tokens", "12", "--slots", "8", "--seed", "7", "--date", "2026-01-31",
          "--threads", "1"]


def train(stage, folder, device):
    """A stage in fp32 -> {step: what it measured}."""
    argv = [*COMMON, *FLAGS[stage], "--micro-batch", "4", "--out", str(folder)]
    # SFT knows neither of the first two.
    argv = argv[4 * (stage == "sft"):]
    config = settings.parse(stage, train_rl.STAGES, "", argv)[stage]
    torch.manual_seed(0)
    start = [folder / "student"] * (stage == "sft")
    {"sft": train_sft, "rm": train_rm, "rl": train_rl}[stage].train(
        config, folder, *start, torch.device(device), torch.float32)
    return run.read_metrics(folder, stage)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """(A run folder after all stages of the CPU, {stage: {step: what it measured}})."""
    folder = tmp_path_factory.mktemp("run")
    shape = Config(512, 64, 96, 2, 4, 2, 16, max_position_embeddings=256, tie_word_embeddings=True)
    weights.save(init_weights(CausalLM(shape), torch.Generator().manual_seed(0), std=0.1),
                 folder / "student", hub.TINY / "student")
    teacher, labels = [], []
    for i, q in enumerate(TASKS["arithmetic"](7).questions("train")[:60]):
        texts = [f"Step 1: {i % 9} + {k} = {i % 9 + k}\n#### {i % 9 + k}" for k in (1, 2, 3)]
        teacher.append({**q, "responses": [
            {"text": text, "temperature": 1.0, "ended": True, "answer": str(i % 9 + k)}
            for text, k in zip(texts, (1, 2, 3))]})
        labels.append({"id": q["id"], "vote": str(i % 9 + 1), "agreement": 0.4, "n": 3,
                       "labels": [True, False, False]})
    for name, rows in (("teacher", teacher), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, {stage: train(stage, folder, "cpu") for stage in ("sft", "rm", "rl")}


@pytest.mark.parametrize("stage", ["sft", "rm", "rl"])
def test_a_stage_measures_what_it_measures_on_the_cpu(on_cpu, card, stage, tmp_path):
    source, wanted = on_cpu
    needs = ["student", "teacher.jsonl", "labels.jsonl", "sft", "rm"]
    needs = needs[:{"sft": 3, "rm": 4, "rl": 5}[stage]]
    for name in needs:
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(
            source / name, tmp_path / name)
    measured = train(stage, tmp_path, card)
    assert measured.keys() == wanted[stage].keys()
    for step, row in wanted[stage].items():
        for key in row.keys() - {"seconds"}:
            value = measured[step][key]
            assert value == (row[key] if isinstance(row[key], str) else pytest.approx(
                row[key], rel=1e-3, abs=1e-4, nan_ok=True)), (step, key)
    assert weights.complete(tmp_path / stage)
