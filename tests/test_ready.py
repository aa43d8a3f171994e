"""What is tried before the first stage starts, and which stages those are."""

import shutil
from collections import namedtuple

import pytest
import torch
from conftest import random_model

import train_rl
from data import hub, ready
from nanodistill import fit, run, settings, weights


def configs(out, *argv):
    return settings.parse("rl", train_rl.STAGES, "doc", [*argv, "--out", str(out)])


def test_the_stages_that_are_missing(tmp_path, tokenizer_folder):
    asked, order = configs(tmp_path), ["teacher", "sft", "rm", "rl", "eval"]
    assert ready.missing("rl", asked) == order
    (tmp_path / "labels.jsonl").write_text("{}\n")
    assert ready.missing("rl", asked) == order[1:]
    # In several files, as 3b's weights are, and begun but not ended.
    weights.save(random_model(), tmp_path / "sft", tokenizer_folder, shard_bytes=20_000)
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "resume.pt").write_text("")
    assert ready.missing("rl", asked) == order[2:]
    next((tmp_path / "sft").glob("model-00002*")).unlink()
    assert ready.missing("rl", asked) == order[1:]


def test_the_tiny_default_lacks_nothing_and_nothing_is_written(tmp_path):
    ready.check("rl", configs(tmp_path / "new", "--questions", "5"))
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_said_before_anything_is_sampled(tmp_path, monkeypatch):
    """The tiny student has 0.4 million weights: three folders, two checkpoints of 24 bytes each."""
    usage = namedtuple("usage", "total used free")
    count = sum(p.numel() for p in weights.load(hub.TINY / "student").parameters())
    for free, fits in ((count * (3 * 4 + 2 * 24) - 1, False), (count * (3 * 4 + 2 * 24) + 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        if fits:
            ready.check("rl", configs(tmp_path, "--questions", "5"))
        else:
            with pytest.raises(SystemExit, match="GB free, and this run writes"):
                ready.check("rl", configs(tmp_path, "--questions", "5"))


@pytest.mark.parametrize("algorithm, each", [("ppo", 24), ("rloo", 12)])
def test_without_a_value_model_checkpoints_are_smaller(tmp_path, monkeypatch, algorithm, each):
    """A vote needs no reward model: two folders, 4 bytes per weight; and two checkpoints, 12 bytes
    for each model that is trained, one in SFT."""
    flags = ["--value-from", "policy"] if algorithm == "ppo" else ["--samples", "2"]
    asked = configs(tmp_path, "--reward", "vote", "--algorithm", algorithm, *flags)
    stages, student = ready.missing("rl", asked), hub.TINY / "student"
    assert stages == ["teacher", "sft", "rl", "eval"]
    needed = (2 * 4 + 2 * each) * sum(p.numel() for p in weights.load(student).parameters())
    usage = namedtuple("usage", "total used free")
    for free, problems in ((needed - 1, 1), (needed + 1, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        assert len(ready.disk(asked["rl"], student, stages, 0)) == problems


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="not a folder that may be written to"):
        ready.check("rl", configs(tmp_path / "file" / "run", "--questions", "5"))


def test_all_that_is_wrong_is_listed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run.fit, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        ready.check("rl", configs(tmp_path, "--questions", "5", "--rm.device", "cuda",
                                  "--max-new-tokens", "300"))
    message = str(stopped.value)
    assert "--device cuda" in message and "its 256 positions hold no question" in message
    with pytest.raises(SystemExit, match="rl does not fit"):
        ready.check("rl", configs(tmp_path, "--questions", "5"))


@pytest.mark.parametrize("cuda, mps, chosen", [
    (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert fit.pick_device("auto").type == chosen
    assert fit.pick_dtype("auto", torch.device(chosen)) == (
        torch.bfloat16 if cuda else torch.float32)
    if not mps:
        with pytest.raises(ValueError, match="--device mps: this PyTorch"):
            fit.pick_device("mps")
