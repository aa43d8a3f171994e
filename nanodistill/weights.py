"""An HF folder in, an HF folder out: config.json, safetensors (one file, or shards with an index), tokenizer files.

`load` is a copy by name: a key that is missing, left over or of the wrong shape is an error that names it. Weights are read tensor
by tensor into their place, and never unpickled. `save` writes what transformers loads as LlamaForCausalLM or
LlamaForSequenceClassification; each file is complete or absent, and the weights come last, so a folder with weights is whole.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanodistill.model import CausalLM, Config, ScalarModel
from nanodistill.tokenizer import FILES as TOKENIZER_FILES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PRESETS = {"tiny": Path(__file__).parent.parent / "data" / "tiny"}  # a folder with the folders "teacher" and "student"


def write_atomic(path, data):
    """Write bytes or text beside `path`, flush it to disk, and rename: readers see the old file or the whole new one."""
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def resolve(name, role):
    """The folder a `--student` or `--teacher` value means: a preset, or a folder. `role` is "student" or "teacher"."""
    folder = PRESETS[name] / role if name in PRESETS else Path(name)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"--{role} {name}: neither a preset ({', '.join(PRESETS)}) nor a folder with a config.json.")
    return folder


def load_config(folder):
    """config.json -> Config. Raises ValueError for what the model does not compute, rather than compute something else."""
    raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    expected = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
    wrong = [f"{key} = {raw[key]!r}" for key, known in expected.items() if raw.get(key, known[0]) not in known]
    if kind not in ("default", "llama3"):
        wrong.append(f"rope_type = {kind!r}")
    if wrong:
        raise ValueError(f"{folder}/config.json asks for what this model does not do: {', '.join(wrong)}")
    heads = raw["num_attention_heads"]
    return Config(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6), rope_theta=raw.get("rope_theta") or rope.get("rope_theta", 10000.0),
        rope_scaling=rope if kind == "llama3" else None,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        tie_word_embeddings=raw.get("tie_word_embeddings", False))


def _files(folder):
    """{parameter name: file} of a folder, from its index or its single file. No file may lie outside the folder."""
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        for name in set(names.values()):
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{folder / INDEX}: {name!r} leads out of the folder")
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder / INDEX} names {name}, which is not there")
        return {key: folder / name for key, name in names.items()}
    if not (folder / SINGLE).exists():
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}")
    with safe_open(folder / SINGLE, "pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def load(folder, kind=CausalLM, device="cpu", dtype=torch.float32):
    """The model of an HF folder, in evaluation mode.

    Args:
        kind: CausalLM or ScalarModel. A ScalarModel may be loaded from a causal LM's folder: its head starts at zero.
        dtype: of the stored parameters; torch.float32 for what will be trained.
    Raises:
        ValueError: keys missing, left over or misshapen (all are named), or a config this model does not compute.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = kind(load_config(folder))
    wanted = dict(model.named_parameters())                      # a tied head is listed once, as the embedding
    files = _files(folder)
    fresh_head = kind is ScalarModel and "score.weight" not in files
    skipped = {"lm_head.weight"} if fresh_head or (kind is CausalLM and model.config.tie_word_embeddings) else set()
    missing = sorted(wanted.keys() - files.keys() - ({"score.weight"} if fresh_head else set()))
    unused = sorted(files.keys() - wanted.keys() - skipped)
    problems = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unused {', '.join(unused)}"] * bool(unused)
    loaded = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in (n for n, p in files.items() if p == path and n in wanted):
                tensor = file.get_tensor(name)
                if tensor.shape != wanted[name].shape:
                    problems.append(f"{name} has shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}")
                loaded[name] = tensor.to(device, dtype)
    if problems:
        raise ValueError(f"{folder} does not fit {kind.__name__}: {'; '.join(problems)}")
    if fresh_head:
        loaded["score.weight"] = torch.zeros(wanted["score.weight"].shape, device=device, dtype=dtype)
    model.load_state_dict(loaded, strict=False, assign=True)
    if kind is CausalLM and model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True).eval()


def save(model, folder, tokenizer_from, dtype=None, shard_bytes=5 * 10**9):
    """Write `model` as an HF folder, with the tokenizer files of the folder `tokenizer_from`.

    `dtype` torch.bfloat16 stores the weights in bf16. Above `shard_bytes` they go into several files with an index.
    """
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(tokenizer_from)
    for name in TOKENIZER_FILES:
        if (source / name).exists() and source.resolve() != folder.resolve():
            write_atomic(folder / name, (source / name).read_bytes())
    tensors = {name: p.detach().to("cpu", dtype or p.dtype).contiguous() for name, p in model.named_parameters()}

    special = json.loads((source / "config.json").read_text(encoding="utf-8")) if (source / "config.json").exists() else {}
    raw = {
        "architectures": ["LlamaForCausalLM" if isinstance(model, CausalLM) else "LlamaForSequenceClassification"],
        "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, **vars(config),
        "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        **{key: special[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in special}}
    if isinstance(model, ScalarModel):
        raw["id2label"] = {"0": "score"}                        # one label: how transformers says one output
    write_atomic(folder / "config.json", json.dumps(raw, indent=2) + "\n")

    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        beside = folder / (name + ".partial")
        save_file(shard, beside, metadata={"format": "pt"})
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, folder / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    for stale in {SINGLE, INDEX} - {*names, *([INDEX] if len(shards) > 1 else [])}:
        (folder / stale).unlink(missing_ok=True)                 # of an earlier save with another sharding
