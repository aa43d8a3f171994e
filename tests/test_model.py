"""The decoder against transformers, and the cached forward pass against the full one."""

import pytest
import torch
from conftest import random_model

from nanodistill import cpu, lora
from nanodistill.batches import KVCache, NewTokens, pack
from nanodistill.generate import generate
from nanodistill.model import CausalLM, ScalarModel, causal_attention, grouped_attention
from nanodistill.weights import load, save


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
CASES = {
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "mistral": dict(model_type="mistral"),
    "untied": dict(tie_word_embeddings=False),
    "tied": dict(tie_word_embeddings=True),
    "grouped queries": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=4),
    "one head each": dict(num_key_value_heads=4),
    "head_dim not hidden / heads": dict(head_dim=16),
    "llama3 rope": dict(rope_scaling=LLAMA3, rope_theta=500.0),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_text_equal_transformers(tmp_path, tokenizer_folder, name):
    transformers = pytest.importorskip("transformers")
    model = random_model(**CASES[name])
    save(model, tmp_path, tokenizer_folder)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    # A folder as transformers writes it, with its own config.json.
    oracle.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(4, 96, (3, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = model(ids), oracle(ids).logits
        text = oracle.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=64,
                               do_sample=False, eos_token_id=[], pad_token_id=0)[0, 60:]
    _, _, sample = next(generate(model, [ids[0].tolist()], temperature=0.0, max_new_tokens=64,
                                 eos_ids=[], pad_id=0))
    difference = (logits - expected).abs().max()
    verdict = "equal" if sample.tokens == text.tolist() else "DIFFERENT"
    print(f"\n{name}: largest logit difference {difference:.1e}, "
          f"greedy text of {len(text)} tokens {verdict}")
    # Logits of one value would agree with anything.
    assert logits.std() > 0.5 and len(set(sample.tokens)) > 5
    assert difference <= 1e-4
    assert sample.tokens == text.tolist() and len(text) == 64
    for folder in (tmp_path, tmp_path / "theirs"):
        assert torch.equal(load(folder)(ids), logits)


def test_scalar_model_equals_transformers_sequence_classification(tmp_path, tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    model = random_model(ScalarModel, vocab_size=512)
    save(model, tmp_path, tokenizer_folder)
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32).eval()
    assert oracle.config.num_labels == 1
    ids = torch.randint(4, 512, (2, 20), generator=torch.Generator().manual_seed(1))
    # transformers reads the last token that is not pad.
    with torch.no_grad():
        assert (model(ids)[:, -1] - oracle(ids).logits.squeeze(-1)).abs().max() <= 1e-4


def test_cached_forward_equals_full_forward_with_rows_of_unequal_length():
    model = random_model()
    ids = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        full = model(ids)
        cache, fresh = (KVCache(model.config, 3, length, "cpu", torch.float32)
                        for length in (64, 17))
        # Stale content must not matter.
        for tensor in cache.k + cache.v:
            tensor.fill_(100.0)
        prompt = torch.tensor([5, 17, 11])
        model(pack([row[:n] for row, n in zip(ids.tolist(), prompt)], cache=fresh))
        cache.copy_rows(fresh, torch.arange(3), torch.arange(3))
        cache = cache.view(3, 50)
        for step in range(20):
            at = prompt + step
            logits = model(NewTokens(ids.gather(1, at[:, None]).squeeze(1), at, cache))
            expected = full[torch.arange(3), at]
            assert (logits - expected).abs().max() <= 1e-4


def test_attention_by_products_equals_pytorchs_in_values_and_gradients():
    """Grouped queries in fp64 against PyTorch's kernel, as model.py calls it and as it is; then the
    blocks of queries that bf16 goes through on CPU."""
    q, k, v = (torch.randn(2, 9, heads, 8, generator=torch.Generator().manual_seed(heads),
                           dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))

    def gradients(out):
        return torch.autograd.grad(out.sin().sum(), (q, k, v))
    tq, tk, tv = (x.transpose(1, 2) for x in (q, k, v))                # (2, heads, 9, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        tq, tk, tv, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)        # (2, 9, 48)
    wanted = gradients(expected)
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1).repeat(3, 1)
    rows = tq.unflatten(1, (2, 3)).flatten(2, 3)                       # (2, 2, 27, 8)
    products = grouped_attention(rows, tk.transpose(2, 3), tv, mask)
    for got in (causal_attention(q, k, v),
                products.reshape(2, 6, 9, 8).transpose(1, 2).flatten(2)):
        assert torch.allclose(got, expected, atol=1e-12)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients(got), wanted))
    for block in (4, 128):
        low = cpu.causal_attention(*(x.bfloat16() for x in (q, k, v)), block)
        assert (low.double() - expected).abs().max() < 0.03
        assert all((a.double() - b).abs().max() < 0.05 for a, b in zip(gradients(low), wanted))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
def test_on_cuda_attention_of_grouped_heads_is_that_of_fp64_and_keeps_no_square(dtype, error):
    q, k, v = (torch.randn(2, 1000, heads, 16, generator=torch.Generator().manual_seed(i)).to(dtype)
               for i, heads in enumerate((6, 2, 2)))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in exact), is_causal=True, enable_gqa=True)
    expected = expected.transpose(1, 2).flatten(2)                      # (2, 1000, 96)
    wanted = torch.autograd.grad(expected.sin().sum(), exact)
    inputs = [x.cuda().requires_grad_() for x in (q, k, v)]
    before = torch.cuda.memory_allocated()
    out = causal_attention(*inputs)
    # A byte for each of the weights, of two or four.
    assert torch.cuda.memory_allocated() - before < 2 * 6 * 1000 * 1000
    got = torch.autograd.grad(out.float().sin().sum(), inputs)
    for a, b in zip((out, *got), (expected, *wanted)):
        assert (a.cpu() - b).norm() < error * b.norm()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_packed_sequences_are_as_padded_ones_in_values_and_gradients(checkpoint):
    model = random_model()
    rows = [torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist()
            for n in (7, 1, 20, 3)]
    padded = torch.tensor([row + [0] * (20 - len(row)) for row in rows])
    mask = torch.tensor([[t < len(row) for t in range(20)] for row in rows])
    expected = model(padded)[mask]                                      # (31, V)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected.sin().sum(), parameters)
    model.model.checkpoint = checkpoint
    got = model(pack(rows))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(got.sin().sum(), parameters)
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-3)


def test_compute_dtype_leaves_weights_and_rope_table_in_fp32():
    model = random_model()
    ids = torch.randint(0, 96, (2, 60), generator=torch.Generator().manual_seed(3))
    truth = model(ids)
    model.model.dtype = torch.bfloat16
    logits = model(ids)
    assert logits.dtype == torch.float32 and model.head.dtype == torch.float32
    assert 0 < (logits - truth).abs().mean() < 0.1 * truth.std()        # rounded, not wrong
    logits.sum().backward()
    assert model.head.grad.dtype == torch.float32
    table = model.model.angles.clone()
    # Positions past 256 have no exact bf16.
    assert torch.equal(model.to(torch.bfloat16).model.angles, table)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_made_without_weights_has_initial_weights_and_no_leftovers_of_memory(tied):
    config = random_model(tie_word_embeddings=tied).config
    filled = torch.full((10**6,), 1e30)                  # what freed memory would then hold
    del filled
    torch.manual_seed(0)
    a = CausalLM(config)
    torch.manual_seed(0)
    b = CausalLM(config)
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters()):
        assert torch.equal(x, y) and x.abs().max() < 2, name
    assert a.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("family, dtype, rank, graphs", [
    ("qwen3", torch.float32, 0, 4), ("llama", torch.bfloat16, 4, 6)])
def test_two_parts_of_a_layer_are_compiled_for_all_layers_lengths_and_steps(
        family, dtype, rank, graphs):
    """Before and after attention, with and without gradients. With adapters also the first layer,
    whose input needs no gradient. Then never again: not for other lengths, nor with checkpointing,
    for a copy, or in sampling."""
    built = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    model = random_model(model_type=family, num_hidden_layers=3, head_dim=16)
    if rank:
        model = lora.adapt(model, rank)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    trunk, parameters = model.model, list(lora.trained(model.model).values())

    def run(lengths, compiled, arithmetic=dtype, trunk=trunk, parameters=parameters):
        """Hidden states without and with gradients, and the gradients."""
        packed = pack([list(range(3, 3 + n)) for n in lengths])
        trunk.compiled, trunk.dtype = compiled, arithmetic
        with torch.no_grad():
            alone = trunk(packed)
        hidden = trunk(packed)
        gradients = torch.autograd.grad(hidden.float().sin().sum(), parameters)
        return alone, hidden.detach(), torch.cat([g.flatten() for g in gradients])

    before = built["unique_graphs"]
    run([5, 9], compiled=True)
    assert built["unique_graphs"] == before + graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths, trunk.checkpoint in [((2, 1), False), ((7, 30, 4), False), ((8, 25), True)]:
            alone, hidden, gradients = run(lengths, compiled=True)
            # PPO's first ratio is 1. (On an H100 it is so in bf16 too; on a CPU with amx_bf16 the
            # compiler takes other bf16 products where there are no gradients.)
            assert torch.equal(alone, hidden) or dtype == torch.bfloat16
            eager, truth = run(lengths, False), run(lengths, False, torch.float32)
            for got, rounded, exact in zip((alone, hidden, gradients), eager, truth):
                assert (got - exact).norm() < 1.3 * (rounded - exact).norm() + 1e-5 * exact.norm()
        trunk.compiled = True
        other = lora.share(model)
        # A copy's parts are its own, not those of what it was copied from.
        other.model.layers[1].input_layernorm.weight = torch.nn.Parameter(
            torch.zeros(32), requires_grad=not rank)
        assert not torch.equal(run([4, 4], True, trunk=other.model,
                                   parameters=[*lora.trained(other.model).values()])[0],
                               run([4, 4], True)[0])
        sampled = [[sample.tokens for _, _, sample in generate(
            model, [[5, 6, 7]], temperature=0.0, max_new_tokens=9, eos_ids=[], pad_id=0)]
            for trunk.compiled in (False, True)]
        assert sampled[0] == sampled[1]
    assert built["unique_graphs"] == before + graphs
