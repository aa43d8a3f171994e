"""What bf16 on CPU needs to be fast, and nothing else does.

With ENABLED = False everything works as before, slower. Each use stands behind `cpu.helps(x)`. The
figures are of SmolLM2-135M on an AMD EPYC with avx512_bf16 (docs/log.md).
"""

import functools
import math

import torch

from nanodistill.model import causal_attention as plain_attention
from nanodistill.model import grouped_attention


ENABLED = True


def helps(x):
    """True for a bf16 tensor on CPU, while ENABLED."""
    return ENABLED and x.is_cpu and x.dtype == torch.bfloat16


def causal_attention(q, k, v, block=128):
    """As model.causal_attention, 2 to 3 times faster: `block` queries at a time, with the keys up
    to the last query.

    For the backward pass they keep T^2 / 2 weights per head, so they serve up to 1,024 tokens.
    """
    (_, T, H, _), K = q.shape, k.shape[2]
    if T > 1024:
        return plain_attention(q, k, v)
    q = q.transpose(1, 2).unflatten(1, (K, H // K))                    # (B, K, H / K, T, head_dim)
    keys = k.permute(0, 2, 3, 1)                                       # (B, K, head_dim, T)
    values = v.transpose(1, 2)                                         # (B, K, T, head_dim)
    outs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        mask = q.new_full((end - start, end), -math.inf).triu(1 + start).repeat(H // K, 1)
        rows = q[:, :, :, start:end].flatten(2, 3)                     # (B, K, H / K * block, ...)
        out = grouped_attention(rows, keys[..., :end], values[:, :, :end], mask)
        outs.append(out.unflatten(2, (H // K, end - start)))
    return torch.cat(outs, dim=3).flatten(1, 2).transpose(1, 2).flatten(2)


def pack_weights(model, rows):
    """Lay the weights of a bf16 CausalLM out as oneDNN wants them for inputs of `rows` rows.

    Each product would else lay its own out anew. Layers that read the same input become one
    product. A decode step takes 0.67, 0.82, 0.92 of the time so with 1, 16, 64 rows. The operators
    are private; torch.compile's frozen graphs use the same.
    """
    if not torch.backends.mkldnn.is_available():
        return

    def product(*layers):
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = None if layers[0].bias is None else torch.cat(
            [layer.bias.detach() for layer in layers])
        return functools.partial(
            torch.ops.mkldnn._linear_pointwise, B=bias, attr="none", scalars=[], algorithm="",
            W=torch.ops.mkldnn._reorder_linear_weight(weight, rows))

    def together(*layers):
        whole, sizes = product(*layers), [layer.out_features for layer in layers]
        return lambda x: whole(x).split(sizes, dim=-1)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.project = together(attention.q_proj, attention.k_proj, attention.v_proj)
        attention.o_proj.forward = product(attention.o_proj)
        mlp.project = together(mlp.gate_proj, mlp.up_proj)
        mlp.down_proj.forward = product(mlp.down_proj)
    model.lm_head.forward = product(model.lm_head)
