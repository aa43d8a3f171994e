"""An HF folder in, an HF folder out: config.json, safetensors (one file, or shards with an index),
tokenizer files.

`load` copies by name: a key that is missing, left over or of the wrong shape is an error that names
it. Weights are read one tensor at a time, and never unpickled. `save` writes what transformers
loads as its model of the same family. Each file is complete or absent, and the weights come last,
so a folder with weights is whole.
"""

import functools
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanodistill import lora, losses, parallel
from nanodistill.files import write_together
from nanodistill.model import CausalLM, Config, ScalarModel
from nanodistill.tokenizer import Tokenizer, read_json


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


# ---- config.json ----

# What a config may ask for, where transformers' models of these families would compute something
# else. A key that is absent or null asks for nothing.
KNOWN = {"model_type": ("llama", "mistral", "qwen2", "qwen3"), "hidden_act": ("silu",),
         "attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1,),
         "use_sliding_window": (False,), "partial_rotary_factor": (1.0,),
         "rope_interleaved": (False,), "num_experts": (0,), "num_local_experts": (0,),
         "attn_logit_softcapping": (), "final_logit_softcapping": (), "quantization_config": (),
         "is_encoder_decoder": (False,)}
STRETCH = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE = {"rope_type", "type", "rope_theta", *STRETCH}
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads")


def load_config(folder):
    """config.json -> Config.

    Raises ValueError of one line that names the file and what is wrong in it: no JSON, a key that
    is missing or no size, or something that the model does not compute (rather than compute
    something else). FileNotFoundError if there is no such file.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    raw = read_json(path)
    raw = {key: value for key, value in raw.items() if value is not None}
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: its rope_scaling is not an object: {rope!r}")
    rope = {key: value for key, value in rope.items() if value is not None}
    family, positions = raw.get("model_type"), raw.get("max_position_embeddings", 2048)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    wrong = [f"{key} = {raw[key]!r}" for key, known in KNOWN.items()
             if key in raw and raw[key] not in known]
    if rope_type not in ("default", "llama3"):
        wrong.append(f"rope_type = {rope_type!r}")
    wrong += [f"rope {key}" for key in sorted(rope.keys() - ROPE)]
    layers = raw.get("layer_types", [])
    layers = {*map(str, layers if isinstance(layers, list) else [layers])}
    wrong += [f"layer_types with {layer}" for layer in sorted(layers - {"full_attention"})]
    window = raw.get("sliding_window", positions)
    if family == "mistral" and (not _within(window, 0) or _within(positions, window)):
        wrong.append(f"sliding_window = {window!r}")
    if wrong or not family:
        raise ValueError(f"{path} asks for what this model does not do: "
                         f"{', '.join(wrong) or 'it names no model_type'}")

    # A llama that names no key-value heads has as many as attention heads.
    if family == "llama":
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    stretch = STRETCH if rope_type == "llama3" else ()
    missing = [key for key in SHAPE if key not in raw]
    missing += [f"{key} of rope_scaling" for key in stretch if key not in rope]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    sizes = {"max_position_embeddings": positions,
             **{key: raw[key] for key in (*SHAPE, "head_dim") if key in raw}}
    wrong = [f"{key} = {value!r}" for key, value in sizes.items()
             if type(value) is not int or not 0 < value < 2**31]
    if wrong:
        raise ValueError(f"{path}: not a whole number above 0: {', '.join(wrong)}")
    heads, groups = raw["num_attention_heads"], raw["num_key_value_heads"]
    if heads % groups:
        raise ValueError(f"{path}: {heads} num_attention_heads do not share "
                         f"{groups} num_key_value_heads evenly")
    sizes.setdefault("head_dim", 128 if family == "qwen3" else raw["hidden_size"] // heads)
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    eps, tied = raw.get("rms_norm_eps", 1e-6), raw.get("tie_word_embeddings", False)
    least = {"factor": 1 - 1e-9, "high_freq_factor": rope.get("low_freq_factor")}
    sound = {"rms_norm_eps": (eps, _within(eps, 0, 1)), "rope_theta": (theta, _within(theta, 0)),
             "tie_word_embeddings": (tied, type(tied) is bool),
             "head_dim": (sizes["head_dim"], sizes["head_dim"] % 2 == 0 < sizes["head_dim"]),
             **{key: (rope[key], _within(rope[key], least.get(key, 0))) for key in stretch}}
    wrong = [f"{key} = {value!r}" for key, (value, right) in sound.items() if not right]
    if wrong:
        raise ValueError(f"{path}: no such model can be computed: {', '.join(wrong)}")
    return Config(**sizes, rms_norm_eps=eps, rope_theta=theta, tie_word_embeddings=tied,
                  rope_scaling=rope if stretch else None, model_type=family)


def _within(value, low, high=1e30):
    """Is a value from JSON a number (True is none) between two others?"""
    return type(value) in (int, float) and type(low) in (int, float) and low < value < high


# ---- weights ----

def _files(folder):
    """{parameter name: file} of a folder, from its index or its single file.

    Raises ValueError where a file lies outside the folder, or is not as long as its header says.
    """
    index, held = folder / INDEX, {}                             # {file name: its parameters}
    if not index.exists() and not (folder / SINGLE).exists():
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}")
    names = read_json(index).get("weight_map") if index.exists() else {"": SINGLE}
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} names no weights")
    for name in sorted({str(name) for name in names.values()}):
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index}: {name!r} leads out of the folder")
        if not (folder / name).exists():
            raise FileNotFoundError(f"{index} names {name}, which is not there")
        try:
            with safe_open(folder / name, "pt") as file:
                held[name] = set(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from None
    return {key: folder / name for name, keys in held.items() for key in keys}


def complete(folder):
    """Does `folder` hold a whole model: its config, and one file of weights or all that its index
    names?"""
    folder = Path(folder)
    try:
        return (folder / "config.json").exists() and bool(_files(folder))
    except (OSError, ValueError):
        return False


def on_host(model):
    """{name: a copy on the CPU} of what is trained of a model, a tied head once: for
    `load_state_dict(..., strict=False)`."""
    return {name: p.detach().to("cpu", copy=True) for name, p in lora.trained(model).items()}


def load(folder, kind=CausalLM, device="cpu", dtype=torch.float32, shards=1, arithmetic=None):
    """The model of an HF folder, in evaluation mode.

    Args:
        kind: CausalLM or ScalarModel. A ScalarModel may be loaded from a causal LM's folder: its
            head starts at zero.
        dtype: of the stored parameters; torch.float32 for what will be trained.
        shards: processes that the weights are split over (parallel.shard), each tensor as it is
            read: none ever holds a whole model. arithmetic: its dtype then; None: `dtype`.
    Raises:
        ValueError: keys missing, left over or misshapen (all are named), or a config this model
            does not compute.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = kind(load_config(folder))
    parallel.shard(model, shards, device, arithmetic or dtype)
    # A tied head may be stored too: it must be the embedding.
    wanted = dict(model.named_parameters(remove_duplicate=False))
    files = _files(folder)
    fresh_head = kind is ScalarModel and "score.weight" not in files
    tied = kind is CausalLM and model.config.tie_word_embeddings
    optional = {"score.weight"} if fresh_head else {"lm_head.weight"} if tied else set()
    missing = sorted(wanted.keys() - files.keys() - optional)
    unused = sorted(name for name in files.keys() - wanted.keys() if not (
        name == "lm_head.weight" and fresh_head or name.endswith("rotary_emb.inv_freq")))
    problems, loaded = [], {}
    if missing:
        problems.append(f"missing {', '.join(missing)}")
    if unused:
        problems.append(f"unused {', '.join(unused)}")
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in (n for n, p in files.items() if p == path and n in wanted):
                stored = file.get_slice(name).get_dtype()
                if stored not in ("F32", "BF16", "F16", "F64"):
                    problems.append(f"{name} is stored as {stored}: no weights, or quantised")
                    continue
                tensor = file.get_tensor(name)
                if tensor.shape != wanted[name].shape:
                    problems.append(f"{name} has shape {tuple(tensor.shape)}, "
                                    f"not {tuple(wanted[name].shape)}")
                tensor = tensor.to(device, dtype)
                loaded[name] = parallel.like(tensor, wanted[name])
                # The sum is quick, and a number that is not finite spoils it. But large finite ones
                # may overflow it too, so then each is looked at.
                if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
                    problems.append(f"{name} holds NaN or infinite numbers")
    pair = [parallel.whole(loaded[name]) for name in ("lm_head.weight", "model.embed_tokens.weight")
            if tied and name in loaded]
    if len(pair) == 2 and not torch.equal(*pair):
        problems.append("lm_head.weight differs from model.embed_tokens.weight, though config.json "
                        "ties them (tie_word_embeddings)")
    if problems:
        raise ValueError(f"{folder} does not fit {kind.__name__}: {'; '.join(problems)}")
    if fresh_head:
        head = wanted["score.weight"]
        loaded["score.weight"] = parallel.like(
            torch.zeros(head.shape, device=device, dtype=dtype), head)
    model.load_state_dict(loaded, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    # On CUDA launching a layer's small kernels takes longer than its arithmetic.
    model.model.compiled = torch.device(device).type == "cuda" and not losses.no_compiler("cuda")
    return model.requires_grad_(True).eval()


def load_to_train(folder, kind, device, dtype, rank=0, shards=1):
    """The model of a folder for training, with arithmetic in `dtype`: fp32 weights; or, with a
    `rank`, frozen ones in `dtype` and new adapters in fp32. shards: as `load` takes it."""
    model = load(folder, kind, device, dtype if rank else torch.float32, shards, dtype)
    model.model.dtype = dtype
    return lora.adapt(model, rank) if rank else model


def save(model, folder, tokenizer_from, dtype=None, shard_bytes=5 * 10**9, base=""):
    """Write `model`, its adapters merged, as an HF folder, with the tokenizer files of the folder
    `tokenizer_from`. They name the stop tokens and the padding of our Tokenizer, so that other
    programs use the same.

    `dtype` torch.bfloat16 stores the weights in bf16. Above `shard_bytes` they go into several
    files with an index. If writing fails, the weights that were there stay. If it is cut off while
    the new files are renamed, the folder is not `complete`. Adapters are written first, beside the
    weights that they are merged into; `base` names their trunk. Of several processes the first
    writes, and the others wait until all is there.
    """
    tensors = {}
    for name, p in lora.merged(model) if parallel.splits() or parallel.rank() == 0 else ():
        p = parallel.whole(p)
        if parallel.rank() == 0:
            tensors[name] = p.to("cpu", dtype or p.dtype).contiguous()
    if parallel.rank() == 0:
        write(model, tensors, folder, tokenizer_from, base, shard_bytes)
    parallel.gather(None)


def write(model, tensors, folder, tokenizer_from, base="", shard_bytes=5 * 10**9):
    """What `save` does in one process, with the {name: tensor on the CPU} of the merged model."""
    folder, source, config = Path(folder), Path(tokenizer_from), model.config
    folder.mkdir(parents=True, exist_ok=True)
    if any(isinstance(module, lora.LoRALinear) for module in model.modules()):
        save_adapter(model, folder / ADAPTER, base)

    tokenizer = Tokenizer(source)
    files, pad = tokenizer.files(), tokenizer.pad_id
    ids = {"eos_token_id": tokenizer.eos_ids,
           "pad_token_id": pad if pad < config.vocab_size else None,
           "bos_token_id": read_json(source / "config.json").get("bos_token_id")}
    task = "ForCausalLM" if isinstance(model, CausalLM) else "ForSequenceClassification"
    raw = {
        "architectures": [config.model_type.capitalize() + task], "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "sliding_window": None, **vars(config),
        "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."), **ids}
    if isinstance(model, ScalarModel):
        raw["id2label"] = {"0": "score"}                 # one label: transformers' one output
    files["config.json"] = json.dumps(raw, indent=2) + "\n"

    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        files[name] = functools.partial(save_file, shard, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
        files[INDEX] = json.dumps(index, indent=2) + "\n"
    # What makes an earlier save complete is deleted first; the last file of weights completes this.
    shards = sorted(folder.glob("model-?????-of-?????.safetensors*"))
    shards = [path for path in shards if path.name.removesuffix(".partial") not in files]
    write_together(folder, files, [folder / SINGLE, folder / INDEX, *shards])


# ---- adapters, in PEFT's format ----

# In a folder of its own: programs that find an adapter beside weights apply it to them once more.
ADAPTER = "adapter"
PREFIX = "base_model.model."               # what PEFT puts before a parameter's name


def save_adapter(model, folder, base):
    """Write what is trained of a model with adapters, as PEFT writes it.

    base: name or path of the trunk's weights.
    """
    layers = {name.rpartition(".")[2]: module for name, module in model.named_modules()
              if isinstance(module, lora.LoRALinear)}
    rank, scale = next((m.lora_A.out_features, m.scale) for m in layers.values())
    causal = isinstance(model, CausalLM)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if causal else "SEQ_CLS",
              "base_model_name_or_path": str(base), "r": rank, "lora_alpha": scale * rank,
              "target_modules": sorted(layers), "lora_dropout": 0.0, "bias": "none",
              "modules_to_save": None if causal else ["score"], "inference_mode": True}
    tensors = {PREFIX + name: p.detach().to("cpu", copy=True)
               for name, p in lora.trained(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_together(folder, {
        "adapter_config.json": json.dumps(config, indent=2) + "\n",
        "adapter_model.safetensors": functools.partial(save_file, tensors,
                                                       metadata={"format": "pt"})})


def load_adapter_config(folder):
    """adapter_config.json -> (rank, alpha, name of the base, its revision).

    Raises ValueError for what is not LoRA as it is here, FileNotFoundError where a file is missing.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} has no {name}")
    config = read_json(folder / "adapter_config.json")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    wrong = [f"{key} = {config[key]!r}" for key in ("use_rslora", "use_dora", "rank_pattern",
                                                    "alpha_pattern", "fan_in_fan_out")
             if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        wrong.append("it is not LoRA without biases")
    if type(rank) is not int or not 0 < rank <= 4096 or not _within(alpha, 0):
        wrong.append(f"r = {rank!r}, lora_alpha = {alpha!r}")
    if wrong:
        raise ValueError(f"{folder / 'adapter_config.json'}: {', '.join(wrong)}: not known here")
    return rank, alpha, str(config.get("base_model_name_or_path")), config.get("revision") or ""


def load_adapter(folder, trunk, kind=CausalLM):
    """A model of `kind` on the frozen weights of the CausalLM `trunk`, with the adapters, and the
    head, of a folder that `save_adapter` or PEFT wrote.

    Raises ValueError where they do not fit, FileNotFoundError where there are none.
    """
    folder = Path(folder)
    rank, alpha, *_ = load_adapter_config(folder)
    model = lora.adapt(stand_on(trunk, kind), rank, alpha)
    wanted, loaded = lora.trained(model), {}
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            for name in file.keys():
                loaded[name.removeprefix(PREFIX)] = file.get_tensor(name).float()
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights are damaged: {error}") from None
    problems = [f"{name} is left over" for name in sorted(loaded.keys() - wanted.keys())]
    # Layers that have no adapter keep their B of zero: they are the trunk's.
    problems += [f"{name} has shape {tuple(p.shape)}, not {tuple(wanted[name].shape)}"
                 for name, p in loaded.items() if name in wanted and p.shape != wanted[name].shape]
    problems += [f"{name} holds NaN or infinite numbers" for name, p in loaded.items()
                 if not p.isfinite().all()]
    if kind is ScalarModel and "score.weight" not in loaded:
        problems.append("score.weight is missing")
    if problems:
        raise ValueError(f"{folder} does not fit its trunk: {'; '.join(problems)}")
    model.load_state_dict(loaded, strict=False)
    return model


def stand_on(trunk, kind):
    """A model of `kind` of the same tensors as the CausalLM `trunk`; a scalar head is zero."""
    if kind is CausalLM:
        return lora.share(trunk)
    with torch.device("meta"):
        model = ScalarModel(trunk.config)
    model.model = lora.share(trunk.model)
    model.score.weight = torch.nn.Parameter(
        torch.zeros(1, trunk.config.hidden_size, device=trunk.head.device))
    return model
