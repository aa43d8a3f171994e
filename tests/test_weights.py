"""HF folders: round trips, shards, and the errors that name what is wrong."""

import json
import re

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from nanodistill.model import CausalLM, ScalarModel
from nanodistill.weights import load, load_config, resolve, save, write_atomic


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
    save(random_model(), tmp_path, tokenizer_folder)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing model.layers.1.mlp.up_proj.weight"),
    (lambda t: t.update(extra=torch.zeros(2)), "unused extra"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"model.norm.weight has shape \(7,\), not \(32,\)"),
])
def test_wrong_keys_are_errors_that_name_them(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=words):
        load(folder)


@pytest.mark.parametrize("key, value", [("hidden_act", "gelu"), ("attention_bias", True), ("model_type", "mixtral"),
                                        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}), ("final_logit_softcapping", 30.0), ("num_local_experts", 8),
                                        ("quantization_config", {"rope_type": "fp8"}), ("use_sliding_window", True), ("layer_types", ["sliding_attention"]),
                                        ("partial_rotary_factor", 0.5)])
def test_config_that_asks_for_something_else_is_refused(folder, key, value):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(ValueError, match=re.escape(str(value["rope_type"] if isinstance(value, dict) else value[0] if isinstance(value, list) else value))):
        load_config(folder)


def test_a_mistral_window_is_refused_where_it_is_active(folder):
    raw = {**json.loads((folder / "config.json").read_text()), "model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps({**raw, "sliding_window": 128}))       # as long as the positions
    assert load_config(folder).model_type == "mistral"
    (folder / "config.json").write_text(json.dumps({**raw, "sliding_window": 127}))
    with pytest.raises(ValueError, match="sliding_window = 127"):
        load_config(folder)


def test_names_that_mean_no_model_exit_with_what_to_do(monkeypatch, tmp_path):
    """Without the hub; test_hub.py has the faults that it answers with."""
    from huggingface_hub import constants

    with pytest.raises(SystemExit, match="--student no-such-thing: not a preset"):
        resolve("no-such-thing", "student")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="--teacher 8b: HF_HUB_OFFLINE is set, and .* not in the"):
        resolve("8b", "teacher")


def test_shards_hold_the_same_weights_and_load_in_transformers(folder, tmp_path, tokenizer_folder):
    model, sharded = load(folder), tmp_path / "sharded"
    save(model, sharded, tokenizer_folder, shard_bytes=20_000)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2 and not (sharded / "model.safetensors").exists()
    for (name, a), (_, b) in zip(model.named_parameters(), load(sharded).named_parameters()):
        assert torch.equal(a, b), name
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert (transformers.AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)(ids).logits - model(ids)).abs().max() <= 1e-4
    save(model, sharded, tokenizer_folder)                               # saved whole again: no stale index may win
    assert not (sharded / "model.safetensors.index.json").exists()
    load(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ""])
def test_a_shard_index_cannot_lead_out_of_its_folder(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match="leads out of the folder"):
        load(folder)


def test_tied_head_is_one_parameter_and_may_be_stored_twice(tmp_path, tokenizer_folder):
    save(random_model(tie_word_embeddings=True), tmp_path, tokenizer_folder)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_reward_model_starts_from_a_causal_lm_with_a_zero_head(folder):
    model = load(folder, ScalarModel)
    assert torch.equal(model.score.weight, torch.zeros(1, 32))
    assert torch.equal(model.model.norm.weight, load(folder, CausalLM).model.norm.weight)
    with pytest.raises(ValueError, match="unused score.weight"):
        rewrite(folder, lambda t: t.update({"score.weight": torch.zeros(1, 32)}))
        load(folder, CausalLM)


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "a", 7)
    assert (tmp_path / "a").read_text() == "old"
