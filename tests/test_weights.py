"""HF folders: round trips, shards, and the errors that name what is wrong."""

import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from data.hub import resolve
from nanodistill import weights
from nanodistill.files import write_atomic
from nanodistill.model import CausalLM, ScalarModel
from nanodistill.reward import score_sequences
from nanodistill.tokenizer import FILES, Tokenizer
from nanodistill.weights import INDEX, complete, load, load_config, save


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
    save(random_model(), tmp_path, tokenizer_folder)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
     "missing model.layers.1.mlp.up_proj.weight"),
    (lambda t: t.update(extra=torch.zeros(2)), "unused extra"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
     r"model.norm.weight has shape \(7,\), not \(32,\)"),
])
def test_wrong_keys_are_errors_that_name_them(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=words):
        load(folder)


@pytest.mark.parametrize("key, value, named", [
    ("hidden_act", "gelu", "gelu"), ("attention_bias", True, "True"),
    ("model_type", "mixtral", "mixtral"), ("mlp_bias", True, "True"), ("pretraining_tp", 2, "2"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "yarn"),
    ("final_logit_softcapping", 30.0, "30.0"), ("num_local_experts", 8, "8"),
    ("quantization_config", {"rope_type": "fp8"}, "fp8"), ("use_sliding_window", True, "True"),
    ("layer_types", ["sliding_attention"], "sliding_attention"),
    ("partial_rotary_factor", 0.5, "0.5")])
def test_config_that_asks_for_something_else_is_refused(folder, key, value, named):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(ValueError, match=re.escape(named)):
        load_config(folder)


def test_a_mistral_window_is_refused_where_it_is_active(folder):
    raw = {**json.loads((folder / "config.json").read_text()), "model_type": "mistral"}
    # A window as long as the positions is none.
    (folder / "config.json").write_text(json.dumps({**raw, "sliding_window": 128}))
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
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert not (sharded / "model.safetensors").exists()
    for (name, a), (_, b) in zip(model.named_parameters(), load(sharded).named_parameters()):
        assert torch.equal(a, b), name
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert (oracle(ids).logits - model(ids)).abs().max() <= 1e-4
    # Saved whole again: no stale index may win.
    save(model, sharded, tokenizer_folder)
    assert not (sharded / "model.safetensors.index.json").exists()
    load(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ""])
def test_a_shard_index_cannot_lead_out_of_its_folder(folder, name):
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leads out of the folder"):
        load(folder)


def test_tied_head_is_one_parameter_and_may_be_stored_twice(tmp_path, tokenizer_folder):
    save(random_model(tie_word_embeddings=True), tmp_path, tokenizer_folder)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path,
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
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


def test_saved_weights_may_be_read_by_whom_the_other_files_may(folder):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


# ---- written whole or not at all ----

SHAPES = {"single": {}, "two": {"shard_bytes": 30_000}, "three": {"shard_bytes": 20_000}}


def weights_of(folder):
    model = load(folder)
    return load_config(folder), {name: p.detach() for name, p in model.named_parameters()}


def same(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in b[1])


@pytest.mark.parametrize("before", SHAPES)
@pytest.mark.parametrize("after", SHAPES)
@pytest.mark.parametrize("what", ["os.replace", "os.fsync", "save_file", "Path.unlink",
                                  "Path.write_bytes"])
def test_a_save_that_breaks_off_anywhere_leaves_no_mix(tmp_path, tokenizer_folder, monkeypatch,
                                                       before, after, what):
    """Each call in turn fails as a full disk would; what was there is whole, or nothing counts."""
    old, new = random_model(), random_model(seed=1, rope_theta=500.0)
    save(old, tmp_path / "old", tokenizer_folder)
    save(new, tmp_path / "new", tokenizer_folder)
    old_weights, new_weights = weights_of(tmp_path / "old"), weights_of(tmp_path / "new")
    owner, name = {"save_file": (weights, "save_file"), "os": (os, what[3:]),
                   "Path": (Path, what[5:])}[what.split(".")[0]]
    real, outcomes = getattr(owner, name), []
    for fails_at in range(1, 40):
        folder, calls = tmp_path / str(fails_at), []
        save(old, folder, tokenizer_folder, **SHAPES[before])

        def fail(*args, calls=calls, fails_at=fails_at, **kwargs):
            calls.append(args)
            if len(calls) == fails_at:
                if name == "save_file":
                    Path(args[1]).write_bytes(b"torn")
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, fail)
        try:
            save(new, folder, tokenizer_folder, **SHAPES[after])
            broke = False
        except OSError as error:
            assert error.errno == errno.ENOSPC
            broke = True
        monkeypatch.setattr(owner, name, real)
        if complete(folder):
            outcomes.append("old" if same(weights_of(folder), old_weights) else "new")
            assert outcomes[-1] == "old" or same(weights_of(folder), new_weights)
        else:
            outcomes.append("none")
        if what != "Path.unlink":
            assert not list(folder.glob("*.partial"))
        if len(calls) < fails_at:
            break
    assert not broke and outcomes[-1] == "new"
    if what == "save_file":                              # until all is written nothing is touched
        assert set(outcomes[:-1]) == {"old"}
    save(new, folder, tokenizer_folder, **SHAPES[after])
    shards = {"single": 1, "two": 2, "three": 3}[after]
    assert len(list(folder.glob("model*.safetensors"))) >= shards
    assert {p.name for p in folder.glob("model*")} == (
        {"model.safetensors"} if after == "single" else
        {INDEX, *json.loads((folder / INDEX).read_text())["weight_map"].values()})


def test_a_folder_may_be_saved_over_its_own_source(tmp_path, tokenizer_folder):
    folder = tmp_path
    save(random_model(vocab_size=512), folder, tokenizer_folder)
    model = load(folder)
    before = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    save(model, folder, folder)
    assert same(weights_of(folder), (model.config, dict(model.named_parameters())))
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert "generation_config.json" in before and "tokenizer.json" in before


def test_write_atomic_leaves_nothing_beside_when_the_disk_is_full(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", "old")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            def full(*args):
                raise OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(os, call, full)
            write_atomic(tmp_path / "a", "new")
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.skipif(os.name != "posix", reason="only there can a folder be opened")
def test_a_renames_folder_is_flushed(tmp_path, monkeypatch):
    order, real, rename = [], os.fsync, os.replace

    def fsync(fd):
        order.append(stat.S_ISDIR(os.fstat(fd).st_mode))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *args: (order.append("rename"), rename(*args)))
    write_atomic(tmp_path / "a", "x")
    assert order == [False, "rename", True]


# ---- complete ----

def damage(folder, how):
    single = folder / "model.safetensors"
    data = single.read_bytes()
    spoiled = {"empty": b"", "torn": data[:-1], "longer": data + b"x", "header": data[:100]}
    if how in spoiled:
        single.write_bytes(spoiled[how])
        return single
    index = {"json": "{", "none": '{"weight_map": {}}', "list": '{"weight_map": [1]}',
             "keyless": "{}", "twice": '{"weight_map": {"a": "b"}, "weight_map": {}}',
             "number": '{"weight_map": {"model.norm.weight": 7}}',
             "away": '{"weight_map": {"model.norm.weight": "other.safetensors"}}'}
    (folder / INDEX).write_text(index[how])
    return folder / INDEX


@pytest.mark.parametrize("how", ["empty", "torn", "longer", "header", "json", "none", "list",
                                 "keyless", "twice", "number", "away"])
def test_damaged_weights_are_not_complete_and_named(folder, how):
    assert complete(folder)
    path = damage(folder, how)
    assert not complete(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(path))) as caught:
        load(folder)
    assert str(caught.value).count("\n") < 3


def test_a_key_of_a_shard_that_the_index_leaves_out_is_left_over(folder):
    names = load_file(folder / "model.safetensors")
    rewrite(folder, lambda t: t.update(extra=torch.zeros(2)))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="unused extra"):
        load(folder)


# ---- refused by name ----

@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_finite_are_refused(folder, value, dtype):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 4] = value
    rewrite(folder, change)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
        load(folder)


def test_large_numbers_are_finite(folder):
    in_fp16 = torch.full((32,), 6e4, dtype=torch.float16)
    rewrite(folder, lambda t: t.update({"model.norm.weight": in_fp16}))
    rewrite(folder, lambda t: t["model.embed_tokens.weight"].fill_(3e38))
    assert load(folder).model.norm.weight.tolist() == [60000.0] * 32     # 6e4 in fp16
    in_fp64 = torch.full((32,), 1e300, dtype=torch.float64)
    rewrite(folder, lambda t: t.update({"model.norm.weight": in_fp64}))
    with pytest.raises(ValueError, match="model.norm.weight holds"):     # none in fp32
        load(folder)


@pytest.mark.parametrize("dtype, word", [
    (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL"),
    (torch.uint8, "U8"), (torch.int64, "I64"), (torch.float8_e5m2, "F8_E5M2")])
def test_tensors_without_their_scales_are_refused(folder, dtype, word):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(ValueError, match=f"{name} is stored as {word}"):
        load(folder)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


@pytest.mark.parametrize("key, value", [
    *[("rms_norm_eps", v) for v in (0, -1e-5, 1, 1.5, "1e-5", True, [1])],
    *[("rope_theta", v) for v in (0, -1.0, "10000", True, 1e999, 10**400)],
    *[("head_dim", v) for v in (0, -8, 7, 8.0, "8", True)],
    *[("tie_word_embeddings", v) for v in (0, 1, "true", [])],
    ("max_position_embeddings", 0), ("vocab_size", 10**40), ("hidden_size", True),
    ("layer_types", 3)])
def test_numbers_that_make_no_model_are_refused(folder, key, value):
    raw = json.loads((folder / "config.json").read_text())
    text = json.dumps({**raw, key: value}).replace("Infinity", "1e999")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=key) as caught:
        load_config(folder)
    assert str(folder / "config.json") in str(caught.value) and str(caught.value).count("\n") < 3


@pytest.mark.parametrize("key, value", [
    ("factor", 0.5), ("factor", -8), ("factor", "8"), ("factor", True), ("low_freq_factor", 0),
    ("low_freq_factor", "1"), ("high_freq_factor", 1.0), ("high_freq_factor", 0.5),
    ("high_freq_factor", "4"), ("original_max_position_embeddings", 0), ("rope_theta", 0)])
@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_that_stretches_nothing_is_refused(folder, where, key, value):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, where: LLAMA3}))
    assert load_config(folder).rope_scaling == LLAMA3
    (folder / "config.json").write_text(json.dumps({**raw, where: {**LLAMA3, key: value}}))
    with pytest.raises(ValueError, match=key):
        load_config(folder)


@pytest.mark.parametrize("text", [
    '{"attention_dropout": NaN, ', '{"attention_dropout": -Infinity, ',
    '{"rope_theta": 7.0, "rope_theta": 8.0, '])
def test_a_config_with_nan_or_a_key_twice_is_refused(folder, text):
    (folder / "config.json").write_text(text + (folder / "config.json").read_text().strip()[1:])
    with pytest.raises(ValueError, match="is not JSON"):
        load_config(folder)


def test_what_a_config_leaves_out_is_what_transformers_takes(folder):
    transformers = pytest.importorskip("transformers")
    raw = json.loads((folder / "config.json").read_text())
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        less = {key: value for key, value in raw.items()
                if key not in ("head_dim", "rms_norm_eps", "rope_theta")}
        (folder / "config.json").write_text(json.dumps({**less, "model_type": family}))
        ours, theirs = load_config(folder), transformers.AutoConfig.from_pretrained(folder)
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32 // 4)


# ---- ties, and keys that follow from the config ----

def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path, tokenizer_folder):
    """transformers warns and does not tie: one of the two would be trained, the other saved."""
    for shard_bytes in (5 * 10**9, 20_000):
        save(random_model(tie_word_embeddings=True), tmp_path, tokenizer_folder,
             shard_bytes=shard_bytes)
        (tmp_path / INDEX).unlink(missing_ok=True)
        tensors = {}
        for path in tmp_path.glob("model*.safetensors"):
            tensors |= load_file(path)
            path.unlink()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][5, 5] += 1e-3
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError,
                           match="lm_head.weight differs from model.embed_tokens.weight"):
            load(tmp_path)
        # A ScalarModel has no such head.
        assert load(tmp_path, ScalarModel).score.weight.abs().sum() == 0


def test_rotary_tables_of_old_folders_are_ignored(folder):
    rewrite(folder, lambda t: t.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.int32)}))
    assert load(folder) and load(folder, ScalarModel)
    rewrite(folder, lambda t: t.update({"model.inv_freq": torch.ones(4)}))
    with pytest.raises(ValueError, match="unused model.inv_freq"):
        load(folder)


# ---- as others load it ----

@pytest.mark.parametrize("pad_token", ["<|pad|>", "<|end|>", None])
def test_padded_rows_score_the_same_in_transformers(tmp_path, tokenizer_folder, pad_token):
    transformers = pytest.importorskip("transformers")
    source = shutil.copytree(tokenizer_folder, tmp_path / "source")
    raw = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**raw, "pad_token": pad_token}))
    (source / "config.json").write_text(json.dumps({"eos_token_id": 3, "pad_token_id": 3}))
    ours, tokenizer = random_model(ScalarModel, vocab_size=512), Tokenizer(source)
    torch.nn.init.normal_(ours.score.weight)
    save(ours, tmp_path / "rm", source)
    texts = ["Ann has 14 pens.", "Ann has 14 pens. Ben has 3."]
    rows = [tokenizer.prompt_ids(text) + tokenizer.encode("17") + [tokenizer.eos_ids[0]]
            for text in texts]
    want = score_sequences(ours, rows)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", dtype=torch.float32)
    encoder = transformers.AutoTokenizer.from_pretrained(tmp_path / "rm")
    batch = encoder.pad({"input_ids": rows}, padding=True, return_tensors="pt",
                        padding_side="right")
    assert len(rows[0]) < len(rows[1]) and theirs.config.pad_token_id == encoder.pad_token_id
    with torch.no_grad():
        got = theirs(**batch).logits[:, 0]
    assert (got - torch.tensor(want)).abs().max() <= 1e-4
    assert Tokenizer(tmp_path / "rm").pad_id == tokenizer.pad_id


def test_a_saved_base_model_stops_at_the_turns_end_for_others_too(tmp_path, tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    source = shutil.copytree(tokenizer_folder, tmp_path / "source")
    theirs = {"eos_token_id": 1, "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(theirs))
    save(random_model(vocab_size=512), tmp_path / "sft", source)
    raw = json.loads((tmp_path / "sft" / "generation_config.json").read_text())
    assert raw == {"eos_token_id": [3, 1], "temperature": 0.6, "do_sample": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [3, 1]
    assert Tokenizer(tmp_path / "sft").eos_ids == Tokenizer(source).eos_ids
    (source / "generation_config.json").unlink()
    save(random_model(vocab_size=512), tmp_path / "sft2", source)
    raw = json.loads((tmp_path / "sft2" / "generation_config.json").read_text())
    assert raw == {"eos_token_id": [3]}


def test_a_template_that_prints_the_padding_keeps_its_own(tmp_path, tokenizer_folder):
    source = shutil.copytree(tokenizer_folder, tmp_path / "source")
    raw = {"pad_token": "<|end|>", "eos_token": "<|end|>",
           "chat_template": "{{ messages[0].content }}{{ pad_token }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(raw))
    save(random_model(vocab_size=512), tmp_path / "sft", source)
    assert Tokenizer(tmp_path / "sft").prompt_ids("x") == Tokenizer(source).prompt_ids("x")


def test_the_saved_folder_has_the_tokenizers_files(folder, tokenizer_folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    theirs = json.loads((tokenizer_folder / "generation_config.json").read_text())
    ours = json.loads((folder / "generation_config.json").read_text())
    assert ours == {**theirs, "eos_token_id": [3]}
