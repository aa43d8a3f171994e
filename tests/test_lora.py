"""Adapters on a frozen trunk: by hand, against dense weights, and against PEFT."""

import json

import pytest
import torch
from conftest import random_model
from huggingface_hub import constants
from torch.nn.functional import cross_entropy

from data import hub
from nanodistill import lora, run, weights
from nanodistill.batches import pack
from nanodistill.generate import generate
from nanodistill.losses import linear_cross_entropy
from nanodistill.model import CausalLM, ScalarModel


IDS = torch.randint(4, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def adapted(trunk, rank=4, seed=1, **kwargs):
    """A CausalLM on the trunk whose adapter has learned something."""
    model = lora.adapt(lora.share(trunk), rank, **kwargs)
    for name, p in lora.trained(model).items():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(
            seed + len(name) + p.numel()))
    return model


def test_a_layer_by_hand():
    """W 2 x 2, rank 1, alpha 2: y = W x + 2 B (A x)."""
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    layer = lora.LoRALinear(linear, rank=1, alpha=2)
    x = torch.tensor([5.0, 6.0])
    assert layer(x).tolist() == [17.0, 39.0]                     # B is zero
    with torch.no_grad():
        layer.lora_A.weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.weight.copy_(torch.tensor([[3.0], [0.5]]))
    # A x = -1; 2 B (A x) = (-6, -1).
    assert layer(x).tolist() == [11.0, 38.0]
    assert layer.merged().tolist() == [[7.0, -4.0], [4.0, 3.0]]
    assert layer.weight is linear.weight


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_new_adapter_changes_nothing_and_only_adapters_learn(family):
    trunk = random_model(model_type=family)
    model, expected = lora.adapt(lora.share(trunk), 4), trunk(IDS)
    assert torch.equal(model(IDS), expected)
    names = lora.trained(model)
    # Seven layers in each of the blocks, an A and a B each.
    assert len(names) == 14 * trunk.config.num_hidden_layers
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    model(IDS).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == names.keys()
    # It is the trunk's own logits that stay, exactly, when another model on it has learned.
    moved = adapted(trunk)
    assert not torch.allclose(moved(IDS), expected) and torch.equal(trunk(IDS), expected)


def test_four_models_hold_one_trunk():
    trunk = random_model(tie_word_embeddings=False).requires_grad_(False)
    policy = lora.adapt(lora.share(trunk), 4)
    value_model, reward_model = (
        lora.adapt(weights.stand_on(trunk, ScalarModel), 4) for _ in range(2))
    own, where = {p.data_ptr() for p in trunk.parameters()}, []
    for model in (policy, value_model, reward_model):
        rest = [p for name, p in model.named_parameters() if p.data_ptr() not in own]
        assert all(p.requires_grad for p in rest)
        where += [p.data_ptr() for p in rest]
        assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert len(where) == len(set(where))                         # and each its own adapters
    assert torch.equal(value_model(IDS), torch.zeros(2, 20))


def test_gradients_are_those_of_the_dense_weights_by_the_chain_rule():
    """d/dB = scale G A^T and d/dA = scale B^T G, where G is the gradient of the merged weight.

    Packed, with activations computed again, and through the fused loss with its frozen head."""
    trunk = random_model().requires_grad_(False)
    model = adapted(trunk, rank=3, alpha=6)
    dense = CausalLM(trunk.config)
    dense.load_state_dict(dict(lora.merged(model)))
    cross_entropy(dense(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    model.model.checkpoint = True
    rows = pack([row[:-1] for row in IDS.tolist()])
    linear_cross_entropy(model.model(rows), model.head, IDS[:, 1:].flatten()).backward()
    assert model.head.grad is None
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoRALinear):
            G = dense.get_parameter(f"{name}.weight").grad
            torch.testing.assert_close(layer.lora_B.weight.grad, 2 * G @ layer.lora_A.weight.T,
                                       rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(layer.lora_A.weight.grad, 2 * layer.lora_B.weight.T @ G,
                                       rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_is_of_the_adapted_model(dtype):
    """Unmerged; in bf16 on CPU merged into the packed copy."""
    trunk = random_model().to(dtype).requires_grad_(False)
    model = adapted(trunk)
    prompts = [[5, 6, 7], [8, 9]]
    for i, _, s in generate(model, prompts, n=3, eos_ids=[1], pad_id=0, max_new_tokens=16):
        with torch.no_grad():
            logprobs = model(pack([prompts[i] + s.tokens])).log_softmax(-1)
        expected = logprobs[len(prompts[i]) - 1:-1].gather(1, torch.tensor(s.tokens)[:, None])
        worst = (torch.tensor(s.logprobs) - expected.squeeze(1)).abs().max()
        assert worst < (1e-4 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("kind", [CausalLM, ScalarModel])
def test_peft_loads_the_adapter_with_equal_logits_and_ours_loads_pefts(tmp_path, tokenizer_folder,
                                                                      kind):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    trunk = random_model(vocab_size=512)
    weights.save(trunk, tmp_path / "trunk", tokenizer_folder)
    trunk.requires_grad_(False)
    model = adapted(trunk, rank=4, alpha=8)
    if kind is ScalarModel:
        model = lora.adapt(weights.stand_on(trunk, ScalarModel), 4, 8)
        for p in lora.trained(model).values():
            torch.nn.init.normal_(p, std=0.1)
    weights.save(model, tmp_path / "merged", tmp_path / "trunk", base=tmp_path / "trunk")
    if kind is CausalLM:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "trunk", dtype=torch.float32)
    else:
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "trunk", num_labels=1, dtype=torch.float32)
    oracle = peft.PeftModel.from_pretrained(base, tmp_path / "merged" / "adapter").eval()
    with torch.no_grad():
        expected, got = oracle(IDS).logits, model(IDS)
        whole = weights.load(tmp_path / "merged", kind)(IDS)
        if kind is ScalarModel:
            expected, got, whole = expected.squeeze(-1), got[:, -1], whole[:, -1]
        assert got.abs().max() > 0.1
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    # What PEFT writes.
    oracle.save_pretrained(tmp_path / "theirs")
    again = weights.load_adapter(tmp_path / "theirs", trunk, kind)
    for name, p in lora.trained(model).items():
        assert torch.equal(again.get_parameter(name), p), name


@pytest.mark.parametrize("change, says", [
    ({"peft_type": "IA3"}, "not LoRA"), ({"use_dora": True}, "use_dora"), ({"r": 0}, "r = 0"),
    ({"lora_alpha": "x"}, "lora_alpha = 'x'"), ({"r": 8}, "has shape"),
    ({"bias": "all"}, "not LoRA without biases")])
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path, tokenizer_folder, change, says):
    trunk = random_model(vocab_size=512)
    weights.save(adapted(trunk), tmp_path, tokenizer_folder)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=says):
        weights.load_adapter(tmp_path / "adapter", trunk)


def test_a_students_adapter_that_is_broken_is_one_message_at_the_beginning(tmp_path,
                                                                           tokenizer_folder):
    trunk = random_model(vocab_size=512)
    weights.save(trunk, tmp_path / "trunk", tokenizer_folder)
    mine = tmp_path / "mine"
    weights.save_adapter(adapted(trunk.requires_grad_(False)), mine, tmp_path / "trunk")
    path = mine / "adapter_config.json"
    good = json.loads(path.read_text())
    for change, says in (({"use_dora": True}, "use_dora"), ({"r": 10**9}, "r = 1000000000")):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(SystemExit, match=f"--student .*{says}"):
            hub.resolve(mine, "student", weights=False)
    path.write_text(json.dumps({**good, "r": 8}))
    with pytest.raises(SystemExit, match="--student .*has shape"):
        hub.resolve(mine, "student")
    (mine / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match="has no adapter_model.safetensors"):
        hub.resolve(mine, "student", weights=False)


def test_a_checkpoint_holds_what_is_trained_and_brings_it_back(tmp_path):
    from nanodistill.settings import Common
    config, trunk = Common(), random_model().requires_grad_(False)
    model = adapted(trunk)
    run.save_checkpoint(tmp_path / "resume.pt", config, dict(model=model), step=3)
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)["model"]
    assert saved.keys() == lora.trained(model).keys()
    other = lora.adapt(lora.share(trunk), 4)
    assert run.load_checkpoint(tmp_path / "resume.pt", config, dict(model=other))["step"] == 3
    assert torch.equal(other(IDS), model(IDS))
    # Of another rank, or of all weights: no checkpoint of this run.
    for wrong in (lora.share(trunk).requires_grad_(True), trunk):
        with pytest.raises(SystemExit, match="is damaged, or no checkpoint"):
            run.load_checkpoint(tmp_path / "resume.pt", config, dict(model=wrong))


def test_an_adapters_folder_may_be_the_student(tmp_path, tokenizer_folder, monkeypatch, capsys):
    """It is merged into its base, once."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    trunk = random_model(vocab_size=512)
    weights.save(trunk, tmp_path / "trunk", tokenizer_folder)
    model = adapted(trunk.requires_grad_(False))
    weights.save_adapter(model, tmp_path / "mine", tmp_path / "trunk")
    assert hub.resolve(tmp_path / "mine", "student", weights=False) == tmp_path / "trunk"
    folder = hub.resolve(tmp_path / "mine", "student")
    assert "merged into" in capsys.readouterr().out
    torch.testing.assert_close(weights.load(folder)(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    assert hub.resolve(tmp_path / "mine", "student") == folder and not capsys.readouterr().out
    # Another adapter under the same name is another model.
    weights.save_adapter(adapted(trunk, seed=9), tmp_path / "mine", tmp_path / "trunk")
    assert hub.resolve(tmp_path / "mine", "student") != folder


def test_cast_is_a_model_of_its_own_on_the_same_trunk():
    trunk = random_model().to(torch.bfloat16).requires_grad_(False)
    model = adapted(trunk)
    cast = lora.cast(model, torch.bfloat16)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(cast(ids), model(ids))
    ours, its = dict(model.named_parameters()), dict(cast.named_parameters())
    assert ours.keys() == its.keys()
    for name, p in its.items():
        assert p.dtype == torch.bfloat16
        assert (p is ours[name]) == (".lora_" not in name)
        assert ours[name].dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
    assert lora.cast(cast, torch.bfloat16) is cast and lora.cast(trunk, torch.bfloat16) is trunk
