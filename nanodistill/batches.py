"""Two layouts of a batch beside model.py's Padded, each with its attention.

    Packed       sequences laid end to end: training, scoring, and the prompts that fill a KVCache
    NewTokens    one new token per sequence, against a KVCache of what came before: decoding

S is the number of cache positions per sequence; the other shapes are model.py's.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from nanodistill import cpu
from nanodistill.model import causal_attention, grouped_attention


@dataclass
class Packed:
    """Sequences of unequal length laid end to end, N tokens in all.

    Only attention sees padding, and flash attention, which runs where `ends` is set, sees none.
    """
    ids: torch.Tensor                      # (N,) int64
    positions: torch.Tensor                # (N,) of each token within its own sequence
    cells: torch.Tensor                    # (N,) of each token in the flattened (B, T) grid
    lengths: list                          # B numbers
    cache: "KVCache" = None                # of B rows and T positions, which attention fills
    last: torch.Tensor = None              # (M,) indices into N of each sequence's last tokens
    more: tuple = ()                       # what else `pack` was given, on the same device
    ends: torch.Tensor = None              # (B + 1,) int32: 0 and each sequence's end, for flash

    def attend(self, layer, q, k, v):
        """q (N, H, head_dim), k and v (N, K, head_dim) -> (N, H * head_dim)."""
        if self.cache is not None:
            self.cache.k[layer].copy_(self.grid(k).permute(0, 2, 3, 1))
            self.cache.v[layer].copy_(self.grid(v).transpose(1, 2))
        if self.ends is not None and q.dtype == torch.bfloat16 and q.shape[-1] % 8 == 0:
            # What torch.nn.attention.varlen calls, in a third of its time on the host.
            T = max(self.lengths)
            out, *_ = torch.ops.aten._flash_attention_forward(
                q, k, v, self.ends, self.ends, T, T, 0.0, True, False)
            return out.flatten(1)
        attention = cpu.causal_attention if cpu.helps(q) else causal_attention
        grids = self.grid(q), self.grid(k), self.grid(v)               # (B, T, heads, head_dim)
        return attention(*grids).flatten(0, 1).index_select(0, self.cells)

    def grid(self, x):
        """x (N, ...) -> (B, T, ...), zeros in the padding."""
        B, T = len(self.lengths), max(self.lengths)
        zeros = x.new_zeros(B * T, *x.shape[1:])
        return zeros.index_copy(0, self.cells, x).unflatten(0, (B, T))


def on_device(device, *lists):
    """Lists or tensors of numbers of one dtype, no list empty -> a tensor of each, in one copy, for
    which the host does not wait on CUDA."""
    whole = torch.cat([torch.as_tensor(x) for x in lists])
    cuda = torch.device(device).type == "cuda"
    if cuda:
        # From memory that is not pinned, the host would wait.
        whole = whole.pin_memory()
    return whole.to(device, non_blocking=cuda).split([len(x) for x in lists])


def ranges(starts, counts):
    """counts[b] numbers from starts[b] on, for each b, end to end."""
    return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, counts)])


def pack(rows, device="cpu", cache=None, counts=None, more=()):
    """Lists of token ids, none empty -> Packed.

    All counting is done on the host: the device is never asked for a number.

    Args:
        counts: B numbers: how many of each row's last tokens `last` names; None: one of each.
        more: lists of whole numbers that share the copy to the device.
    """
    lengths = [len(row) for row in rows]
    counts, T = counts or [1] * len(rows), max(lengths)
    last = [end - n for end, n in zip(itertools.accumulate(lengths), counts)]
    ids, positions, cells, last, ends, *more = on_device(
        device, [token for row in rows for token in row], ranges([0] * len(rows), lengths),
        ranges(range(0, len(rows) * T, T), lengths), ranges(last, counts),
        [0, *itertools.accumulate(lengths)], *more)
    flash = ids.is_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    return Packed(ids, positions, cells, lengths, cache, last, more, ends.int() if flash else None)


class KVCache:
    """Keys and values of B sequences: two tensors of fixed shape per layer, written in place.

    Row b holds its own sequence from position 0 on. What lies past its last token is stale and
    never attended to. Keys are transposed: a decode step multiplies one query with all of them,
    and in bf16 on CPU that product takes a third of the time so. A tensor per layer: traced by a
    compiler, writes into a slice of one tensor would copy all of it.
    """

    def __init__(self, config, batch, length, device, dtype):
        layers, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        how = dict(device=device, dtype=dtype)
        self.k = [torch.zeros(batch, K, d, length, **how) for _ in range(layers)]
        self.v = [torch.zeros(batch, K, length, d, **how) for _ in range(layers)]
        self.length = length

    def view(self, rows, length):
        """The first `length` positions of the first `rows` rows."""
        view = object.__new__(KVCache)
        view.k = [k[:rows, :, :, :length] for k in self.k]
        view.v = [v[:rows, :, :length] for v in self.v]
        view.length = min(length, self.length)
        return view

    def copy_rows(self, other, source, target):
        """Copy the rows `source` of `other`, which has at most as many positions, to `target`."""
        for mine, its in zip(self.k, other.k):
            mine[target, :, :, :other.length] = its[source]
        for mine, its in zip(self.v, other.v):
            mine[target, :, :other.length] = its[source]


class NewTokens:
    """One new token per sequence, written into the cache at `positions`; it sees all up to there.

    ids, positions: (B,) int64. cache: of B rows.
    """

    def __init__(self, ids, positions, cache):
        self.ids, self.positions, self.cache = ids, positions, cache
        self.rows = torch.arange(len(ids), device=ids.device)
        _, K, S, _ = cache.v[0].shape
        seen = torch.arange(S, device=ids.device) <= positions[:, None]               # (B, S)
        mask = torch.where(seen, 0.0, -math.inf).to(cache.v[0].dtype)
        self.mask = mask.repeat_interleave(K, dim=0)[:, None]              # (B * K, 1, S)

    def attend(self, layer, q, k, v):
        """q (B, H, head_dim), k and v (B, K, head_dim) -> (B, H * head_dim)."""
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[self.rows, :, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        q = q.unflatten(1, (k.shape[1], -1))                           # (B, K, H / K, head_dim)
        return grouped_attention(q, keys, values, self.mask).flatten(1)
