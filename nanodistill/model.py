"""A Llama-family decoder in one file, with Hugging Face's parameter names.

    CausalLM      trunk + language-model head: the teacher, the student, the reference policy
    ScalarModel   trunk + one number per token: the reward model, read at the last token, and the
                  value model, read at every token

The architecture, bottom to top: token embedding, then in each layer RMSNorm -> grouped-query
attention with rotary positions -> residual, RMSNorm -> SwiGLU MLP -> residual, then a last RMSNorm
and a head. Parameters are named as in transformers' `LlamaForCausalLM` and
`LlamaForSequenceClassification`, so loading is a copy by name. Three families differ from Llama in
one detail or none: Qwen2's query, key and value layers have a bias, Qwen3 norms the queries and
keys of each head, Mistral is as Llama.

Dtypes: the weights may be kept in fp32 (training: the master copy that the optimizer updates) while
the arithmetic runs in another dtype (`Trunk.dtype`, bf16 on GPUs). Each weight is cast where it is
used, and nothing depends on autocast's lists. Norms, rotary angles and logits are in fp32.

Shapes: B sequences, T tokens, D hidden, V vocabulary, H query heads, K key-value heads.

How tokens attend to each other is the batch's business, not the model's. A batch has `ids`,
`positions` and `attend(layer, q, k, v)`. Here there is one, Padded; batches.py has two more. This
file imports torch only and can be copied out alone.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


STD = 0.02                                 # of initial weights, as GPT-2's
# Of attention on CUDA, the fastest first.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Config:
    """The part of an HF `config.json` that determines the computation. Names are HF's."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # None, or Llama 3's {"rope_type": "llama3", "factor", "low_freq_factor", ...}.
    rope_scaling: dict | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    model_type: str = "llama"              # or "mistral", "qwen2", "qwen3"


class Linear(nn.Linear):
    """A linear layer, without bias unless asked for, in the dtype of its input."""

    def __init__(self, in_features, out_features, bias=False):
        super().__init__(in_features, out_features, bias)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def rope_frequencies(config):
    """Angle per position of each pair of channels, fp32 (head_dim / 2,); arXiv 2104.09864.

    Llama 3's scaling stretches wavelengths above `original / low_freq_factor` by `factor`, keeps
    those below `original / high_freq_factor`, and interpolates between the two (follows
    `transformers.modeling_rope_utils`).
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # Full turns within the original context.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)                  # 1 = keep, 0 = stretch
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def rotate(x, cos, sin):
    """Rotate the channel pairs (i, i + head_dim / 2) of x (..., heads, head_dim).

    cos, sin: (..., 1, head_dim), the sines of the first half negated.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


def causal_attention(q, k, v):
    """Each token attends to itself and to what came before, by PyTorch's kernel.

    q (B, T, H, head_dim), k and v (B, T, K, head_dim) -> (B, T, H * head_dim).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                   # (B, heads, T, head_dim)
    if q.is_cuda and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
        # CUDA's one fp32 kernel that keeps no (T, T) weights takes no grouped queries.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # Not cuDNN's, which takes half a second to plan for each new shape.
    with sdpa_kernel(KERNELS) if q.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                             enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2)


def grouped_attention(q, keys, values, mask):
    """Attention as two batched products, under any mask.

    The query heads that share a key-value head become rows of one product: no key is copied.
    q (B, K, Q, head_dim), keys (B, K, head_dim, S), values (B, K, S, head_dim), and mask (Q, S) or
    (B * K, 1, S), added to the logits -> (B, K, Q, head_dim).
    """
    scale = q.shape[-1] ** -0.5
    logits = torch.baddbmm(mask, q.flatten(0, 1), keys.flatten(0, 1), alpha=scale)   # (B * K, Q, S)
    return torch.bmm(logits.softmax(dim=-1), values.flatten(0, 1)).unflatten(0, q.shape[:2])


class Padded:
    """B sequences padded on the right to T tokens.

    A token at index t stands at position t: causal attention never lets a real token see a pad,
    and no padding mask is needed.
    """

    def __init__(self, ids):
        self.ids = ids                                                 # (B, T) int64
        self.positions = torch.arange(ids.shape[1], device=ids.device)                 # (T,)

    def attend(self, layer, q, k, v):
        """Attention of layer number `layer`.

        q (B, T, H, head_dim), k and v (B, T, K, head_dim) -> (B, T, H * head_dim).
        """
        return causal_attention(q, k, v)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.kv_heads = config.num_key_value_heads
        bias = config.model_type == "qwen2"
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, bias)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def project(self, x):
        """x (..., D) -> queries (..., H * head_dim), keys and values (..., K * head_dim)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def qkv(self, x, cos, sin):
        """x (..., D) -> what attends: q (..., H, head_dim), k and v (..., K, head_dim)."""
        q, k, v = self.project(x)
        q = self.q_norm(q.unflatten(-1, (self.heads, self.head_dim)))        # (..., H, head_dim)
        k = self.k_norm(k.unflatten(-1, (self.kv_heads, self.head_dim)))      # (..., K, head_dim)
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def project(self, x):
        """x (..., D) -> the gate and what it gates, both (..., intermediate size)."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before(self, x, cos, sin):
        """x (..., D) -> what attends, as `Attention.qkv`."""
        return self.self_attn.qkv(self.input_layernorm(x), cos, sin)

    def after(self, x, attended):
        """x (..., D), attended (..., H * head_dim) -> (..., D)."""
        x = x + self.self_attn.o_proj(attended)
        # Freed before the MLP, which needs the most memory.
        del attended
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, batch, i, compiled=False):
        """x (..., D) -> the same shape. i: this layer's number, by which `batch` knows it."""
        before, after = (_compiled(f) if compiled else f for f in (Layer.before, Layer.after))
        return after(self, x, batch.attend(i, *before(self, x, cos, sin)))


@functools.cache
def _compiled(part):
    """`Layer.before` or `after`, compiled once for all layers and lengths: their weights are inputs
    of the graph. Rounded as eagerly: else passes with and without gradients, whose ratio PPO takes,
    would differ by what each fuses."""
    return torch.compile(part, dynamic=True, options={"emulate_precision_casts": True})


class Trunk(nn.Module):
    """Everything below the head: token ids (B, T) -> hidden states (B, T, D) after the last norm.

    dtype: of the arithmetic; None: the weights' own. checkpoint: keep no activations of a layer;
    the backward pass computes them again. compiled: what comes before and after a layer's
    attention is compiled, except in inference mode (sampling).
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.dtype, self.checkpoint, self.compiled = config, None, False, False
        table = torch.empty(config.vocab_size, config.hidden_size)     # (V, D)
        # From a stream of its own, so that `init_weights` draws what it always drew. On the meta
        # device it would import torch._dynamo, which takes 2 s.
        if not table.is_meta:
            table.normal_(0.0, STD, generator=torch.Generator(table.device).manual_seed(0))
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Neither a parameter nor in the files, for it follows from the config; and no buffer, which
        # `.to(bf16)` would round.
        positions = torch.arange(config.max_position_embeddings, device="cpu").float()
        angles = torch.outer(positions, rope_frequencies(config))
        self.angles = torch.cat((-angles, angles), dim=-1)             # (positions, head_dim)

    def forward(self, batch):
        """ids (B, T) padded on the right -> (B, T, D); or another batch, whose `ids` (...)."""
        if isinstance(batch, torch.Tensor):
            batch = Padded(batch)
        dtype = self.dtype or self.embed_tokens.weight.dtype
        if self.angles.device != batch.ids.device:
            self.angles = self.angles.to(batch.ids.device)
        angles = self.angles[batch.positions].unsqueeze(-2)            # (..., 1, head_dim)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        x = self.embed_tokens(batch.ids).to(dtype)                     # (..., D)
        # Where the whole model is compiled, its parts are too.
        compiled = self.compiled and not (
            torch.compiler.is_compiling() or torch.is_inference_mode_enabled())
        for i, layer in enumerate(self.layers):
            how = cos, sin, batch, i, compiled
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, *how, use_reentrant=False)
            else:
                x = layer(x, *how)
        return self.norm(x)


class CausalLM(nn.Module):
    """Trunk and language-model head.

    `head` is its weight (V, D), for the fused losses, which never form all logits.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def head(self):
        return self.lm_head.weight

    def forward(self, batch, loss=None):
        """A batch as `Trunk` takes it -> logits (..., V), fp32; or `loss(hidden states, head)`.

        A fused loss is asked for so, for FSDP gathers split weights only in here.
        """
        hidden = self.model(batch)                                     # (..., D)
        return self.lm_head(hidden).float() if loss is None else loss(hidden, self.head)


class ScalarModel(nn.Module):
    """Trunk and a head of one number per token.

    The reward model is read at a response's last token, the value model at each.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = Linear(config.hidden_size, 1)

    def forward(self, batch):
        """A batch as `Trunk` takes it -> (...) fp32."""
        return self.score(self.model(batch)).float().squeeze(-1)


def init_weights(model, generator=None, std=STD):
    """Normal(0, std) matrices, zero biases, unit norms.

    A scalar head starts at zero, so that a fresh reward or value is 0 everywhere.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "score.weight" or name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(1.0)
    return model
