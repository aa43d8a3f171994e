"""A token from logits: random numbers by counter, and the inverse CDF. Imports torch only.

A sample's random numbers are a function of its stream and of how many tokens it has. There is no
generator whose state would tie a sample to those drawn beside it or before it.
"""

import hashlib

import torch


# SplitMix64's constants, as signed numbers.
GOLDEN = -7046029254386353131
MIX1, MIX2 = -4658895280553007687, -7723592293110705685
# The largest share of a sum that is surely below it in fp32.
BELOW_ONE = 1 - 2**-23


# ---- random numbers ----

def mix(x):
    """SplitMix64's output function (Steele, Lea, Flood 2014) of int64, which wraps around as its
    unsigned numbers do."""
    # >> keeps the sign: the mask makes it the logical shift.
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * MIX1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * MIX2
    return x ^ (x >> 31 & (1 << 33) - 1)


def stream_of(seed, id_, sample):
    """The random stream of a prompt's sample, an int: a hash, so that no two are the same.

    seed: an int. id_: the prompt's, a str. sample: its index.
    """
    digest = hashlib.sha256(ascii((int(seed), id_, sample)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform(stream, count):
    """Random number `count` of each stream: its upper 23 bits plus a half, so never 0 or 1.

    stream, count: (B,) int64 -> (B,) fp32.
    """
    bits = mix(stream + GOLDEN * (count + 1)) >> 41 & (1 << 23) - 1
    return (bits.float() + 0.5) / (1 << 23)


# ---- a token ----

def choose_plainly(logits, temperature, u):
    """Draw one token per row from softmax(logits / temperature), by inverse CDF.

    Args:
        logits: (B, V). temperature: (B,), above 0. u: (B,), random numbers in (0, 1).
    Returns tokens (B,) and their logprobs (B,).
    """
    logprobs = (logits / temperature[:, None]).log_softmax(dim=-1)     # (B, V)
    cdf = logprobs.exp().cumsum(dim=-1)                                # (B, V)
    mark = u[:, None] * cdf[:, -1:]                                    # (B, 1)
    tokens = torch.searchsorted(cdf, mark, right=True)                 # (B, 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def choose(logits, temperature, u, any_greedy=True):
    """As `choose_plainly`, faster and with less rounding; a temperature of 0 is greedy.

    The CDF is summed by blocks of tokens, then within the block that u falls into: a running sum
    of all is slow and rounds more. On CPU a few rows are taken at a time: what fits the cache is
    faster, and large blocks of memory are given back and cleared each time.

    any_greedy: False says that no temperature is 0, which saves a pass over the logits.
    A greedy row's logprob is at temperature 1. A token of probability 0 is never drawn. A row
    without a softmax (NaN, inf, or -inf alone) gets some token, with NaN as logprob.
    """
    if logits.is_cuda:
        return choose_by_blocks(logits, temperature, u, any_greedy)
    rows = max(2**18 // logits.shape[1], 1)
    parts = [choose_by_blocks(*part, any_greedy)
             for part in zip(logits.split(rows), temperature.split(rows), u.split(rows))]
    tokens, logprobs = zip(*parts)
    return torch.cat(tokens), torch.cat(logprobs)


def choose_by_blocks(logits, temperature, u, any_greedy):
    """`choose` of all rows at once."""
    greedy = temperature == 0
    inverse_temperature = 1 / temperature.masked_fill(greedy, 1.0)
    probs = (logits * inverse_temperature[:, None]).softmax(dim=-1)    # (B, V) fp32
    V = probs.shape[1]
    size = min(V & -V, 256)                  # the largest power of two that V is a multiple of
    blocks = probs.unflatten(1, (V // size, size))                     # (B, V / size, size)
    # The block that u falls into.
    cdf = blocks.sum(dim=-1).cumsum(dim=-1)                            # (B, V / size)
    total = cdf[:, -1:]
    mark = torch.minimum(u[:, None] * total, total * BELOW_ONE)        # (B, 1)
    which = torch.searchsorted(cdf, mark, right=True).clamp(max=V // size - 1)
    # The token within it.
    row = which[:, :, None].expand(-1, -1, size)
    inner = blocks.gather(1, row).squeeze(1).cumsum(dim=-1)            # (B, size)
    whole = inner[:, -1:]
    # cdf[which] is the sum at the block's end: this is how far u lies into the block.
    mark = torch.minimum(mark - cdf.gather(1, which) + whole, whole * BELOW_ONE).clamp(min=0)
    within = torch.searchsorted(inner, mark, right=True).clamp(max=size - 1)
    tokens = which * size + within                                     # (B, 1)
    if any_greedy:
        tokens = torch.where(greedy[:, None], logits.argmax(dim=-1, keepdim=True), tokens)
    return tokens.squeeze(1), (probs.gather(1, tokens) / total).log().squeeze(1)
