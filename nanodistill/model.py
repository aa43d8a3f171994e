"""A Llama-family decoder in one file, with Hugging Face's parameter names.

    CausalLM      trunk + language-model head           the teacher, the student, the reference policy
    ScalarModel   trunk + one number a token            the reward model (read at the EOS) and the value model (read at every token)

What the architecture is, bottom to top: token embedding, then in each layer RMSNorm -> grouped-query attention with rotary
positions -> residual, RMSNorm -> SwiGLU MLP -> residual, then a last RMSNorm and a head. Parameter names are those of
transformers' `LlamaForCausalLM` and `LlamaForSequenceClassification`, so loading is a copy by name. Three families differ from Llama in
one detail or none: Qwen2's query, key and value layers have a bias, Qwen3 norms each head's queries and keys, Mistral is as Llama.

Numbers: the weights may be kept in fp32 (training: the master copy the optimizer updates) while the arithmetic runs in another
dtype (`dtype="bf16"` on GPUs): each weight is cast where it is used, and nothing depends on autocast's lists.
Norms, rotary angles and logits are computed in fp32.

Shapes: B sequences, T tokens, D hidden, V vocabulary, H query heads, K key-value heads, S cache slots a sequence.
Sequences are padded on the right, or laid end to end (`pack`). A token at index t sits at position t, so causal attention never lets a real
token see a pad and no padding mask is needed. This file imports torch only and can be copied out alone.
"""

import copy
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    rope_scaling: dict | None = None       # None, or Llama 3's {"rope_type": "llama3", "factor", "low_freq_factor", ...}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    model_type: str = "llama"              # or "mistral", "qwen2", "qwen3"


class Linear(nn.Linear):
    """A linear layer, without bias unless asked for, whose weights are cast to the dtype of its input."""

    def __init__(self, in_features, out_features, bias=False):
        super().__init__(in_features, out_features, bias)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


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

    With Llama 3's scaling, wavelengths longer than `original / low_freq_factor` are stretched by `factor`, those shorter than
    `original / high_freq_factor` are kept, and those between are interpolated (follows `transformers.modeling_rope_utils`).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)                                   # 1 = keep, 0 = stretch
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def rotate(x, cos, sin):
    """Rotate channel pairs (i, i + head_dim/2) of x (..., heads, head_dim); cos, sin (..., 1, head_dim), the sines of the first half negated."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


def grouped_attention(q, keys, values, mask):
    """Attention as two batched products. The queries of a group of heads are as many rows over the same keys, so that no key is copied.

    q (B, K, Q, head_dim), keys (B, K, head_dim, S), values (B, K, S, head_dim), mask (Q, S) or (B * K, 1, S), added to the logits -> (B, K, Q, head_dim).
    """
    logits = torch.baddbmm(mask, q.flatten(0, 1), keys.flatten(0, 1), alpha=q.shape[-1] ** -0.5)                     # (B * K, Q, S)
    return torch.bmm(logits.softmax(dim=-1), values.flatten(0, 1)).unflatten(0, q.shape[:2])


def causal_attention(q, k, v, block=128):
    """Attention of whole sequences, q (B, H, T, head_dim), k and v (B, K, T, head_dim) -> (B, H, T, head_dim), by PyTorch's kernel.

    In bf16 on CPU plain products of `block` queries with the keys up to their last are 2 to 3 times faster (docs/log.md). For backward they keep T^2 / 2
    weights a head, so they serve up to 1,024 tokens.
    """
    (B, H, T, _), K = q.shape, k.shape[1]
    if not q.is_cpu or q.dtype != torch.bfloat16 or T > 1024:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
    q, k, outs = q.unflatten(1, (K, H // K)), k.transpose(2, 3), []                                                   # (B, K, H / K, T, head_dim)
    for start in range(0, T, block):
        end = min(start + block, T)
        mask = q.new_full((end - start, end), -math.inf).triu(1 + start).repeat(H // K, 1)
        out = grouped_attention(q[:, :, :, start:end].flatten(2, 3), k[..., :end], v[:, :, :end], mask)
        outs.append(out.unflatten(2, (H // K, end - start)))
    return torch.cat(outs, dim=3).flatten(1, 2)


class KVCache:
    """Keys and values of B sequences in tensors of fixed shape, so that one compiled step serves every length.

    Row b holds its own sequence from index 0 on. What lies past a row's newest token is stale and never attended to. Keys are kept transposed:
    a decode step multiplies one query with all of them, and in bf16 on CPU that product takes a third of the time so.
    """

    def __init__(self, config, batch, length, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads)
        self.k = torch.zeros(*shape, config.head_dim, length, device=device, dtype=dtype)  # (layers, B, K, head_dim, S)
        self.v = torch.zeros(*shape, length, config.head_dim, device=device, dtype=dtype)  # (layers, B, K, S, head_dim)

    def first(self, length):
        """A view of the first `length` slots of each row."""
        view = copy.copy(self)
        view.k, view.v = self.k[..., :length], self.v[..., :length, :]
        return view

    def rows(self, count):
        """A view of the first `count` rows."""
        view = copy.copy(self)
        view.k, view.v = self.k[:, :count], self.v[:, :count]
        return view

    def copy_rows(self, other, source, target):
        """Copy the rows `source` of another cache, no longer than this one, to the rows `target` of this one."""
        length = other.v.shape[3]
        self.k[:, target, :, :, :length] = other.k[:, source]
        self.v[:, target, :, :length] = other.v[:, source]


@dataclass
class Packed:
    """Sequences of unequal length laid end to end, N tokens in all, so that only attention ever sees padding."""
    ids: torch.Tensor                      # (N,) int64
    positions: torch.Tensor                # (N,) within its own sequence
    places: torch.Tensor                   # (N,) of each token in the (B, T) grid, flattened
    lengths: list                          # B numbers

    def grid(self, x):
        """x (N, ...) -> (B, T, ...), zeros in the padding."""
        B, T = len(self.lengths), max(self.lengths)
        return x.new_zeros(B * T, *x.shape[1:]).index_copy(0, self.places, x).unflatten(0, (B, T))

    def tail(self, counts):
        """Index (sum of counts,) into N of the last `counts[b]` tokens of each sequence b."""
        ends = itertools.accumulate(self.lengths)
        return torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts)]).to(self.ids.device)


def pack(rows, device="cpu"):
    """Lists of token ids, none empty -> Packed. All counting is done on the host, so nothing waits for the device."""
    longest = max(map(len, rows))
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    places = positions + torch.repeat_interleave(torch.arange(len(rows)) * longest, torch.tensor([len(row) for row in rows]))
    ids = torch.tensor([token for row in rows for token in row])
    return Packed(ids.to(device), positions.to(device), places.to(device), list(map(len, rows)))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias, norms = config.model_type == "qwen2", config.model_type == "qwen3"
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, bias)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norms else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norms else nn.Identity()

    def project(self, x):
        """x (..., D) -> queries (..., H * head_dim), keys and values (..., K * head_dim)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, cos, sin, packed=None, cache=None, positions=None, mask=None):
        """x (B, T, D) or packed (N, D) -> the same shape. `cache` is this layer's (keys, values)."""
        q, k, v = self.project(x)
        q = self.q_norm(q.unflatten(-1, (self.heads, self.head_dim)))                      # (B, T, H, head_dim), or (N, ...) if packed
        k = self.k_norm(k.unflatten(-1, (self.kv_heads, self.head_dim)))                   # (B, T, K, head_dim)
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if mask is not None:
            return self.o_proj(self.decode(q, k, v, *cache, positions, mask))
        if packed is not None:
            q, k, v = packed.grid(q), packed.grid(k), packed.grid(v)                       # (B, T, heads, head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                  # (B, heads, T, head_dim)
        if cache is not None:                                                              # a prefill: fills an empty cache of T slots
            cache[0].copy_(k.transpose(2, 3))
            cache[1].copy_(v)
        out = causal_attention(q, k, v).transpose(1, 2).flatten(2)                         # (B, T, H * head_dim)
        return self.o_proj(out if packed is None else out.flatten(0, 1).index_select(0, packed.places))

    def decode(self, q, k, v, keys, values, positions, mask):
        """One new token a row against its cache, written there at positions (B,). q (B, 1, H, head_dim) -> (B, 1, H * head_dim).

        A flash kernel has nothing to tile over one token.
        """
        rows = torch.arange(len(q), device=q.device)
        keys[rows, :, :, positions] = k.squeeze(1)                                         # keys (B, K, head_dim, S)
        values[rows, :, positions] = v.squeeze(1)                                          # values (B, K, S, head_dim)
        q = q.reshape(len(q), self.kv_heads, -1, self.head_dim)                            # (B, K, H / K, head_dim): head order
        return grouped_attention(q, keys, values, mask).view(len(q), 1, -1)


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

    def forward(self, x, *attention_args):
        x = x + self.self_attn(self.input_layernorm(x), *attention_args)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything below the head: token ids (B, T) -> hidden states (B, T, D) after the last norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dtype = None                                                            # of the arithmetic; None: the weights' own
        self.checkpoint = False                                                      # keep no activations of a layer: backward computes them again
        # As nn.Embedding, without the values it would draw: on the meta device that alone imports torch._dynamo, which takes 2 s.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # The table is not a parameter and not in the files: it follows from the config. Kept in fp32 whatever the dtype.
        angles = torch.outer(torch.arange(config.max_position_embeddings, device="cpu").float(), rope_frequencies(config))
        self.angles = torch.cat((-angles, angles), dim=-1)                           # (max positions, head_dim), for `rotate`

    def forward(self, ids, cache=None, positions=None):
        """Whole sequences, causal: ids (B, T) int64, padded on the right -> hidden (B, T, D); or Packed -> hidden (N, D).

        With a cache, Packed prompts fill it (a cache of as many rows, and of the longest's length). ids (B,) with `positions` (B,), where each stands,
        are one new token a row: it is written there and sees every cached index up to its own -> hidden (B, D).
        """
        dtype, packed, mask = self.dtype or self.embed_tokens.weight.dtype, None, None
        if isinstance(ids, Packed):
            packed, ids, at = ids, ids.ids, ids.positions                            # (N,)
        elif positions is not None:
            ids, at = ids[:, None], positions[:, None]                               # (B, 1)
            slots = torch.arange(cache.v.shape[3], device=ids.device)                # (S,)
            mask = torch.where(slots <= at, 0.0, -math.inf).to(dtype)                # (B, S), added to the attention's logits
            mask = mask.repeat_interleave(self.config.num_key_value_heads, dim=0)[:, None]     # (B * K, 1, S)
        else:
            at = torch.arange(ids.shape[1], device=ids.device)                       # (T,)
        if self.angles.device != ids.device:
            self.angles = self.angles.to(ids.device)                                 # not a buffer: `.to(bf16)` must not round it
        angles = self.angles[at].unsqueeze(-2)                                       # (..., T, 1, head_dim), the same for all heads
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        x = self.embed_tokens(ids).to(dtype)                                         # (B, T, D), or (N, D)
        for i, layer in enumerate(self.layers):
            args = (x, cos, sin, packed, None if cache is None else (cache.k[i], cache.v[i]), positions, mask)
            x = checkpoint(layer, *args, use_reentrant=False) if self.checkpoint and torch.is_grad_enabled() else layer(*args)
        return self.norm(x if positions is None else x.squeeze(1))


class CausalLM(nn.Module):
    """Trunk and language-model head. `head` is its weight (V, D), for the fused losses that never form all logits."""

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

    def forward(self, ids, cache=None, positions=None):
        """ids as `Trunk` takes them -> logits (..., V) fp32."""
        return self.lm_head(self.model(ids, cache, positions)).float()


class ScalarModel(nn.Module):
    """Trunk and a head of one number a token. As reward model it is read at the response's last token, as value model at each."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = Linear(config.hidden_size, 1)

    def forward(self, ids):
        """ids (B, T) -> (B, T) fp32; Packed -> (N,)."""
        return self.score(self.model(ids)).float().squeeze(-1)


def init_weights(model, generator=None, std=0.02):
    """Normal(0, std) matrices, zero biases, unit norms; a scalar head starts at zero, so that a fresh reward or value is 0 everywhere."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "score.weight" or name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(1.0)
    return model
