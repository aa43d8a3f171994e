"""An HF folder in, an HF folder out: config.json, safetensors (one file, or shards with an index),
tokenizer files.

`resolve` turns a name into such a folder, which it fetches from the hub where need be. `load` is a
copy by name: a key that is missing, left over or of the wrong shape is an error that names it.
Weights are read tensor by tensor into their place, and never unpickled. `save` writes what
transformers loads as its model of the same family; each file is complete or absent, and the weights
come last, so a folder with weights is whole.
"""

import errno
import json
import os
import queue
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanodistill.model import CausalLM, Config, ScalarModel
from nanodistill.presets import SIZES, STUDENTS
from nanodistill.tokenizer import FILES as TOKENIZER_FILES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = "model*.safetensors"                                   # of the files on the hub
TINY = Path(__file__).parent.parent / "data" / "tiny"            # folders "teacher" and "student"


def write_atomic(path, data):
    """Write bytes or text beside `path`, flush it to disk, and rename: readers see the old file or
    the whole new one."""
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


# ---- the hub ----

def resolve(name, role, revision="", weights=True):
    """The folder that a `--student` or `--teacher` value means.

    Args:
        name: "tiny", a preset, a folder with a config.json, or a hub name ("org/model").
        role: the flag without its dashes: "student", "teacher" or "models".
        revision: branch, tag or commit on the hub; "" = its main branch.
        weights: False fetches config.json and the tokenizer's files alone. That is a cheap check
            of access: it fails where the weights could not be had.

    What is fetched is kept in the hub's cache (HF_HOME; HF_HUB_OFFLINE=1 reads that alone). Where
    the hub fails, a whole copy in the cache is used, and a line says so.
    Raises SystemExit with at most three lines: what is wrong, the way out, what needs no access.
    """
    flag = f"--{role} {name}"
    if name == "tiny":
        if role not in ("student", "teacher"):
            sys.exit(f"{flag}: there are two tiny models: name {TINY / 'teacher'} "
                     f"or {TINY / 'student'}.")
        return TINY / role
    if (Path(name) / "config.json").exists():
        return Path(name)
    repository = _repository(name)
    if not repository:
        presets = STUDENTS if role == "student" else ("tiny", *SIZES)
        sys.exit(f"{flag}: not a preset ({', '.join(presets)}), not a folder with a config.json, "
                 "and not a hub name (organisation/model).")
    from huggingface_hub import snapshot_download
    asked = False
    try:
        _ask(repository, revision)
        asked = True
        folder = Path(snapshot_download(repository, revision=revision or None,
                                        allow_patterns=_patterns(weights)))
        missing = _missing(folder, weights)
        if missing:
            sys.exit(f"{flag}: {repository} has no {missing[0]} on the hub. This reads safetensors "
                     "and tokenizer.json alone.\nSave it with transformers' save_pretrained, and "
                     f"name that folder: --{role} FOLDER.")
        return folder
    except Exception as error:
        folder, missing = _cached(repository, revision)
        what, way = _explain(error, asked, role, name, repository, revision, missing)
        if folder and not missing:
            if not _offline():                                   # which is what was asked for
                print(f"{what} Taken from the cache: {folder}", flush=True)
            return folder
        free = [f"--student {size}" for size in STUDENTS if size in SIZES and not SIZES[size].gated]
        sys.exit(f"{what}\n{way}\nWithout access: {' or '.join(free)}; "
                 "without network too: --student tiny.")


def bytes_to_fetch(name, revision=""):
    """Bytes of the weights that `resolve(name, ...)` would download: 0 for what is in the cache, a
    folder or "tiny", and where the hub cannot be asked."""
    local = name == "tiny" or (Path(name) / "config.json").exists()
    repository = "" if local else _repository(name)
    if not repository:
        return 0
    from huggingface_hub import constants, try_to_load_from_cache
    try:
        info = _ask(repository, revision)
    except Exception:
        return 0
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "blobs"
    total = 0
    for file in info.siblings or ():
        if fnmatch(file.rfilename, WEIGHTS):
            here = try_to_load_from_cache(repository, file.rfilename, revision=info.sha)
            same = file.lfs and (blobs / file.lfs.sha256).exists()       # of an earlier commit
            total += 0 if isinstance(here, str) or same else file.size or 0
    return total


def _repository(name):
    """The hub's name of a preset, or of "organisation/model"; "" if it is neither."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    if name in SIZES:
        return SIZES[name].repository
    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    return name if name.count("/") == 1 and not Path(name).exists() else ""


def _patterns(weights):
    return [*TOKENIZER_FILES, "config.json", *([WEIGHTS, INDEX] if weights else [])]


def _offline():
    from huggingface_hub import constants
    return constants.is_offline_mode()


_silent = set()                                                  # endpoints that did not answer


def _ask(repository, revision):
    """The hub's ModelInfo of a repository: its commit, its files and their sizes.

    Raises within seconds, whatever the network does: what huggingface_hub raises, also where the
    files are not for us (anybody may list a gated repository), or TimeoutError. A socket's limit
    is not enough: name servers and each of a host's addresses may let it pass once more. A hub
    that did not answer in time is not asked again by this process.
    """
    import httpx2
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
    limit, answers = constants.HF_HUB_ETAG_TIMEOUT, queue.SimpleQueue()
    if constants.ENDPOINT in _silent:
        raise TimeoutError(f"no answer within {limit} seconds")

    def ask():
        try:
            info = HfApi().model_info(repository, revision=revision or None,
                                      files_metadata=True, timeout=limit)
            url = hf_hub_url(repository, "config.json", revision=info.sha)
            get_hf_file_metadata(url, timeout=limit)
            answers.put(info)
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=limit + 2)                  # a socket's own error says more
    except queue.Empty:
        answer = TimeoutError(f"no answer within {limit} seconds")
    if isinstance(answer, (TimeoutError, httpx2.TimeoutException)):
        _silent.add(constants.ENDPOINT)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _missing(folder, weights=True):
    """Names of the files that a snapshot lacks and `load` or the tokenizer needs."""
    names = ["config.json", "tokenizer.json"]
    if weights and (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names += sorted(set(index["weight_map"].values()))
    elif weights:
        names.append(SINGLE)
    return [name for name in names if not (folder / name).exists()]


def _cached(repository, revision):
    """(folder in the cache or None, names of what it lacks to be whole)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError
    try:
        folder = snapshot_download(repository, revision=revision or None,
                                   allow_patterns=_patterns(True), local_files_only=True)
        return Path(folder), _missing(Path(folder))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path), _missing(Path(error.snapshot_path)) or ["a file"]
    except Exception:
        return None, []


def _explain(error, asked, role, name, repository, revision, missing):
    """(what is wrong, the way out): a line each. `asked`: the hub had answered before."""
    from huggingface_hub import constants, errors, get_token
    page, flag = f"https://huggingface.co/{repository}", f"--{role} {name}"
    log_in = "hf auth login (or set HF_TOKEN)"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", 0)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, errors.OfflineModeIsEnabled):
        lacks = f"the copy of {repository} in the cache lacks {', '.join(missing[:3])}" if missing \
            else f"{repository} is not in the cache ({constants.HF_HUB_CACHE})"
        return (f"{flag}: HF_HUB_OFFLINE is set, and {lacks}.",
                "Unset it, and the same command downloads what is missing.")
    if isinstance(error, errors.GatedRepoError):
        token = "your token does not open it" if get_token() else "no token is set"
        return (f"{flag}: {repository} is gated, and {token}.",
                f"Ask for access at {page} and wait for the mail that grants it; then {log_in}.")
    if isinstance(error, errors.RevisionNotFoundError):
        which = "--teacher-revision" if role == "teacher" else "--revision"
        return (f"{which} {revision}: {repository} has no such branch, tag or commit.",
                f"Those it has: {page}/commits. Without the flag its main branch is taken.")
    if isinstance(error, errors.EntryNotFoundError) and status:
        return (f"{flag}: {repository} has no config.json on the hub.",
                "Name a model in the form that transformers loads.")
    if status == 401 and get_token():
        return f"{flag}: the hub does not take your token.", f"Log in again: {log_in}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"{flag}: the hub has no model {repository}, or it is private.",
                f"Look for it at {page}; for a private one, {log_in}.")
    if status:
        busy = status == 429 or status >= 500
        way = "Wait a little and give the same command again" if busy else f"See {page}"
        reason = getattr(error, "server_message", "") or error.response.reason_phrase
        return f"{flag}: the hub answers {status}: {reason}.", f"{way}; or {log_in}."
    full = "No space left" in reason                             # so says hf_xet, without a number
    if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES,
                                                 errno.EPERM, errno.EROFS):
        return (f"{flag}: the cache {constants.HF_HUB_CACHE} takes no more: {reason}.",
                "Free space there, or set HF_HOME to another folder. What came whole is kept.")
    if asked:
        return (f"{flag}: the download of {repository} broke off: {reason}.",
                "The same command goes on from there: what came whole is kept.")
    part = f", and the copy in the cache lacks {', '.join(missing[:3])}" if missing else ""
    return (f"{flag}: the hub ({constants.ENDPOINT}) cannot be reached{part}: {reason}.",
            "Check the network and its proxy (HTTPS_PROXY), or name a folder that has the model: "
            f"--{role} FOLDER.")


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
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object")
    raw = {key: value for key, value in raw.items() if value is not None}
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: its rope_scaling is not an object: {rope!r}")
    family, positions = raw.get("model_type"), raw.get("max_position_embeddings", 2048)
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = [f"{key} = {raw[key]!r}" for key, known in KNOWN.items()
             if key in raw and raw[key] not in known]
    wrong += [f"rope_type = {kind!r}"] * (kind not in ("default", "llama3"))
    wrong += [f"rope {key}" for key in sorted(rope.keys() - ROPE)]
    wrong += [f"layer_types with {kinds}"
              for kinds in sorted({*raw.get("layer_types", [])} - {"full_attention"})]
    if family == "mistral" and raw.get("sliding_window", positions) < positions:
        wrong.append(f"sliding_window = {raw['sliding_window']}")
    if wrong or not family:
        raise ValueError(f"{path} asks for what this model does not do: "
                         f"{', '.join(wrong) or 'it names no model_type'}")

    if family == "llama":                                        # where no key-value heads mean
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))    # all of them
    stretch = STRETCH if kind == "llama3" else ()
    missing = [key for key in SHAPE if raw.get(key) is None]
    missing += [f"{key} of rope_scaling" for key in stretch if rope.get(key) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    sizes = {**{key: raw[key] for key in SHAPE}, "max_position_embeddings": positions}
    wrong = [f"{key} = {value!r}" for key, value in sizes.items()
             if type(value) is not int or value < 1]
    if wrong:
        raise ValueError(f"{path}: not a whole number above 0: {', '.join(wrong)}")
    heads, groups = raw["num_attention_heads"], raw["num_key_value_heads"]
    if heads % groups:
        raise ValueError(f"{path}: {heads} num_attention_heads do not share "
                         f"{groups} num_key_value_heads evenly")
    return Config(
        **sizes, head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=raw.get("rope_theta") or rope.get("rope_theta", 10000.0),
        rope_scaling=rope if kind == "llama3" else None,
        tie_word_embeddings=raw.get("tie_word_embeddings", False), model_type=family)


# ---- weights ----

def _files(folder):
    """{parameter name: file} of a folder, from its index or its single file. No file may lie
    outside the folder."""
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


def complete(folder):
    """Does `folder` hold a whole model: its config, and one file of weights or all that its index
    names?"""
    folder = Path(folder)
    try:
        return (folder / "config.json").exists() and bool(_files(folder))
    except (OSError, ValueError, KeyError):
        return False


def on_host(model):
    """{name: a copy on the CPU} of a model's parameters, a tied head once: for
    `load_state_dict(..., strict=False)`."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def load(folder, kind=CausalLM, device="cpu", dtype=torch.float32):
    """The model of an HF folder, in evaluation mode.

    Args:
        kind: CausalLM or ScalarModel. A ScalarModel may be loaded from a causal LM's folder: its
            head starts at zero.
        dtype: of the stored parameters; torch.float32 for what will be trained.
    Raises:
        ValueError: keys missing, left over or misshapen (all are named), or a config this model
            does not compute.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = kind(load_config(folder))
    wanted = dict(model.named_parameters())              # a tied head is listed once, as embedding
    files = _files(folder)
    fresh_head = kind is ScalarModel and "score.weight" not in files
    tied = kind is CausalLM and model.config.tie_word_embeddings
    skipped = {"lm_head.weight"} if fresh_head or tied else set()
    missing = sorted(wanted.keys() - files.keys() - ({"score.weight"} if fresh_head else set()))
    unused = sorted(files.keys() - wanted.keys() - skipped)
    problems = [f"missing {', '.join(missing)}"] * bool(missing)
    problems += [f"unused {', '.join(unused)}"] * bool(unused)
    loaded = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in (n for n, p in files.items() if p == path and n in wanted):
                tensor = file.get_tensor(name)
                if tensor.shape != wanted[name].shape:
                    problems.append(f"{name} has shape {tuple(tensor.shape)}, "
                                    f"not {tuple(wanted[name].shape)}")
                loaded[name] = tensor.to(device, dtype)
    if problems:
        raise ValueError(f"{folder} does not fit {kind.__name__}: {'; '.join(problems)}")
    if fresh_head:
        shape = wanted["score.weight"].shape
        loaded["score.weight"] = torch.zeros(shape, device=device, dtype=dtype)
    model.load_state_dict(loaded, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True).eval()


def save(model, folder, tokenizer_from, dtype=None, shard_bytes=5 * 10**9):
    """Write `model` as an HF folder, with the tokenizer files of the folder `tokenizer_from`.

    `dtype` torch.bfloat16 stores the weights in bf16. Above `shard_bytes` they go into several
    files with an index.
    """
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(tokenizer_from)
    for name in TOKENIZER_FILES:
        if (source / name).exists() and source.resolve() != folder.resolve():
            write_atomic(folder / name, (source / name).read_bytes())
    tensors = {name: p.detach().to("cpu", dtype or p.dtype).contiguous()
               for name, p in model.named_parameters()}

    special, theirs = {}, source / "config.json"
    if theirs.exists():
        special = json.loads(theirs.read_text(encoding="utf-8"))
    kind = "ForCausalLM" if isinstance(model, CausalLM) else "ForSequenceClassification"
    raw = {
        "architectures": [config.model_type.capitalize() + kind], "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "sliding_window": None, **vars(config),
        "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        **{key: special[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
           if key in special}}
    if isinstance(model, ScalarModel):
        raw["id2label"] = {"0": "score"}                 # one label: transformers' one output
    write_atomic(folder / "config.json", json.dumps(raw, indent=2) + "\n")

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
        (folder / stale).unlink(missing_ok=True)         # of an earlier save with other shards
