"""An HF folder in, an HF folder out: config.json, safetensors (one file, or shards with an index), tokenizer files.

`load` is a copy by name: a key that is missing, left over or of the wrong shape is an error that names it. Weights are read tensor
by tensor into their place, and never unpickled. `save` writes what transformers loads as its model of the same family; each file is complete or absent, and the weights come last, so a folder with weights is whole.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanodistill.model import CausalLM, Config, ScalarModel
from nanodistill.tokenizer import FILES as TOKENIZER_FILES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TINY = Path(__file__).parent.parent / "data" / "tiny"            # a folder with the folders "teacher" and "student"
PRESETS = {"135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "0.5b": "Qwen/Qwen2.5-0.5B-Instruct", "1b": "meta-llama/Llama-3.2-1B-Instruct",
           "3b": "meta-llama/Llama-3.2-3B-Instruct", "8b": "meta-llama/Llama-3.1-8B-Instruct"}


def write_atomic(path, data):
    """Write bytes or text beside `path`, flush it to disk, and rename: readers see the old file or the whole new one."""
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def resolve(name, role, revision=""):
    """The folder that a `--student` or `--teacher` value means: a preset, a folder, or a hub name ("org/model"), which is downloaded.

    `role` is "student" or "teacher". Downloads show their progress, go on where they broke off, and are kept in the hub's cache
    (HF_HOME; HF_HUB_OFFLINE=1 reads that alone). Exits with what to do where the hub does not give the model.
    """
    if name == "tiny":
        return TINY / role
    if (Path(name) / "config.json").exists():
        return Path(name)
    repository = PRESETS.get(name, name)
    if Path(name).exists() or repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        sys.exit(f"--{role} {name}: not a preset (tiny, {', '.join(PRESETS)}), not a folder with a config.json, and not a hub name (organisation/model).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*TOKENIZER_FILES, "config.json", "model*.safetensors", INDEX]))
    except GatedRepoError:
        sys.exit(f"{repository} is gated. 1. Ask for access at https://huggingface.co/{repository} and wait for the mail that grants it. "
                 "2. Log in on this machine: hf auth login (or set HF_TOKEN). Then run the same command.")
    except RepositoryNotFoundError:
        sys.exit(f"--{role} {name}: the hub has no model {repository}, or it is private: hf auth login (or set HF_TOKEN).")
    except RevisionNotFoundError:
        sys.exit(f"--{role} {name}: {repository} has no revision {revision!r}.")
    except LocalEntryNotFoundError as error:
        sys.exit(f"--{role} {name}: {repository} is not in the hub's cache and cannot be downloaded: {error}")


# What a config may ask for, where transformers' models of these families would compute something else. A key that is absent or null asks for nothing.
KNOWN = {"model_type": ("llama", "mistral", "qwen2", "qwen3"), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1,),
         "use_sliding_window": (False,), "partial_rotary_factor": (1.0,), "rope_interleaved": (False,), "num_experts": (0,), "num_local_experts": (0,),
         "attn_logit_softcapping": (), "final_logit_softcapping": (), "quantization_config": (), "is_encoder_decoder": (False,)}
ROPE = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def load_config(folder):
    """config.json -> Config. Raises ValueError that names what the model does not compute, rather than compute something else."""
    raw = {key: value for key, value in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).items() if value is not None}
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind, family, positions = rope.get("rope_type", rope.get("type", "default")), raw.get("model_type"), raw.get("max_position_embeddings", 2048)
    wrong = [f"{key} = {raw[key]!r}" for key, known in KNOWN.items() if key in raw and raw[key] not in known]
    wrong += [f"rope_type = {kind!r}"] * (kind not in ("default", "llama3")) + [f"rope {key}" for key in sorted(rope.keys() - ROPE)]
    wrong += [f"layer_types with {kinds}" for kinds in sorted({*raw.get("layer_types", [])} - {"full_attention"})]
    if family == "mistral" and raw.get("sliding_window", positions) < positions:
        wrong.append(f"sliding_window = {raw['sliding_window']}")
    if wrong or not family:
        raise ValueError(f"{folder}/config.json asks for what this model does not do: {', '.join(wrong) or 'it names no model_type'}")
    heads = raw["num_attention_heads"]
    return Config(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads", heads) if family == "llama" else raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6), rope_theta=raw.get("rope_theta") or rope.get("rope_theta", 10000.0),
        rope_scaling=rope if kind == "llama3" else None, max_position_embeddings=positions,
        tie_word_embeddings=raw.get("tie_word_embeddings", False), model_type=family)


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
        "architectures": [config.model_type.capitalize() + ("ForCausalLM" if isinstance(model, CausalLM) else "ForSequenceClassification")],
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None, **vars(config),
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
