"""Will it fit? The memory of a stage by part, from the model's config alone: no weights, no card.

Weights, gradients and optimizer state are counted. Activations are measured: the model's own forward and backward pass runs on fake tensors
(`FakeTensorMode`), which have a shape but no memory, and the bytes alive at its highest point are added up. The fake tensors lie on the CPU whatever the
device (a CPU build of PyTorch has no autograd for fake CUDA tensors); what is saved for backward is as on CUDA. What the allocator, kernels and CUDA itself
take besides is not in it, nor the packed weights of sampling in bf16 on CPU.
"""

import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanodistill.losses import linear_logprobs
from nanodistill.model import CausalLM, Config, KVCache, ScalarModel
from nanodistill.weights import PRESETS, TINY, load_config

BYTES = {torch.float32: 4, torch.bfloat16: 2}
CARDS = (24, 48, 80)                                            # GB of the usual ones; a tenth is left for the allocator and CUDA
PROMPT = 256                                                    # tokens of a long prompt; GSM8K's stay below
ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA = dict(rope_theta=500000.0, rope_scaling=ROPE, max_position_embeddings=131072)
SHAPES = {                                                      # from the presets' config.json files on the hub, so that no download is needed
    "135m": Config(49152, 576, 1536, 30, 9, 3, 64, rope_theta=100000.0, max_position_embeddings=8192, tie_word_embeddings=True),
    "0.5b": Config(151936, 896, 4864, 24, 14, 2, 64, rope_theta=1e6, max_position_embeddings=32768, tie_word_embeddings=True, model_type="qwen2"),
    "1b": Config(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True, **LLAMA),
    "3b": Config(128256, 3072, 8192, 28, 24, 8, 128, tie_word_embeddings=True, **LLAMA),
    "8b": Config(128256, 4096, 14336, 32, 32, 8, 128, **{**LLAMA, "rope_scaling": {**ROPE, "factor": 8.0}})}


class PeakBytes(TorchDispatchMode):
    """Bytes of the tensors made inside and still alive, `now`, and their highest count, `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def parameters(config, kind=CausalLM):
    with torch.device("meta"):
        return sum(p.numel() for p in kind(config).parameters())


def training_bytes(config, kind, dtype, sequences, length, response, checkpoint=False):
    """The most bytes that one forward and backward pass of `sequences` sequences of `length` tokens keeps alive beyond weights, gradients included.

    The head is computed for the `response` last tokens of each. fp32 weights, arithmetic in `dtype`.
    """
    with torch.device("meta"):
        model = kind(config)
    def compiled(kernel, logits, *args):                                                    # as compiled, a kernel makes nothing as large as the logits
        return torch.empty(2, len(logits))
    def fused(q, k, v):                                                                     # bf16 on CPU keeps the attention's weights, CUDA does not
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    with (FakeTensorMode(allow_non_fake_inputs=True), mock.patch("nanodistill.losses._run", compiled), mock.patch("nanodistill.model.causal_attention", fused)):
        model = model.to_empty(device="cpu").train()
        model.model.dtype, model.model.checkpoint = dtype, checkpoint
        ids = torch.zeros(sequences, length, dtype=torch.long)
        with PeakBytes() as memory:
            memory.known.update(p.untyped_storage()._cdata for p in model.parameters())     # a view of a weight is no new memory
            hidden = model.model(ids)
            if kind is CausalLM:
                logprobs, _ = linear_logprobs(hidden.narrow(1, length - response, response).flatten(0, 1), model.head, ids.narrow(1, length - response, response).flatten())
                logprobs.sum().backward()
            else:
                model.score(hidden).float().sum().backward()
        return memory.peak


def cache_bytes(config, slots, length, dtype):
    """Bytes of the KV cache of `slots` sequences of `length` tokens."""
    cache = KVCache(config, slots, length, "meta", dtype)
    return cache.k.nbytes + cache.v.nbytes


def plan(stage, config, dtype, micro_batch, slots, prompt, response, checkpoint=False):
    """{part: bytes} of a stage, "peak" the most at one time. `prompt` and `response`: tokens of the longest of each.

    stage: "teacher", "sft", "rm", "rl" or "eval". Trained weights are fp32 with an fp32 gradient and AdamW's two fp32 moments; frozen ones are `dtype`.
    """
    count, length, size = parameters(config), prompt + response, BYTES[dtype]
    kinds = {"sft": [CausalLM], "rm": [ScalarModel], "rl": [CausalLM, ScalarModel]}.get(stage, [])
    trained, frozen = len(kinds), {"teacher": 1, "eval": 1, "rl": 2}.get(stage, 0)
    parts = {"weights": count * (4 * trained + size * frozen), "gradients": 4 * count * trained, "optimizer": 8 * count * trained}
    parts["activations"] = max((training_bytes(config, kind, dtype, micro_batch, length, response, checkpoint) - 4 * count for kind in kinds), default=0)
    parts["KV cache"] = cache_bytes(config, slots, length, dtype) if stage in ("teacher", "rl", "eval") else 0
    parts["sampler's copy"] = size * count if stage == "rl" and dtype != torch.float32 else 0          # of the policy, in the dtype it computes in
    # Sampling and learning take turns: there are no gradients while the cache is there.
    parts["peak"] = max(sum(parts[k] for k in ("weights", "optimizer", "KV cache", "sampler's copy")), sum(parts[k] for k in ("weights", "gradients", "optimizer", "activations")))
    return parts


def shape(name, role, revision=""):
    """The Config that a `--student` or `--teacher` value means; of a hub name only config.json is downloaded."""
    if name in SHAPES:
        return SHAPES[name]
    folder = TINY / role if name == "tiny" else Path(name)
    if not (folder / "config.json").exists():
        from huggingface_hub import hf_hub_download
        folder = Path(hf_hub_download(PRESETS.get(name, name), "config.json", revision=revision or None)).parent
    return load_config(folder)


def report(stage, config):
    """A stage's --dry-run as text: what would be loaded, the most tokens of a step, and the memory by part."""
    role = "teacher" if stage == "teacher" else "student"
    name = getattr(config, role)
    model = shape(name, role, config.revision if role == "student" else config.teacher_revision)
    dtype = torch.float32 if config.dtype == "fp32" or (config.dtype == "auto" and config.device == "cpu") else torch.bfloat16
    response, slots = getattr(config, "max_new_tokens", 512), getattr(config, "slots", 0)
    sequences = config.prompts * config.samples if stage == "rl" else config.batch_size if stage in ("sft", "rm") else slots
    parts = plan(stage, model, dtype, getattr(config, "micro_batch", 0), slots, PROMPT, response, getattr(config, "checkpoint", False))
    loaded = {"rl": "policy and value model trained, reference and reward model frozen", "sft": "trained", "rm": "its trunk and a scalar head, trained"}.get(stage, "frozen")
    lines = [f"{stage} with {role} {name}: {parameters(model):,} parameters ({loaded}); arithmetic in {str(dtype).removeprefix('torch.')}",
             f"tokens a step: at most {sequences} sequences x ({PROMPT} + {response}) = {sequences * (PROMPT + response):,}",
             *(f"  {part:14} {size / 1e9:8.2f} GB" for part, size in parts.items())]
    if stage in ("sft", "rl"):
        lines.append(f"  ({8e-9 * config.micro_batch * response * model.vocab_size:.2f} GB of logits and their gradient are not there: the fused losses never form them)")
    fits = [f"{card} GB" for card in CARDS if parts["peak"] < 0.9e9 * card]
    lines.append(f"an estimate, not measured on a card; fits a card of {', '.join(fits)}" if fits else f"an estimate, not measured on a card; does not fit {CARDS[-1]} GB")
    return "\n".join(lines)
