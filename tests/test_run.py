"""Flags, JSONL that survives a torn line, checkpoints that refuse other settings."""

import dataclasses

import pytest
import torch
from conftest import random_model
from torch.utils._python_dispatch import TorchDispatchMode

from nanodistill import files, lora, losses, run
from nanodistill.settings import flag


@dataclasses.dataclass
class Config:
    steps: int = flag(10, "how many")
    rate: float = flag(0.5, "how fast")
    out: str = flag("", "where", result=False)


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path):
    path = tmp_path / "a.jsonl"
    files.Appender(path)({"n": 1})
    with open(path, "ab") as file:
        file.write(b'{"n": 2, "te')
    assert files.read_jsonl(path) == [{"n": 1}]
    files.Appender(path)({"n": 3, "text": "é\n"})
    assert files.read_jsonl(path) == [{"n": 1}, {"n": 3, "text": "é\n"}]


def test_a_step_done_again_counts_once(tmp_path):
    metrics = run.Metrics(tmp_path, "rl")
    metrics(1, loss=torch.tensor(2.0))
    metrics(1, loss=3.0)
    run.Metrics(tmp_path, "sft")(1, loss=9.0)
    assert run.read_metrics(tmp_path, "rl") == {1: {"stage": "rl", "step": 1, "loss": 3.0}}


def test_checkpoint_brings_back_state(tmp_path):
    config = Config()
    run.save_checkpoint(tmp_path / "resume.pt", config, weight=torch.ones(2))
    state = run.load_checkpoint(tmp_path / "resume.pt", config)
    assert torch.equal(state["weight"], torch.ones(2))
    assert run.load_checkpoint(tmp_path / "none.pt", config) is None
    run.load_checkpoint(tmp_path / "resume.pt", dataclasses.replace(config, out="elsewhere"))
    with pytest.raises(SystemExit, match="steps was 10, is 99"):         # the schedule would jump
        run.load_checkpoint(tmp_path / "resume.pt", dataclasses.replace(config, steps=99))
    with pytest.raises(SystemExit, match="rate was 0.5, is 0.1"):
        run.load_checkpoint(tmp_path / "resume.pt", dataclasses.replace(config, rate=0.1))


def test_checkpoint_fills_the_parts_and_one_without_them_is_refused(tmp_path):
    saved, fresh = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    assert not torch.equal(saved.weight, fresh.weight)
    run.save_checkpoint(tmp_path / "resume.pt", Config(), {"model": saved}, step=3)
    assert run.load_checkpoint(tmp_path / "resume.pt", Config(), {"model": fresh})["step"] == 3
    assert torch.equal(saved.weight, fresh.weight)
    # As a checkpoint of an older program may be.
    with pytest.raises(SystemExit, match="no checkpoint of this program"):
        run.load_checkpoint(tmp_path / "resume.pt", Config(), {"model": fresh, "muon": fresh})


def test_held_out_questions_are_the_same_everywhere_and_about_the_share_asked():
    ids = [f"q{i}" for i in range(2000)]
    five, ten = ({i for i in ids if run.held_out(i, share)} for share in (0.05, 0.1))
    assert five < ten and 60 < len(five) < 140 and not any(run.held_out(i, 0.0) for i in ids)


class Waits(TorchDispatchMode):
    """Counts the numbers that Python asks of tensors: on a GPU it waits for each."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_watch_waits_once_for_a_step_of_many_updates_and_once_for_all_weights():
    watch, one, model = run.Watch("rl"), torch.tensor(1.0), torch.nn.Linear(2, 3)
    with Waits() as waits:
        for step in (0, 0, 0, 1, 1):
            watch(step, one, one)
        assert waits.count == 1
        watch.settle(model, model)
        assert waits.count == 2
    watch(2, torch.tensor(float("nan")))
    watch(2, one)                                            # of the same step: nothing waits yet
    with pytest.raises(FloatingPointError, match="step 2"):
        watch(3, one)
    model.bias.data[1] = float("inf")
    with pytest.raises(FloatingPointError):
        watch.settle(model)


def test_metrics_become_numbers_together(tmp_path):
    with Waits() as waits:
        values = run.Metrics(tmp_path, "rl")(4, a=torch.tensor(0.1), b=2, c=torch.tensor(-3.0))
    assert waits.count == 0                                  # one list of them all, on any device
    assert values == {"a": torch.tensor(0.1).item(), "b": 2, "c": -3.0}
    assert list(values) == ["a", "b", "c"]


def test_a_long_stage_on_a_cpu_compiles_layers_where_no_ratio_depends_on_it(monkeypatch):
    monkeypatch.setattr(losses, "no_compiler", lambda device: False)
    plain, short, bf16, adapted = (random_model() for _ in range(4))
    bf16.model.dtype = torch.bfloat16
    lora.adapt(adapted, 2)
    run.compile_layers(20_000, plain, bf16, adapted)
    run.compile_layers(19_999, short)
    assert [m.model.compiled for m in (plain, short, bf16, adapted)] == [True, False, False, False]
