"""Sampling from a CausalLM: a KV cache, slots refilled as sequences end, one prefill for all samples of a prompt.

The engine keeps `slots` sequences in flight. A slot whose sequence has ended (EOS, or the length limit) is handed to the next one in the queue while
the others go on, so a long response does not hold up a batch of short ones; when the queue is empty, an eager engine makes the slots fewer. A prompt is run
through the model once, packed with others so that none is padded; its keys and values are then copied to every slot that samples from it.

The sampled distribution is softmax(logits / temperature) over the whole vocabulary, with no top-k or top-p, and the log-probabilities
returned are of that distribution: what PPO needs for its ratio to start at 1. Each sample has a
random stream of its own, which follows from seed, prompt's id and sample's index: neither slots nor
batch mates change what is drawn (but for the rounding of matrix products of other shapes).
"""

import functools
import hashlib
import math
import sys
from collections import deque
from dataclasses import dataclass

import torch
from nanodistill.model import CausalLM, KVCache, pack

# Prompts times the longest's tokens: more take memory and, where they leave the CPU's cache, time.
PREFILL = {"cpu": 2**11, "cuda": 2**14, "mps": 2**12}
GOLDEN, MIX1, MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685       # SplitMix64's constants, as signed numbers


@dataclass
class Sample:
    """One response: `tokens` with the EOS if it `ended`, and `logprobs`, one a token, at the sampling temperature."""
    tokens: list
    logprobs: list
    ended: bool


def mix(x):
    """SplitMix64's output function (Steele, Lea, Flood 2014) of int64, which wraps around as its unsigned numbers do."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * MIX1                    # >> keeps the sign: the mask makes it the logical shift
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * MIX2
    return x ^ (x >> 31 & (1 << 33) - 1)


def stream_of(seed, id_, sample):
    """The random stream of a prompt's sample, an int64: a hash, so that no two are the same."""
    digest = hashlib.sha256(ascii((int(seed), id_, sample)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform(stream, count):
    """The number of index `count` (B,) of each random stream (B,), both int64: in (0, 1), fp32, an odd multiple of 2^-24."""
    return ((mix(stream + GOLDEN * (count + 1)) >> 41 & (1 << 23) - 1).float() + 0.5) / (1 << 23)


def choose(logits, temperature, u, any_greedy=True):
    """Sample one token a row by inverse CDF. logits (B, V), temperature (B,), 0 = greedy, u (B,) in (0, 1) -> tokens (B,), logprobs (B,) fp32.

    Greedy rows report logprobs at temperature 1; `any_greedy` False says that there are none, which saves a pass over the logits. The CDF is summed
    by blocks of tokens, then within the one that u falls into: a running sum of all is slow and
    rounds more. A token of probability 0 is never drawn. A row without a softmax (NaN, inf, or -inf
    alone) gets some token, with NaN as logprob.
    """
    greedy = temperature == 0
    shares = (logits * (1 / temperature.masked_fill(greedy, 1.0))[:, None]).softmax(dim=-1)         # fp32, as temperature is
    V = shares.shape[1]
    block = min(V & -V, 256)                                      # the largest power of two that V is a multiple of
    blocks = shares.unflatten(1, (V // block, block))
    sums = blocks.sum(dim=-1).cumsum(dim=-1)                      # (B, V / block)
    total = sums[:, -1:]
    mark = torch.minimum(u[:, None] * total, total * (1 - 2**-23))    # (B, 1), below total
    which = torch.searchsorted(sums, mark, right=True).clamp(max=V // block - 1)
    inner = blocks.gather(1, which[:, :, None].expand(-1, -1, block)).squeeze(1).cumsum(dim=-1)       # (B, block)
    mark = torch.minimum(mark - sums.gather(1, which) + inner[:, -1:], inner[:, -1:] * (1 - 2**-23)).clamp(min=0)
    drawn = which * block + torch.searchsorted(inner, mark, right=True).clamp(max=block - 1)
    tokens = torch.where(greedy[:, None], logits.argmax(dim=-1, keepdim=True), drawn) if any_greedy else drawn
    return tokens.squeeze(1), (shares.gather(1, tokens) / total).log().squeeze(1)


def choose_by_rows(logits, temperature, u, any_greedy=True):
    """`choose` for a few rows at a time on CPU, where what fits the cache is faster and larger blocks of memory are given back and cleared each time."""
    if logits.is_cuda:
        return choose(logits, temperature, u, any_greedy)
    rows = max(2**18 // logits.shape[1], 1)
    parts = [choose(*part, any_greedy) for part in zip(logits.split(rows), temperature.split(rows), u.split(rows))]
    return tuple(torch.cat(x) for x in zip(*parts))


def decode_step(model, cache, state, eos, limit, any_greedy=True):
    """One token more for every slot that is not done: from the model, into `state`. Nothing here waits for the device."""
    state["position"].add_(~state["done"])
    hidden = model.model(state["last"], cache, state["position"])                            # (B, D)
    chosen = choose_by_rows(model.lm_head(hidden), state["temperature"], uniform(state["stream"], state["count"]), any_greedy)
    record(state, slice(None), *chosen, eos, limit)


def record(state, rows, new, new_logprobs, eos, limit):
    """Append one token to each of `rows`; a row that was already done stays as it is."""
    going, count = ~state["done"][rows], state["count"][rows]
    at = count.clamp(max=limit - 1)[:, None]
    for name, value in (("tokens", new), ("logprobs", new_logprobs)):
        old = state[name][rows]
        state[name][rows] = old.scatter(1, at, torch.where(going, value, old.gather(1, at).squeeze(1))[:, None])
    state["last"][rows] = torch.where(going, new, state["last"][rows])
    state["done"][rows] |= torch.isin(new, eos) | (count + 1 >= limit)
    state["count"][rows] = count + going                         # last: `count` may be a view of it


@functools.cache
def compiled_step(device):
    return torch.compile(decode_step, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)


def in_arithmetic_dtype(model):
    """The model with its weights in the dtype it computes in: a copy if they are kept in another, for a step would cast all of them anew."""
    dtype = model.model.dtype or model.head.dtype
    return model if model.head.dtype == dtype else copy_of(model, dtype)


def copy_of(model, dtype):
    """Another model on the same weights, or on their copies where they are not in `dtype`."""
    with torch.device("meta"):
        copy = CausalLM(model.config)
    copy.load_state_dict({name: w.detach().to(dtype) for name, w in model.named_parameters()}, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        copy.lm_head.weight = copy.model.embed_tokens.weight
    return copy


def packed(model, rows):
    """A copy for CPU whose bf16 weights lie in oneDNN's layout for products with `rows` rows, which each product would else make anew, and where the
    layers that read the same input are one product.

    A step of SmolLM2-135M takes 0.67, 0.82, 0.92 of the time so with 1, 16, 64 rows. The operators are those torch.compile's frozen graphs use.
    """
    copy = copy_of(model, model.head.dtype)

    def product(*layers):
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat([layer.weight.detach() for layer in layers]), rows)
        bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        return functools.partial(torch.ops.mkldnn._linear_pointwise, W=weight, B=bias, attr="none", scalars=[], algorithm="")

    def together(*layers):
        whole, sizes = product(*layers), [layer.out_features for layer in layers]
        return lambda x: whole(x).split(sizes, dim=-1)

    for layer in copy.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.project, attention.o_proj.forward = together(attention.q_proj, attention.k_proj, attention.v_proj), product(attention.o_proj)
        mlp.project, mlp.down_proj.forward = together(mlp.gate_proj, mlp.up_proj), product(mlp.down_proj)
    copy.lm_head.forward = product(copy.lm_head)
    return copy


def prefill_batches(jobs, prompts, most):
    """Split sorted jobs into lists whose prompts, padded, have at most `most` tokens or are one."""
    batches, last, count, longest = [], None, 0, 0
    for i, j in jobs:
        if i != last:
            last, count, longest = i, count + 1, max(longest, len(prompts[i]))
            if not batches or count * longest > most:
                batches.append([])
                count, longest = 1, len(prompts[i])
        batches[-1].append((i, j))
    return batches


def faults(config, prompts, ids, eos_ids, pad_id, max_new_tokens, n, temperatures, slots):
    """What `generate` cannot work with."""
    if min(n, slots, max_new_tokens) < 1:
        yield f"n {n}, slots {slots}, max_new_tokens {max_new_tokens}: each must be 1 or more"
    if len(temperatures) != n or not all(t == 0 or 1e-6 <= t <= 1e6 for t in temperatures):
        yield f"temperatures {temperatures[:16]}: not {n} numbers, 0 (greedy) or 1e-6 to 1e6 each"
    if not len(prompts) == len(ids) == len(set(ids)):
        yield f"{len(prompts)} prompts have {len(ids)} ids, {len(set(ids))} of them different"
    named = [(f"prompt {id_!r}", row) for id_, row in zip(ids, prompts)]
    for name, row in [("eos_ids", eos_ids or [pad_id]), ("pad_id", [pad_id]), *named]:
        if not row or min(row) < 0 or max(row) >= config.vocab_size:
            has = f"has ids from {min(row)} to {max(row)}" if row else "is empty"
            yield f"{name} {has}; the vocabulary is 0 to {config.vocab_size - 1}"
    name, row = max(named, key=lambda x: len(x[1]), default=("", []))
    if len(row) + max_new_tokens > config.max_position_embeddings:
        yield (f"{name}, the longest, has {len(row)} tokens: with {max_new_tokens} new ones they "
               f"exceed the model's {config.max_position_embeddings} positions")


def generate(model, prompts, *, eos_ids, pad_id, max_new_tokens, n=1, temperature=1.0, slots=256,
             seed=0, compile=None, ids=None):
    """Yield (prompt index, sample index, Sample) for n samples of each prompt, each as soon as it ends.

    Args:
        prompts: list of lists of token ids, none empty.
        temperature: one number, or n of them, one for each sample of a prompt. 0 is greedy.
        slots: sequences in flight; the KV cache holds slots * (longest prompt + max_new_tokens) positions.
            Where memory runs out, the samples that are left are drawn with half of them; no sample changes.
        seed: an int. A sample follows from it, its prompt's id and its index, nothing else.
        compile: the decode step, by torch.compile, as CUDA graphs on CUDA; None: on CUDA.
        ids: a str for each prompt, all different; None: "0", "1", ...
    Raises:
        ValueError: an argument is of no use, a sequence could outgrow the positions (`faults`).
        FloatingPointError: logits have no softmax; raised when their sequence has ended.
        torch.OutOfMemoryError: even one slot is too much.
    """
    temperatures = [temperature] * n if isinstance(temperature, (int, float)) else list(temperature)
    ids = list(map(str, range(len(prompts)))) if ids is None else ids
    told = prompts, ids, eos_ids, pad_id, max_new_tokens, n, temperatures, slots
    for fault in faults(model.config, *told):
        raise ValueError(fault)
    left = dict.fromkeys((i, j) for i in range(len(prompts)) for j in range(n))
    model, slots = in_arithmetic_dtype(model) if left else model, min(slots, len(left))
    prefill = PREFILL[model.head.device.type]
    while left:
        try:
            for i, j, s in engine(model, prompts, deque(left), ids, temperatures, max_new_tokens,
                                  slots, prefill, eos_ids, pad_id, seed, compile):
                del left[i, j]
                yield i, j, s
            continue
        except torch.OutOfMemoryError:
            if slots == 1:
                raise
        # Not inside `except`, where the traceback still holds the engine's tensors.
        slots, prefill = slots // 2, max(prefill // 2, 1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"\nout of memory: the other {len(left)} samples are drawn with --slots {slots}", file=sys.stderr)


@torch.inference_mode()
def engine(model, prompts, queue, ids, temperatures, max_new_tokens, slots, prefill, eos_ids,
           pad_id, seed, compile):
    """`generate` of the jobs in `queue`, a deque of (prompt index, sample index) in that order."""
    device, dtype, longest = model.head.device, model.head.dtype, max(len(prompts[i]) for i, _ in queue)
    compile = device.type == "cuda" if compile is None else compile
    step = compiled_step(device.type) if compile else decode_step
    B, limit, any_greedy = min(slots, len(queue)), max_new_tokens, 0 in temperatures
    pack_weights = device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and not compile
    decoder = packed(model, B) if pack_weights else model
    cache = KVCache(model.config, B, longest + limit, device, dtype)
    eos = torch.tensor(eos_ids, device=device)
    state = {"temperature": torch.zeros(B, device=device),                                   # of each slot
             "stream": torch.zeros(B, dtype=torch.long, device=device),                      # its random numbers
             "last": torch.full((B,), pad_id, device=device),                                # the token to feed next
             "position": torch.zeros(B, dtype=torch.long, device=device),                    # where the newest token stands
             "count": torch.zeros(B, dtype=torch.long, device=device),                       # tokens sampled so far
             "done": torch.ones(B, dtype=torch.bool, device=device),
             "tokens": torch.full((B, limit), pad_id, device=device),
             "logprobs": torch.zeros(B, limit, device=device)}

    held = {}                                                     # {prompt index: its cache and logits}: a prompt with samples still in the queue

    def fill(rows, jobs):
        """Start `jobs` in the slots `rows`: one prefill over their distinct prompts, or the one held, then the first token of each."""
        chosen = sorted({i for i, _ in jobs})
        lengths = torch.tensor([len(prompts[i]) for i in chosen])
        if chosen[0] in held:
            fresh, logits = held[chosen[0]]
        else:
            fresh = KVCache(model.config, len(chosen), int(lengths.max()), device, dtype)
            hidden = decoder.model(pack([prompts[i] for i in chosen], device), fresh)         # (all tokens, D)
            logits = decoder.lm_head(hidden[(lengths.cumsum(0) - 1).to(device)])              # (prompts, V)
            held.clear()
            if queue and queue[0][0] == chosen[-1]:
                row = KVCache(model.config, 1, fresh.v.shape[3], device, dtype)
                row.copy_rows(fresh, torch.tensor([len(chosen) - 1], device=device), torch.tensor([0], device=device))
                held[chosen[-1]] = row, logits[-1:].clone()
        index = {i: k for k, i in enumerate(chosen)}
        source = torch.tensor([index[i] for i, _ in jobs])
        state["position"][rows] = (lengths[source] - 1).to(device)
        source, rows = source.to(device), torch.tensor(rows, device=device)
        cache.copy_rows(fresh, source, rows)
        state["temperature"][rows] = torch.tensor([float(temperatures[j]) for _, j in jobs], device=device)
        streams = [stream_of(seed, ids[i], j) for i, j in jobs]
        state["stream"][rows] = torch.tensor(streams, device=device)
        state["count"][rows], state["done"][rows] = 0, False
        drawn = choose_by_rows(logits[source], state["temperature"][rows], uniform(state["stream"][rows], state["count"][rows]), any_greedy)
        record(state, rows, *drawn, eos, limit)

    owner = [None] * B                                            # (prompt index, sample index) in each slot
    steps, reach = 0, [0] * B                                     # reach[b] + steps: an upper bound of position[b], known without a sync
    check_every = 8 if device.type == "cuda" else 1               # looking at `done` waits for the device
    while True:
        if steps % check_every == 0:
            ended_rows = [b for b, is_done in enumerate(state["done"].tolist()) if is_done and owner[b] is not None]
            if ended_rows:
                rows = torch.tensor(ended_rows, device=device)
                ended = torch.isin(state["last"][rows], eos).tolist()
                lengths, row_tokens, row_logprobs = (state[name][rows].tolist() for name in ("count", "tokens", "logprobs"))
                state["position"][rows] = 0                       # an idle slot writes where nothing reads
                for b, length, stop, t, l in zip(ended_rows, lengths, ended, row_tokens, row_logprobs):
                    (i, j), owner[b] = owner[b], None
                    if math.isnan(sum(l[:length])):
                        raise FloatingPointError(f"prompt {ids[i]!r}, sample {j}: logits are not "
                                                 f"finite; a weight is not, or {dtype} overflows")
                    yield i, j, Sample(t[:length], l[:length], stop)
            free = [b for b in range(B) if owner[b] is None]
            if not queue and len(free) == B:
                return
            if queue and free and (len(free) >= B // 8 or len(free) >= len(queue)):  # an eighth at a time: prefills are worth batching
                jobs = [queue.popleft() for _ in range(min(len(free), len(queue)))]
                again = [job for job in jobs if job[0] in held]
                for batch in [again] * bool(again) + prefill_batches(jobs[len(again):], prompts, prefill):
                    rows, free = free[:len(batch)], free[len(batch):]
                    for b, job in zip(rows, batch):
                        owner[b], reach[b] = job, len(prompts[job[0]]) - steps
                    fill(rows, batch)
                continue                                          # one of them may have ended at its first token
            if not queue and not compile and len(free) >= B / 8:  # the last ones go on among themselves, in the first slots
                B -= len(free)
                source, target = [b for b, job in enumerate(owner) if job is not None and b >= B], [b for b in free if b < B]
                for to, b in zip(target, source):
                    owner[to], reach[to] = owner[b], reach[b]
                source, target = torch.tensor(source, dtype=torch.long, device=device), torch.tensor(target, dtype=torch.long, device=device)
                cache.copy_rows(cache, source, target)
                for x in state.values():
                    x[target] = x[source]
                cache, state, owner, reach = cache.rows(B), {name: x[:B] for name, x in state.items()}, owner[:B], reach[:B]
        steps += 1
        used = max(r for b, r in enumerate(reach) if owner[b] is not None) + steps
        # A compiled step wants one shape; an eager one need not read what is not there yet, but oneDNN prepares itself for each new length.
        step(decoder, cache if compile else cache.first(-(-used // 16) * 16), state, eos, limit, any_greedy)
