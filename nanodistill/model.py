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
Sequences are padded on the right. A token at index t sits at position t, so causal attention never lets a real token see a pad
and no padding mask is needed. This file imports torch only and can be copied out alone.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


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
    """Rotate channel pairs (i, i + head_dim/2) of x (B, heads, T, head_dim) by the angles in cos, sin (T, head_dim) or (B, 1, T, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class KVCache:
    """Keys and values of B sequences in tensors of fixed shape, so that one compiled step serves every length.

    Row b holds its own sequence from index 0 on; `positions` given to the trunk say where each new token is written.
    What lies past a row's position is stale and never attended to.
    """

    def __init__(self, config, batch, length, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (layers, B, K, S, head_dim)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, layer, k, v, positions):
        """Write k, v (B, K, T, head_dim) at positions (B, T) of a layer; return that layer's whole cache (B, K, S, head_dim)."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]     # (B, 1), broadcasts against positions (B, T)
        self.k[layer][rows, :, positions] = k.transpose(1, 2)        # (B, T, K, head_dim)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)
        return self.k[layer], self.v[layer]

    def trimmed(self, length):
        """A view of the first `length` slots of each row, rounded up to 32 so that few shapes occur."""
        view = copy.copy(self)
        view.k, view.v = (x[:, :, :, :-(-length // 32) * 32] for x in (self.k, self.v))
        return view

    def copy_rows(self, other, source, target):
        """Copy the rows `source` of another cache, no longer than this one, to the rows `target` of this one."""
        length = other.k.shape[3]
        self.k[:, target, :, :length] = other.k[:, source]
        self.v[:, target, :, :length] = other.v[:, source]


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions, through PyTorch's scaled_dot_product_attention."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias, norms = config.model_type == "qwen2", config.model_type == "qwen3"
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, bias)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norms else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norms else nn.Identity()

    def forward(self, x, cos, sin, cache=None, positions=None, mask=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)     # (B, H, T, head_dim)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, head_dim)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)                         # (B, K, S, head_dim)
        if T == 1:
            # One new token: the H / K query heads of a group are as many queries over the same keys. No key is copied.
            out = F.scaled_dot_product_attention(q.view(B, self.kv_heads, -1, self.head_dim), k, v, attn_mask=mask)
            return self.o_proj(out.view(B, 1, self.heads * self.head_dim))           # (B, K, H / K, head_dim) is head order
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                             enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
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
        # As nn.Embedding, without the values it would draw: on the meta device that alone imports torch._dynamo, which takes 2 s.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # The table is not a parameter and not in the files: it follows from the config. Kept in fp32 whatever the dtype.
        angles = torch.outer(torch.arange(config.max_position_embeddings, device="cpu").float(), rope_frequencies(config))
        self.angles = torch.cat((angles, angles), dim=-1)                            # (max positions, head_dim)

    def forward(self, ids, cache=None, positions=None):
        """ids (B, T) int64 -> hidden (B, T, D).

        Without a cache: the whole right-padded sequence, causal. With a cache: `positions` (B, T) says where each token stands;
        it sees every cached index up to its own position.
        """
        B, T = ids.shape
        dtype = self.dtype or self.embed_tokens.weight.dtype
        if self.angles.device != ids.device:
            self.angles = self.angles.to(ids.device)                                 # not a buffer: `.to(bf16)` must not round it
        if cache is None:
            angles, mask = self.angles.narrow(0, 0, T), None                         # (T, head_dim), broadcasts against (B, heads, T, head_dim)
        else:
            angles = self.angles[positions][:, None]                                 # (B, 1, T, head_dim)
            slots = torch.arange(cache.k.shape[3], device=ids.device)                # (S,)
            mask = (slots <= positions[:, :, None])[:, None]                         # (B, 1, T, S), True = may attend
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        x = self.embed_tokens(ids).to(dtype)                                         # (B, T, D)
        for layer in self.layers:
            x = layer(x, cos, sin, cache, positions, mask)
        return self.norm(x)


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
        """ids (B, T) -> logits (B, T, V) fp32."""
        return self.lm_head(self.model(ids, cache, positions)).float()


class ScalarModel(nn.Module):
    """Trunk and a head of one number a token. As reward model it is read at the response's last token, as value model at each."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = Linear(config.hidden_size, 1)

    def forward(self, ids):
        """ids (B, T) -> (B, T) fp32."""
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
