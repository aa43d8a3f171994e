"""The planner against counts of the hub's pages and the peaks of an emulated H100's allocator."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_rl
from data.dry_run import lora_table, report, shape, table
from nanodistill import fit, losses, parallel, presets, settings
from nanodistill.batches import pack
from nanodistill.model import CausalLM, ScalarModel


SHAPES = {name: size.shape for name, size in presets.SIZES.items()}
BF16, FP32 = torch.bfloat16, torch.float32
GB24 = int(24e9)


def plan(name, stage, micro_batch, checkpoint=False, slots=64, batch=64):
    return fit.plan(stage, SHAPES[name], BF16, batch=batch, micro_batch=micro_batch, slots=slots,
                    prompt=256, response=512, checkpoint=checkpoint)


def test_the_shapes_have_the_parameters_that_the_models_pages_state():
    assert {name: fit.parameters(shape) for name, shape in SHAPES.items()} == {
        "135m": 134_515_008, "0.5b": 494_032_768, "1b": 1_235_814_400, "3b": 3_212_749_824,
        "8b": 8_030_261_248, "1.7b": 1_711_376_384, "7b": 7_615_616_512}


# Bytes by torch.cuda.max_memory_allocated on the emulated card (bench/plan.py): the stages' own
# functions, sequences of 256 + 512 tokens, a batch of 64, two optimizer steps.
@pytest.mark.parametrize("name, stage, micro_batch, checkpoint, taken", [
    ("135m", "sft", 8, False, 5.96e9), ("135m", "rm", 1, False, 2.91e9),
    ("135m", "rl", 8, False, 8.75e9), ("1b", "sft", 8, False, 31.20e9),
    ("1b", "rm", 8, True, 21.03e9), ("1b", "rl", 8, False, 56.03e9),
    ("1b", "rl", 1, False, 49.31e9),
    ("3b", "sft", 8, False, 75.54e9), ("3b", "rl", 8, True, 120.74e9),
    # A pass of the whole batch, and the largest that 80 GB hold.
    ("135m", "sft", 64, False, 27.36e9), ("135m", "rm", 64, False, 27.28e9),
    ("135m", "rl", 64, False, 30.01e9), ("1b", "sft", 32, False, 53.86e9),
    ("1b", "rm", 32, False, 52.30e9), ("1b", "rl", 16, False, 63.58e9),
    ("3b", "sft", 64, True, 56.96e9), ("3b", "rm", 8, False, 72.94e9),
    ("8b", "sft", 8, False, 173.83e9), ("8b", "rm", 8, False, 161.89e9),
    ("8b", "rl", 8, False, 325.18e9)])
def test_the_plan_is_within_5_percent_of_what_an_emulated_card_takes(
        name, stage, micro_batch, checkpoint, taken):
    assert plan(name, stage, micro_batch, checkpoint)["peak"] == pytest.approx(taken, rel=0.05)


# The same with LoRA of rank 32. In PPO: one trunk, three adapters, two of them trained.
@pytest.mark.parametrize("name, stage, micro_batch, checkpoint, taken", [
    ("135m", "rl", 8, False, 5.07e9), ("1b", "rl", 1, False, 6.72e9),
    ("1b", "rl", 8, False, 13.75e9), ("3b", "rl", 1, False, 17.00e9),
    ("3b", "rl", 8, False, 29.54e9), ("8b", "rl", 1, False, 29.71e9),
    ("8b", "rl", 8, True, 29.71e9), ("8b", "rl", 8, False, 56.57e9),
    ("135m", "sft", 8, False, 4.87e9), ("135m", "rm", 64, False, 34.30e9),
    ("1b", "sft", 32, False, 43.38e9), ("1b", "rm", 8, False, 13.08e9),
    ("3b", "sft", 8, False, 28.37e9), ("3b", "rm", 8, False, 28.13e9),
    ("8b", "sft", 8, False, 54.67e9), ("8b", "rm", 8, False, 53.34e9)])
def test_so_is_the_plan_with_lora(name, stage, micro_batch, checkpoint, taken):
    peak = fit.plan(stage, SHAPES[name], BF16, batch=64, micro_batch=micro_batch, slots=64,
                    prompt=256, response=512, checkpoint=checkpoint, rank=32)["peak"]
    assert peak == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize("slots, taken", [(64, 5.97e9), (256, 10.80e9)])
def test_so_is_the_plan_of_sampling(slots, taken):
    assert plan("1b", "teacher", 1, slots=slots)["peak"] == pytest.approx(taken, rel=0.05)


def test_weights_moments_and_cache_by_hand():
    parts, n = plan("135m", "rl", 8), 134_515_008
    # The scalar head is one more row; the language model's head is the embedding.
    assert fit.parameters(SHAPES["135m"], ScalarModel) == n + 576
    assert parts["optimizer"] == 8 * (2 * n + 576) and parts["gradients"] == 4 * (2 * n + 576)
    # 30 layers, keys and values, 64 slots, 3 heads of 64 channels, 768 tokens, 2 bytes.
    assert parts["KV cache"] == 30 * 2 * 64 * 3 * 64 * 768 * 2
    assert parts["sampler's weights"] == 2 * n     # PPO samples from a bf16 copy of the fp32 policy


def test_without_a_value_or_a_reward_model_their_weights_and_moments_are_not_there():
    def of(**models):
        return fit.plan("rl", SHAPES["135m"], BF16, batch=64, micro_batch=8, slots=64, prompt=256,
                        response=512, **models)

    n, table = 134_515_008, 4 * 8192 * 64                        # of rotary angles, a model's
    both, scored, neither = of(), of(valued=False), of(valued=False, scored=False)
    assert scored["optimizer"] == 8 * n and scored["gradients"] == 4 * n
    assert both["weights"] - scored["weights"] == 4 * (n + 576) + table
    assert scored["weights"] - neither["weights"] == 2 * (n + 576) + table
    assert neither["peak"] < scored["peak"] < both["peak"]
    # A reference of 1.7b instead, by the count on its page.
    large = of(valued=False, scored=False, reference=SHAPES["1.7b"])
    assert large["weights"] - neither["weights"] == pytest.approx(2 * (1.711e9 - n), rel=1e-3)
    assert large["peak"] > neither["peak"]
    rank = [of(rank=32, valued=v, scored=s)["weights"] for v, s in ((0, 1), (0, 0))]
    adapters = fit.parameters(SHAPES["135m"], ScalarModel, 32)
    assert rank[0] - rank[1] == 4 * adapters + table


def test_accumulation_takes_more_than_a_batch_of_one_pass():
    """The first micro-batch's gradients stay while the next one's activations are there."""
    alone, again = (plan("1b", "sft", 8, batch=batch)["peak"] for batch in (8, 16))
    assert again - alone == pytest.approx(4 * 1_235_814_400, rel=0.1)


def test_two_layers_more_take_what_the_first_ones_took():
    """Models of two and three layers stand for all: a whole one of five measures the same."""
    shape = replace(SHAPES["135m"], num_hidden_layers=5)
    args = "logprobs", BF16, 2, 96, 32, False, True, 0, "cuda"
    whole = max(fit.pass_peaks(fit.key(shape, 5), *args).values())
    assert fit.most(fit.pass_peaks, shape, *args) == pytest.approx(whole, rel=1e-3)


def tiny(stage, batch, device="cpu", free=GB24):
    return fit.choose(stage, shape("tiny", "student"), FP32, free, batch=batch, prompt=60,
                      response=56, jobs=6000, device=device)


def test_the_tiny_default_takes_whole_batches():
    choices = {stage: tiny(stage, batch)
               for stage, batch in (("sft", 64), ("rm", 128), ("rl", 128))}
    assert {s: (c.micro_batch, c.checkpoint) for s, c in choices.items()} == {
        "sft": (64, False), "rm": (128, False), "rl": (128, False)}
    assert choices["rm"].slots == choices["rl"].slots == 256
    assert "--micro-batch 128" in choices["rl"].line
    assert "fitted to 24.0 GB free" in choices["rl"].line


def choose(free, **given):
    return fit.choose("rl", SHAPES["1b"], BF16, int(free * 1e9), batch=64, prompt=256, response=512,
                      jobs=256, **given)


def test_less_memory_gives_smaller_passes_and_what_is_chosen_fits():
    choices = {free: choose(free) for free in (100, 72, 60, 47.5)}
    for free, choice in choices.items():
        planned = plan("1b", "rl", choice.micro_batch, choice.checkpoint, choice.slots)
        assert planned["peak"] <= free * 1e9
        if not choice.checkpoint:                  # and twice as much at once would not fit
            assert plan("1b", "rl", 2 * choice.micro_batch)["peak"] > free * 1e9
    sizes = [choice.micro_batch for choice in choices.values() if not choice.checkpoint]
    assert len(sizes) == 3 and sizes == sorted(set(sizes), reverse=True)
    assert choices[47.5].checkpoint                # where nothing else fits


def test_what_is_given_stays():
    choice = choose(130, micro_batch=2, checkpoint=True, slots=16)
    assert (choice.micro_batch, choice.checkpoint, choice.slots) == (2, True, 16)


def test_where_nothing_fits_the_error_says_what_would():
    with pytest.raises(ValueError) as error:
        choose(20)
    message = str(error.value)
    assert "46.8 GB" in message and "20.0 GB" in message and len(message.splitlines()) <= 3
    assert "0.5b" in message or "135m" in message


def test_free_memory_is_what_the_control_group_leaves(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    assert fit.free_memory(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    for name, text in (("memory.max", "5000000"), ("memory.current", "3000000"),
                       ("memory.stat", "anon 5\ninactive_file 400000")):
        (group / name).write_text(text + "\n")
    assert fit.free_memory(tmp_path) == 2_400_000
    (group / "memory.max").write_text("max\n")
    assert fit.free_memory(tmp_path) == 8000 * 1024


def test_the_dry_run_covers_every_missing_stage_and_marks_its_hours_as_an_estimate():
    configs = settings.parse("rl", train_rl.STAGES, "doc", ["--student", "1b", "--device", "cuda"])
    text = report(configs, ["teacher", "sft", "rm", "rl", "eval"], {"train": 7473, "test": 1319})
    for line in ("teacher: 8b, at most 8,030,261,248", "sft: 1b, at most 1,235,814,400",
                 "rm: 1b", "rl: 1b", "eval: 8b, 1b"):
        assert line in text
    assert "an estimate from a roofline, not measured" in text
    assert "H100" in text and "PFLOP" in text
    # 7,473 questions, 10 samples each, responses of half of 512 tokens.
    assert f"{7473 * 10 * 256 / 1e6:.2f} sampled" in text
    rest = report(configs, ["rl", "eval"], {"train": 7473, "test": 1319})
    assert "teacher: 8b" not in rest and "rl: 1b" in rest


def test_a_teacher_behind_a_server_takes_no_memory_of_this_machine():
    configs = settings.parse("rl", train_rl.STAGES, "doc", [
        "--student", "8b", "--teacher-url", "http://127.0.0.1:1/v1", "--teacher-model", "big"])
    text = report(configs, ["teacher", "sft"], {"train": 9, "test": 9})
    assert "big, behind a server: no memory here" in text


def test_the_table_of_cards_is_the_planners():
    page = (Path(__file__).resolve().parents[1] / "docs" / "memory.md").read_text()
    assert table() in page and lora_table() in page


def test_attention_keeps_no_square_of_the_length_on_cuda():
    """Else activations would grow faster than the length."""
    short, longer, longest = (fit.most(
        fit.pass_peaks, SHAPES["135m"], "logprobs", BF16, 2, length, 32, False, True, 0, "cuda")
        for length in (256, 512, 768))
    assert longest - longer == pytest.approx(longer - short, rel=0.02)


# ---- several processes ----

def split(name, stage="rl", shards=8, world=8, **given):
    return fit.plan(stage, SHAPES[name], BF16, batch=64, micro_batch=8, slots=64, prompt=256,
                    response=512, world=world, shards=shards, **given)


def test_split_weights_moments_and_gradients_are_an_eighth_and_the_sampler_has_all():
    # Llama 8b, untied: the scalar model has one row of 4096 for the 128,256 of the head.
    policy = 8_030_261_248
    both = 2 * policy - 4096 * 128_256 + 4096
    parts, one = split("8b"), split("8b", shards=1)
    assert parts["optimizer"] == both and parts["gradients"] == both // 2         # 8 and 4 bytes
    assert one["optimizer"] == 8 * both and one["gradients"] == 4 * both
    # fp32 of two models, bf16 of two; four tables of 131,072 x 128 angles, which each process has.
    assert parts["weights"] == (4 + 2) * both // 8 + 4 * 131_072 * 128 * 4
    assert parts["sampler's weights"] == 2 * policy
    assert parts["KV cache"] == one["KV cache"]


def test_processes_take_their_parts_of_a_batch():
    """Eight of 64 sequences, 8 at a time: one pass, nothing is accumulated."""
    alone = fit.plan("sft", SHAPES["1b"], BF16, batch=8, micro_batch=8, slots=64, prompt=256,
                     response=512)
    assert split("1b", "sft", shards=1) == alone
    assert split("1b", "sft", shards=1, world=7)["peak"] > alone["peak"]          # 10 sequences


def several(name, gb=80, world=8, stage="rl", **given):
    return fit.choose(stage, SHAPES[name], BF16, int(gb * fit.USED), batch=64, prompt=256,
                      response=512, jobs=256, world=world, local=min(world, 8), **given)


def test_weights_are_split_only_where_they_must_be():
    whole, parted = several("1b"), several("8b")
    assert whole.shards == 1 and "split" not in whole.line
    assert parted.shards == 8 and parted.line.endswith("weights split over 8 processes")
    # Of one machine where that is enough, else of all; as asked for where that is said.
    assert [several("8b", gb, 16).shards for gb in (80, 48)] == [8, 16]
    assert several("1b", shards=8).shards == 8
    # 256 samples are 32 of each process.
    assert whole.slots == 32


@pytest.mark.parametrize("stage, given", [("rl", {"rank": 32}), ("sft", {"rank": 32}),
                                          ("teacher", {}), ("eval", {})])
def test_what_is_frozen_is_never_split(stage, given):
    assert several("8b", stage=stage, **given).shards == 1
    assert several("8b", stage=stage, shards=8, **given).shards == 1
    with pytest.raises(ValueError, match="does not fit"):
        several("8b", gb=10, stage=stage, **given)


def test_the_error_says_how_many_gpus_would_do():
    with pytest.raises(ValueError, match="torchrun with 8 GPUs"):
        several("8b", world=1)
    with pytest.raises(ValueError) as error:
        several("8b", gb=10, world=64)
    assert "torchrun" not in str(error.value)
    with pytest.raises(ValueError, match="would fit: .*--shards 8"):
        several("8b", shards=1)


def test_each_process_has_a_gpu_of_its_own_and_shares_the_memory_of_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(fit, "free_memory", lambda: 8 * 10**9)
    assert fit.pick_device("auto") == torch.device("cuda")
    assert fit.free_bytes("cpu") == pytest.approx(7.2e9)
    for name, value in (("world", 16), ("local_world", 8), ("local_rank", 3)):
        monkeypatch.setattr(parallel, name, lambda value=value: value)
    assert fit.pick_device("auto") == fit.pick_device("cuda") == torch.device("cuda:3")
    assert fit.pick_device("cpu") == torch.device("cpu")
    assert fit.free_bytes("cpu") == pytest.approx(0.9e9)
    assert fit.processes() == {"world": 16, "local": 8}
    assert fit.processes(64) == {"world": 64, "local": 8}
    assert fit.processes(4) == {"world": 4, "local": 4}


# FSDP2 itself, by torch's own tracker, with a process group that sends nothing. Four layers.
WIDE = replace(SHAPES["1b"], vocab_size=8192, hidden_size=256, intermediate_size=1024, head_dim=32,
               num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
               max_position_embeddings=128, tie_word_embeddings=False)


@pytest.fixture
def eight(monkeypatch):
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    monkeypatch.setattr(parallel, "world", lambda: 8)
    torch.distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=8)
    yield
    torch.distributed.destroy_process_group()
    parallel._mesh.cache_clear()


@pytest.mark.parametrize("kind, head, sequences, checkpoint, passes", [
    (CausalLM, "logprobs", 1, False, 1), (CausalLM, "logprobs", 2, False, 2),
    (ScalarModel, "scalar", 1, False, 1), (ScalarModel, "scalar", 8, True, 2)])
def test_the_plan_is_within_6_percent_of_what_fsdp2_takes(eight, kind, head, sequences, checkpoint,
                                                         passes):
    tracking = pytest.importorskip("torch.distributed._tools.fsdp2_mem_tracker")
    with torch.device("meta"):
        model = kind(WIDE)
    model.model.dtype, model.model.checkpoint = BF16, checkpoint
    parallel.shard(model, 8, "cpu", BF16).to_empty(device="cpu")
    batch = pack([[0] * 96] * sequences, torch.device("cpu"))
    at = torch.zeros(32 * sequences, dtype=torch.long)
    tracker = tracking.FSDPMemTracker(model)
    tracker.track_inputs(())
    with tracker:
        for _ in range(passes):
            if kind is CausalLM:
                loss = model(batch, lambda hidden, weight: losses.linear_logprobs(
                    hidden[at], weight, at, ignore_index=None)[0])
            else:
                loss = model(batch)
            loss.sum().backward()
            tracker.reset_mod_stats()
    taken = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    planned = fit.most(fit.pass_peaks, WIDE, head, BF16, sequences, 96, 32, checkpoint, passes > 1,
                       0, "cpu", 8)
    own = sum(parallel.own(p).nbytes for p in model.parameters())
    assert planned + own == pytest.approx(taken, rel=0.06)


def test_the_dry_run_plans_for_so_many_gpus():
    configs = settings.parse("rl", train_rl.STAGES, "doc", [
        "--student", "8b", "--teacher-url", "http://127.0.0.1:1/v1", "--teacher-model", "big",
        "--lora", "0", "--dry-run", "--gpus", "8"])
    text = report(configs, ["rl"], {"train": 7473, "test": 1319})
    assert "weights split over 8 processes" in text and "here" not in text
    assert "8 cards at best" in text and "8 x 24 GB" in text
    one = report({"rl": replace(configs["rl"], gpus=0)}, ["rl"], {"train": 7473, "test": 1319})
    assert "split" not in one and "at best" not in one


def test_the_hours_on_many_cards_are_at_best_those_of_one_divided():
    def hours(gpus):
        configs = settings.parse("rl", train_rl.STAGES, "doc", [
            "--student", "135m", "--dry-run", "--gpus", str(gpus), "--slots", "8"])
        text = report(configs, ["eval"], {"train": 7473, "test": 1319})
        return [float(x) for x in text.splitlines()[-1].split()[1:]]
    assert hours(1) == pytest.approx([8 * x for x in hours(8)], rel=0.1)      # of two digits


def test_what_a_stage_is_told_reaches_its_plan():
    told = argparse.Namespace(slots=3, micro_batch=5, checkpoint=True, lora=8, shards=2,
                              reward="vote", algorithm="rloo")
    assert fit.asked(told, gpus=16) == {
        "slots": 3, "micro_batch": 5, "checkpoint": True, "rank": 8, "shards": 2,
        "scored": False, "valued": False, "world": 16, "local": 8}
