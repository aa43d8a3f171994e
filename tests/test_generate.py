"""The sampling engine against plain decoding, and its logprobs against the distribution sampled."""

import math
import re

import pytest
import torch
from conftest import card, random_model

import nanodistill.generate
from nanodistill import cpu
from nanodistill.batches import pack
from nanodistill.generate import Job, generate, prefill_batches
from nanodistill.sampling import GOLDEN, choose, choose_plainly, mix, stream_of, uniform


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18],
           [19, 20], [21, 22, 23, 24, 25, 26], [27, 28]]


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
    # Two stop tokens that really occur, at unequal times.
    eos = [free_running[6], plain_greedy(model, PROMPTS[2], [], 24)[3]]
    expected = [plain_greedy(model, prompt, eos, 24) for prompt in PROMPTS]
    # Unequal lengths, or slots would never be refilled.
    assert len(set(map(len, expected))) > 2
    done = generate(model, PROMPTS, n=2, temperature=0.0, eos_ids=eos, pad_id=0,
                    max_new_tokens=24, slots=slots)
    got = {(i, j): s for i, j, s in done}
    assert sorted(got) == [(i, j) for i in range(len(PROMPTS)) for j in range(2)]
    for (i, _), sample in got.items():
        assert sample.tokens == expected[i]
        assert sample.ended == (expected[i][-1] in eos)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_of_the_distribution_sampled(temperature):
    model = random_model()
    for i, _, s in generate(model, PROMPTS, n=3, temperature=temperature, eos_ids=[1], pad_id=0,
                            max_new_tokens=16, slots=5):
        ids = torch.tensor([PROMPTS[i] + s.tokens])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids)[0] / temperature, -1)
        chosen = torch.tensor(s.tokens)[:, None]
        expected = logprobs[len(PROMPTS[i]) - 1:-1].gather(1, chosen).squeeze(1)
        assert (torch.tensor(s.logprobs) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("enabled", [True, False])
def test_bf16_on_cpu_samples_from_the_same_distribution_with_and_without_cpu_py(
        monkeypatch, family, enabled):
    """The fused projections of the packed copy, Qwen2's with their biases."""
    pack_weights, calls = cpu.pack_weights, []
    monkeypatch.setattr(cpu, "ENABLED", enabled)
    monkeypatch.setattr(cpu, "pack_weights", lambda *args: calls.append(pack_weights(*args)))
    model = random_model(model_type=family).to(torch.bfloat16)
    for i, _, s in generate(model, PROMPTS, n=3, eos_ids=[1], pad_id=0, max_new_tokens=16, slots=5):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(pack([PROMPTS[i] + s.tokens])), -1)
        chosen = torch.tensor(s.tokens)[:, None]
        expected = logprobs[len(PROMPTS[i]) - 1:-1].gather(1, chosen).squeeze(1)
        # bf16 rounds logits of up to 4 by 0.008. PyTorch's kernel rounds otherwise than a step.
        worst = (torch.tensor(s.logprobs) - expected).abs().max()
        assert worst <= (0.1 if enabled else 0.15)
    assert len(calls) == enabled


def test_prompts_are_run_in_batches_of_a_limited_number_of_tokens(monkeypatch):
    def split(lengths, pairs, most):
        jobs = [Job(i, j, str(i), [1] * lengths[i], 1.0, 0) for i, j in pairs]
        return [[(job.index, job.sample) for job in batch] for batch in prefill_batches(jobs, most)]

    lengths, jobs = [3, 4, 9, 2, 2], [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    # Padded to the longest: 2 * 4 = 8; 9 alone is more; 2 * 9 would be 18; 2 * 2 = 4.
    batches = [[(0, 0), (0, 1), (1, 0)], [(2, 0), (2, 1)], [(3, 0), (4, 0)]]
    assert split(lengths, jobs, 8) == batches
    assert split(lengths, jobs, 7) == [[(0, 0), (0, 1)], [(1, 0)], *batches[1:]]
    ragged = [50] * 40 + [1000] + [60] * 40
    sizes = [[ragged[i] for i, _ in batch]
             for batch in split(ragged, [(i, 0) for i in range(81)], 2000)]
    assert sizes == [[50] * 40, [1000, 60], [60] * 33, [60] * 6]          # 2,000 tokens at most
    model, args = random_model(), dict(n=2, eos_ids=[1], pad_id=0, max_new_tokens=12, slots=8)
    at_once = {(i, j): s.tokens for i, j, s in generate(model, PROMPTS, **args)}
    monkeypatch.setitem(nanodistill.generate.PREFILL, "cpu", 4)
    assert {(i, j): s.tokens for i, j, s in generate(model, PROMPTS, **args)} == at_once


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_a_prompt_is_run_once_for_all_its_samples(monkeypatch, slots):
    packed = []
    monkeypatch.setattr(nanodistill.generate, "pack",
                        lambda rows, *args: packed.append(rows) or pack(rows, *args))
    done = list(generate(random_model(), PROMPTS, n=5, eos_ids=[1, 2, 3, 4], pad_id=0,
                         max_new_tokens=12, slots=slots))
    expected = [(i, j) for i in range(len(PROMPTS)) for j in range(5)]
    assert sorted((i, j) for i, j, _ in done) == expected
    assert sum(packed, []) == PROMPTS and (slots < 64 or len(packed) == 1)


def test_choose_draws_from_the_tempered_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    n = 40000
    u = uniform(torch.arange(n) * 977, torch.zeros(n, dtype=torch.long))
    tokens, _ = choose(logits.expand(n, 4), torch.full((n,), 0.5), u)
    shares = torch.bincount(tokens, minlength=4) / n
    # e^4, e^2, 1, e^-2 over their sum 63.12. The bound is 4.7 standard deviations of the first.
    expected = torch.tensor([0.8650, 0.1171, 0.0158, 0.0021])
    assert (shares - expected).abs().max() < 0.008
    # Inverse CDF: 0.8650 is the first step.
    u = torch.tensor([1e-8, 0.864, 0.866, 1 - 2**-24])
    edges, _ = choose(logits.expand(4, 4), torch.full((4,), 0.5), u)
    assert edges.tolist() == [0, 0, 1, 3]
    # Two blocks of 256 tokens. On the edge between them: the next token, in the next block.
    halves = torch.full((1, 512), -torch.inf)
    halves[0, [7, 300]] = 0.0
    assert choose(halves, torch.ones(1), torch.tensor([0.5]))[0].item() == 300


def test_choose_draws_what_the_plain_inverse_cdf_draws():
    """But where u falls within rounding of an edge between two tokens."""
    g = torch.Generator().manual_seed(0)
    for vocabulary in (96, 101, 4096):
        logits = torch.randn(2000, vocabulary, generator=g) * 2
        temperature, u = torch.rand(2000, generator=g) + 0.5, torch.rand(2000, generator=g)
        u = u.clamp(1e-6, 1 - 1e-6)
        tokens, logprobs = choose(logits, temperature, u)
        plain, plain_logprobs = choose_plainly(logits.double(), temperature.double(), u.double())
        same = tokens == plain
        assert same.float().mean() > 0.998
        torch.testing.assert_close(logprobs[same], plain_logprobs[same].float(), atol=1e-5, rtol=0)


def test_a_token_without_probability_is_never_drawn():
    """Masked tokens, with the largest and smallest numbers, and shares that sum to more than 1."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 1024, generator=g) * 3
    logits[:, torch.rand(1024, generator=g) < 0.5] = -torch.inf
    logits[:, 700:] = -torch.inf                                          # a block of nothing else
    for u in (2.0**-24, 0.3, 0.7, 1 - 2.0**-24):
        for temperature in (0.0, 0.1, 1.0):
            rows = torch.full((400,), temperature)
            tokens, logprobs = choose(logits, rows, torch.full((400,), u))
            exact = torch.log_softmax(logits / (temperature or 1.0), -1).gather(1, tokens[:, None])
            assert exact.isfinite().all()
            torch.testing.assert_close(logprobs, exact.squeeze(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(choose(logits, torch.zeros(400), torch.rand(400))[0], logits.argmax(-1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_of_logits_that_are_not_finite_has_some_token_and_no_logprob(bad):
    for vocabulary in (96, 101, 1024):
        logits = torch.zeros(6, vocabulary)
        logits[0, 5] = logits[1, vocabulary - 1] = logits[2] = logits[3, 0] = bad
        logits[4] = -torch.inf
        for any_greedy in (True, False):
            temperature = torch.tensor([1.0, 1.0, 1.0, 0.0 if any_greedy else 2.0, 1.0, 1.0])
            tokens, logprobs = choose(logits, temperature, torch.full((6,), 0.99), any_greedy)
            assert 0 <= tokens.min() and tokens.max() < vocabulary
            assert logprobs.isnan().tolist() == [True] * 5 + [False]


def test_mix_is_splitmix64():
    """Its first three numbers from seed 1234567, as rosettacode.org publishes them.

    The reference code is prng.di.unimi.it/splitmix64.c.
    """
    numbers = [mix(torch.tensor(1234567) + torch.tensor(k) * GOLDEN).item() & (1 << 64) - 1
               for k in (1, 2, 3)]
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_streams_are_uniform_and_independent():
    """Over tokens, over streams of neighbouring samples, and between neighbours."""
    streams = mix(torch.arange(300) * GOLDEN)
    u = torch.stack([uniform(streams, torch.full((300,), t))
                     for t in range(300)])                                 # (tokens, streams)
    assert 0 < u.min() and u.max() < 1
    for axis in (0, 1):
        assert (u.mean(axis) - 0.5).abs().max() < 0.08                     # 4.8 standard deviations
        # E (u - v)^2 of independent ones.
        assert (u.diff(dim=axis).pow(2).mean() - 1 / 6).abs() < 0.004
    assert (torch.histc(u, 20, 0, 1) / u.numel() - 0.05).abs().max() < 0.004


@pytest.mark.parametrize("device, graphs", [
    ("cpu", False),
    pytest.param("cuda", False, marks=card),
    pytest.param("cuda", True, marks=card)])
def test_samples_depend_neither_on_the_slots_nor_on_the_device(device, graphs):
    """A card's products round otherwise, in fp32 too little to draw another token."""
    model = random_model()

    def run(slots, device=device, graphs=graphs):
        done = generate(model.to(device), PROMPTS, n=12, temperature=[0.8, 1.2] * 6,
                        eos_ids=[1, 2, 3, 4], pad_id=0, max_new_tokens=24, slots=slots, seed=3,
                        graphs=graphs)
        return {(i, j): (s.tokens, s.ended) for i, j, s in done}

    alone, few, all_at_once = run(1), run(4), run(64)
    assert alone == few == all_at_once == run(4, "cpu", False) and len(alone) == 72
    assert len({tuple(tokens) for tokens, _ in alone.values()}) > 60
    assert len({len(tokens) for tokens, _ in alone.values()}) > 10


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
        done = generate(model, PROMPTS, n=3, temperature=[0.0, 0.0, 2.0], eos_ids=[1], pad_id=0,
                        max_new_tokens=12, slots=4, seed=seed)
        return {(i, j): s.tokens for i, j, s in done}

    first, second, other = run(1), run(1), run(2)
    assert first == second and not any(first[i, 2] == other[i, 2] for i in range(len(PROMPTS)))
    assert all(first[i, 0] == first[i, 1] == other[i, 0] for i in range(len(PROMPTS)))


@pytest.mark.parametrize("reach", [1, 2**40])
def test_streams_of_other_seeds_ids_and_samples_share_nothing(reach):
    """Neither the streams nor any of their numbers: these follow from stream + step * GOLDEN."""
    seeds = 0, 1, 2, -1, 2**63
    ids = [str(i) for i in range(12)] + ["", "1, 2", "\u00e9", "\ud800"]
    streams = [stream_of(seed * reach, id_, j) for seed in seeds for id_ in ids for j in range(12)]
    assert all(-2**63 <= s < 2**63 for s in streams)
    assert len(streams) == len(set(streams)) == 5 * 16 * 12          # i, j and i + 1, j - 1 too
    steps = {(s + k * GOLDEN) % 2**64 for s in streams for k in range(100)}
    assert len(steps) == 100 * len(streams)


def test_a_sample_follows_from_seed_id_and_its_index_alone():
    model = random_model()
    args = dict(eos_ids=[1, 2, 3, 4], pad_id=0, max_new_tokens=16, seed=3)
    names = ["a", "b", "c", "d", "e", "f"]

    def run(chosen, **more):
        done = generate(model, [PROMPTS[i] for i in chosen], ids=[names[i] for i in chosen],
                        **{**args, **more})
        return {(names[chosen[i]], j): (s.tokens, s.ended) for i, j, s in done}

    whole = run(range(6), n=8)
    assert len(set(map(str, whole.values()))) > 40
    for chosen, n, slots in (([4, 1, 3], 4, 256), ([5, 0], 1, 1), ([2, 5, 4, 3, 1, 0], 8, 5)):
        part = run(chosen, n=n, slots=slots)
        assert len(part) == n * len(chosen) and part.items() <= whole.items()
    other = run(range(6), n=8, seed=4)
    assert not any(other[key] == whole[key] for key in whole)
    # Two questions with the same text, and ids that are the indices where none are given.
    twice = [(s.tokens, s.ended) for *_, s in generate(model, [[5, 6, 7]] * 2, **args)]
    assert twice[0] != twice[1]
    assert twice == [(s.tokens, s.ended) for *_, s in
                     generate(model, [[5, 6, 7]] * 2, ids=["0", "1"], **args)]


@pytest.mark.parametrize("says, wrong", [
    ("prompt '1', the longest, has 10 tokens: with 119 .* 128 positions",
     dict(prompts=[[8], PROMPTS[2]], max_new_tokens=119)),
    ("prompt 'q7', the longest", dict(ids=["q5", "q7"], max_new_tokens=126)),
    ("prompt '1' is empty", dict(prompts=[[5], []])),
    ("prompt '0' has ids from 5 to 96; the vocabulary is 0 to 95", dict(prompts=[[5, 96], [5]])),
    ("prompt 'b' has ids from -1 to -1", dict(prompts=[[5], [-1]], ids=["a", "b"])),
    ("pad_id has ids from 96", dict(pad_id=96)),
    ("eos_ids has ids from -1 to 3", dict(eos_ids=[3, -1])),
    *((f"temperatures .{re.escape(str(t))}.: not 1", dict(temperature=t))
      for t in (-1.0, -1e-9, math.nan, math.inf, -math.inf, 1e-45, 1e39)),
    ("temperatures .1.0, -1.: not 2", dict(n=2, temperature=[1.0, -1])),
    ("temperatures .1.0, 1.0, 1.0.: not 2 numbers", dict(n=2, temperature=[1.0] * 3)),
    ("n 0, .* each must be 1", dict(n=0)), ("n -1", dict(n=-1)),
    ("slots 0", dict(slots=0)), ("max_new_tokens 0", dict(max_new_tokens=0)),
    ("2 prompts have 1 ids", dict(ids=["a"])), ("2 prompts have 3 ids", dict(ids=list("abc"))),
    ("2 prompts have 2 ids, 1 of them different", dict(ids=["a", "a"]))])
def test_what_cannot_be_worked_with_is_said_before_any_work(says, wrong):
    args = dict(prompts=[[5, 6], [7, 8, 9]], eos_ids=[1], pad_id=0, max_new_tokens=4)
    with pytest.raises(ValueError, match=says):
        next(generate(random_model(), **{**args, **wrong}))


@pytest.mark.parametrize("damage", ["nan", "inf", "of one prompt", "overflow"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_stop_the_sampling(damage, temperature):
    model = random_model()
    with torch.no_grad():
        if damage == "overflow":
            model.model.norm.weight.fill_(3e38)
        elif damage == "of one prompt":
            model.model.embed_tokens.weight[20] = torch.nan
        else:
            model.lm_head.weight[7, 3] = float(damage)
    args = dict(n=2, temperature=temperature, eos_ids=[1], pad_id=0, max_new_tokens=12, slots=5)
    with pytest.raises(FloatingPointError, match="prompt '.', sample .: logits are not finite"):
        list(generate(model, PROMPTS, **args))
    if damage == "of one prompt":
        done = list(generate(model, PROMPTS[:3], **args | {"max_new_tokens": 1}))
        assert len(done) == 6 and all(math.isfinite(s.logprobs[0]) for *_, s in done)


def test_a_masked_vocabulary_is_sampled_with_finite_logprobs():
    """Logits of -inf, as from a bias."""
    model = random_model()
    project, gone = model.lm_head.forward, list(range(40, 96))
    model.lm_head.forward = lambda x: project(x).index_fill(1, torch.tensor(gone), -torch.inf)
    for temperature in (0.0, 0.3, 1.0):
        for *_, s in generate(model, PROMPTS, n=3, temperature=temperature, eos_ids=[1], pad_id=0,
                              max_new_tokens=12):
            assert max(s.tokens) < 40 and all(map(math.isfinite, s.logprobs))


def test_greedy_logprobs_are_at_temperature_1():
    model = random_model()
    args = dict(temperature=0.0, eos_ids=[1], pad_id=0, max_new_tokens=8)
    for i, _, s in generate(model, PROMPTS, **args):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([PROMPTS[i] + s.tokens]))[0], -1)
        expected = logprobs[len(PROMPTS[i]) - 1:-1].gather(1, torch.tensor(s.tokens)[:, None])
        torch.testing.assert_close(torch.tensor(s.logprobs), expected.squeeze(1), rtol=0, atol=1e-4)


def test_an_idle_slot_writes_where_nothing_reads():
    """One sequence of 100 tokens ends at once; 15 short ones need no cache as long as it had."""
    model, long = random_model(), list(range(4, 96)) + list(range(4, 12))
    eos = plain_greedy(model, long, [], 1)
    short = [[i] for i in range(5, 96) if eos[0] not in plain_greedy(model, [i], [], 9)][:15]
    assert len(short) == 15
    got = {i: s.tokens for i, _, s in generate(model, [long, *short], temperature=0.0, eos_ids=eos,
                                               pad_id=0, max_new_tokens=9, slots=16)}
    assert got == {i: plain_greedy(model, p, eos, 9) for i, p in enumerate([long, *short])}
    assert got[0] == eos and all(len(got[i]) == 9 for i in range(1, 16))


@pytest.mark.parametrize("slots", [64, 10**9])
def test_many_samples_of_one_token(slots):
    done = list(generate(random_model(), PROMPTS[:2], n=1000, eos_ids=[1], pad_id=0,
                         max_new_tokens=1, slots=slots))
    assert sorted((i, j) for i, j, _ in done) == [(i, j) for i in range(2) for j in range(1000)]
    assert all(len(s.tokens) == 1 == len(s.logprobs) for *_, s in done)
    assert list(generate(random_model(), [], eos_ids=[1], pad_id=0, max_new_tokens=1)) == []


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
