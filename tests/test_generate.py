"""The sampling engine against plain decoding, and its logprobs against the distribution sampled."""

import pytest
import torch
from conftest import random_model

import nanodistill.generate
from nanodistill.generate import GOLDEN, choose, generate, mix, prefill_batches, uniform
from nanodistill.model import pack

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [19, 20], [21, 22, 23, 24, 25, 26], [27, 28]]


def plain_greedy(model, prompt, eos_ids, limit):
    """Greedy decoding with a full forward pass a token."""
    ids = list(prompt)
    for _ in range(limit):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in eos_ids:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("slots", [1, 2, 3, 64])
def test_greedy_equals_plain_decoding_whatever_the_slots(slots):
    model = random_model()
    free_running = plain_greedy(model, PROMPTS[0], [], 24)
    eos = [free_running[6], plain_greedy(model, PROMPTS[2], [], 24)[3]]   # two stop tokens that really occur, at unequal times
    expected = [plain_greedy(model, prompt, eos, 24) for prompt in PROMPTS]
    assert len(set(map(len, expected))) > 2                               # unequal lengths, or slots would never be refilled
    got = {(i, j): s for i, j, s in generate(model, PROMPTS, n=2, temperature=0.0, eos_ids=eos, pad_id=0, max_new_tokens=24, slots=slots)}
    assert sorted(got) == [(i, j) for i in range(len(PROMPTS)) for j in range(2)]
    for (i, _), sample in got.items():
        assert sample.tokens == expected[i]
        assert sample.ended == (expected[i][-1] in eos)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_of_the_distribution_sampled(temperature):
    model = random_model()
    for i, j, s in generate(model, PROMPTS, n=3, temperature=temperature, eos_ids=[1], pad_id=0, max_new_tokens=16, slots=5):
        ids = torch.tensor([PROMPTS[i] + s.tokens])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids)[0] / temperature, -1)
        expected = logprobs[len(PROMPTS[i]) - 1:-1].gather(1, torch.tensor(s.tokens)[:, None]).squeeze(1)
        assert (torch.tensor(s.logprobs) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_bf16_on_cpu_packs_its_weights_and_samples_from_the_same_distribution(kind):
    """The fused projections of the packed copy, Qwen2's with their biases."""
    model = random_model(model_type=kind).to(torch.bfloat16)
    for i, j, s in generate(model, PROMPTS, n=3, eos_ids=[1], pad_id=0, max_new_tokens=16, slots=5):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([PROMPTS[i] + s.tokens]))[0], -1)
        expected = logprobs[len(PROMPTS[i]) - 1:-1].gather(1, torch.tensor(s.tokens)[:, None]).squeeze(1)
        assert (torch.tensor(s.logprobs) - expected).abs().max() <= 0.1   # bf16 rounds logits of up to 4 by 0.008


def test_prompts_are_run_in_batches_of_a_limited_number_of_tokens(monkeypatch):
    prompts = [[1] * 3, [1] * 4, [1] * 9, [1] * 2, [1] * 2]
    jobs = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    assert prefill_batches(jobs, prompts, 7) == [[(0, 0), (0, 1), (1, 0)], [(2, 0), (2, 1)], [(3, 0), (4, 0)]]
    model, args = random_model(), dict(n=2, eos_ids=[1], pad_id=0, max_new_tokens=12, slots=8)
    at_once = {(i, j): s.tokens for i, j, s in generate(model, PROMPTS, **args)}
    monkeypatch.setitem(nanodistill.generate.PREFILL, "cpu", 4)
    assert {(i, j): s.tokens for i, j, s in generate(model, PROMPTS, **args)} == at_once


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_a_prompt_is_run_once_for_all_its_samples(monkeypatch, slots):
    packed = []
    monkeypatch.setattr(nanodistill.generate, "pack", lambda rows, device: packed.extend(rows) or pack(rows, device))
    done = list(generate(random_model(), PROMPTS, n=5, eos_ids=[1, 2, 3, 4], pad_id=0, max_new_tokens=12, slots=slots))
    assert sorted((i, j) for i, j, _ in done) == [(i, j) for i in range(len(PROMPTS)) for j in range(5)]
    assert packed == PROMPTS


def test_choose_draws_from_the_tempered_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    n = 40000
    tokens, _ = choose(logits.expand(n, 4), torch.full((n,), 0.5), uniform(torch.arange(n) * 977, torch.zeros(n, dtype=torch.long)))
    shares = torch.bincount(tokens, minlength=4) / n
    expected = torch.tensor([0.8650, 0.1171, 0.0158, 0.0021])            # e^4, e^2, 1, e^-2 over their sum 63.12
    assert (shares - expected).abs().max() < 0.008                        # 4.7 standard deviations of the first
    edges, _ = choose(logits.expand(4, 4), torch.full((4,), 0.5), torch.tensor([1e-8, 0.864, 0.866, 1 - 2**-24]))
    assert edges.tolist() == [0, 0, 1, 3]                                 # inverse CDF: 0.8650 is the first step
    halves = torch.full((1, 512), -torch.inf)                             # two blocks of 256 tokens
    halves[0, [7, 300]] = 0.0
    assert choose(halves, torch.ones(1), torch.tensor([0.5]))[0].item() == 300                # on the edge: the next token, in the next block


def test_mix_is_splitmix64():
    """Its first three numbers from seed 1234567, published with the reference code (prng.di.unimi.it/splitmix64.c) by rosettacode.org."""
    numbers = [mix(torch.tensor(1234567) + torch.tensor(k) * GOLDEN).item() & (1 << 64) - 1 for k in (1, 2, 3)]
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_streams_are_uniform_and_independent():
    """Over tokens, over streams of neighbouring samples, and between neighbours."""
    streams = mix(torch.arange(300) * GOLDEN)
    u = torch.stack([uniform(streams, torch.full((300,), t)) for t in range(300)])            # (tokens, streams)
    assert 0 < u.min() and u.max() < 1
    for axis in (0, 1):
        assert (u.mean(axis) - 0.5).abs().max() < 0.08                     # 4.8 standard deviations
        assert (u.diff(dim=axis).pow(2).mean() - 1 / 6).abs() < 0.004      # E (u - v)^2 of independent ones
    assert (torch.histc(u, 20, 0, 1) / u.numel() - 0.05).abs().max() < 0.004


@pytest.mark.parametrize("compile", [False, True])
def test_samples_do_not_depend_on_the_slots(compile):
    model = random_model()

    def run(slots):
        done = generate(model, PROMPTS, n=12, temperature=[0.8, 1.2] * 6, eos_ids=[1, 2, 3, 4], pad_id=0, max_new_tokens=24, slots=slots, seed=3, compile=compile)
        return {(i, j): (s.tokens, s.ended) for i, j, s in done}

    alone, few, all_at_once = run(1), run(4), run(64)
    assert alone == few == all_at_once and len(alone) == 72
    assert len({tuple(tokens) for tokens, _ in alone.values()}) > 60 and len({len(tokens) for tokens, _ in alone.values()}) > 10


def test_a_model_kept_in_fp32_samples_in_its_arithmetics_dtype():
    model = random_model(tie_word_embeddings=True)
    args = dict(n=2, temperature=1.0, eos_ids=[1], pad_id=0, max_new_tokens=16, seed=1)
    model.model.dtype = torch.bfloat16
    kept = [(i, j, s.tokens) for i, j, s in generate(model, PROMPTS, **args)]
    assert model.head.dtype == torch.float32
    model.to(torch.bfloat16)
    assert kept == [(i, j, s.tokens) for i, j, s in generate(model, PROMPTS, **args)]


def test_same_seed_same_samples_and_each_sample_its_own_temperature():
    model = random_model()

    def run(seed):
        done = generate(model, PROMPTS, n=3, temperature=[0.0, 0.0, 2.0], eos_ids=[1], pad_id=0, max_new_tokens=12, slots=4,
                        seed=seed)
        return {(i, j): s.tokens for i, j, s in done}

    first, second, other = run(1), run(1), run(2)
    assert first == second and first != other
    assert all(first[i, 0] == first[i, 1] == other[i, 0] for i in range(len(PROMPTS)))


def test_length_limit_is_checked_before_any_work():
    with pytest.raises(ValueError, match="128 positions"):
        next(generate(random_model(), PROMPTS, eos_ids=[1], pad_id=0, max_new_tokens=119))


@pytest.mark.parametrize("most", [3, 1])
def test_where_memory_runs_out_fewer_slots_draw_the_same_samples(monkeypatch, capsys, most):
    model, prompts = random_model(), [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    kwargs = dict(eos_ids=[1], pad_id=0, max_new_tokens=6, n=4, seed=3)
    expected = {(i, j): s.tokens for i, j, s in generate(model, prompts, **kwargs)}

    class Small(nanodistill.generate.KVCache):
        def __init__(self, config, batch, *args):
            if batch > most:
                raise torch.OutOfMemoryError("made up")
            super().__init__(config, batch, *args)

    monkeypatch.setattr(nanodistill.generate, "KVCache", Small)
    got = {(i, j): s.tokens for i, j, s in generate(model, prompts, slots=12, **kwargs)}
    assert got == expected and len(got) == 12
    assert f"--slots {most}" in capsys.readouterr().err
