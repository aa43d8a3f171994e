"""Sampling from a CausalLM: a KV cache, slots refilled as sequences end, one prefill per prompt.

The engine keeps `slots` sequences in flight. A slot whose sequence has ended (EOS, or the length
limit) is handed to the next one in the queue while the others go on, so a long response does not
hold up a batch of short ones. When the queue is empty, the slots become fewer. A
prompt is run through the model once, packed with others so that none is padded; its keys and values
are then copied to every slot that samples from it.

The sampled distribution is softmax(logits / temperature) over the whole vocabulary, with no top-k
or top-p, and the logprobs returned are of that distribution: what PPO needs for its ratio to start
at 1. Each sample has a random stream of its own, which follows from the seed, the prompt's id and
the sample's index. Neither slots nor batch mates change what is drawn (but for the rounding of
matrix products of other shapes).

`python -m nanodistill.generate FOLDER "question"` is ask.py: one model's answers.
"""

import math
import runpy
import sys
from collections import deque, namedtuple
from dataclasses import dataclass

import torch

from nanodistill import cpu, lora, parallel
from nanodistill.batches import KVCache, NewTokens, on_device, pack
from nanodistill.model import CausalLM
from nanodistill.sampling import choose, stream_of, uniform


# Prompts times the longest's tokens: more take memory and, where they leave the CPU's cache, time.
PREFILL = {"cpu": 2**11, "cuda": 2**14, "mps": 2**12}
# The decode step sees a multiple of this many cache positions: each new number makes oneDNN prepare
# itself on CPU, and records a graph on CUDA.
STRIDE = {"cpu": 16, "cuda": 256, "mps": 16}
# What is to be drawn: sample `sample` of prompt number `index`, with its random stream.
Job = namedtuple("Job", "index sample id prompt temperature stream")


@dataclass
class Sample:
    """One response: `tokens`, with the EOS if it `ended`, and a logprob per token, at the sampling
    temperature."""
    tokens: list
    logprobs: list
    ended: bool


# ---- what a step needs, in tensors ----

@dataclass
class Slots:
    """What the device holds of B sequences in flight: tensors of fixed shape, changed in place, so
    that one CUDA graph of the step serves them all."""
    temperature: torch.Tensor              # (B,) 0 = greedy
    stream: torch.Tensor                   # (B,) int64, of the sample in this slot
    last: torch.Tensor                     # (B,) int64, the token to feed next
    position: torch.Tensor                 # (B,) int64, of the last token in the cache
    count: torch.Tensor                    # (B,) int64, tokens sampled so far
    done: torch.Tensor                     # (B,) bool: ended, or free
    tokens: torch.Tensor                   # (B, limit) int64
    logprobs: torch.Tensor                 # (B, limit)

    @classmethod
    def empty(cls, B, limit, pad_id, device):
        def ints(*shape, fill=0):
            return torch.full(shape, fill, dtype=torch.long, device=device)
        return cls(temperature=torch.zeros(B, device=device), stream=ints(B),
                   last=ints(B, fill=pad_id), position=ints(B), count=ints(B),
                   done=torch.ones(B, dtype=torch.bool, device=device),
                   tokens=ints(B, limit, fill=pad_id),
                   logprobs=torch.zeros(B, limit, device=device))

    def record(self, rows, new, new_logprobs, eos):
        """Append one token to each of `rows`; a row that was already done stays as it is."""
        limit, going, count = self.tokens.shape[1], ~self.done[rows], self.count[rows]
        at = count.clamp(max=limit - 1)[:, None]                       # (rows, 1)
        for mine, value in ((self.tokens, new), (self.logprobs, new_logprobs)):
            old = mine[rows]
            kept = torch.where(going, value, old.gather(1, at).squeeze(1))
            mine[rows] = old.scatter(1, at, kept[:, None])
        self.last[rows] = torch.where(going, new, self.last[rows])
        self.done[rows] |= (new[:, None] == eos).any(dim=1) | (count + 1 >= limit)
        # Last, for `count` may be a view of self.count.
        self.count[rows] = count + going


def decode_step(model, cache, slots, eos, any_greedy=True):
    """One token more for every slot that is not done. Nothing here waits for the device."""
    slots.position.add_(~slots.done)
    hidden = model.model(NewTokens(slots.last, slots.position, cache))                 # (B, D)
    drawn = choose(model.lm_head(hidden), slots.temperature,
                   uniform(slots.stream, slots.count), any_greedy)
    slots.record(slice(None), *drawn, eos)


def recorded(step, pool):
    """A CUDA graph of what `step` launches on tensors that stay where they are; it is not run.

    pool: of memory for what a step makes and drops, which graphs may share.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph


def positions_for(tokens, device):
    """The positions of the cache that hold so many tokens: a multiple of the device's STRIDE."""
    return -(-tokens // STRIDE[device]) * STRIDE[device]


def copy_of(model, dtype):
    """Another CausalLM on the same weights, or on copies of those that are not in `dtype` or split;
    adapters are merged."""
    with torch.device("meta"):
        copy = CausalLM(model.config)
    weights = {name: parallel.whole(w.to(dtype)) for name, w in lora.merged(model)}
    copy.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        copy.lm_head.weight = copy.model.embed_tokens.weight
    return copy


# ---- the engine ----

def prefill_batches(jobs, most):
    """Split `jobs`, in the order of their prompts, into lists.

    The distinct prompts of a list, padded, have at most `most` tokens, or are one.
    """
    batches, last, count, longest = [], None, 0, 0
    for job in jobs:
        if job.index != last:
            last, count, longest = job.index, count + 1, max(longest, len(job.prompt))
            if not batches or count * longest > most:
                batches.append([])
                count, longest = 1, len(job.prompt)
        batches[-1].append(job)
    return batches


class Engine:
    """A queue of jobs, the slots they are drawn in, and what is done between two tokens."""

    def __init__(self, model, jobs, slots, limit, prefill, eos_ids, pad_id, graphs):
        self.queue, self.prefill_tokens = deque(jobs), prefill
        self.config, self.dtype, self.device = model.config, model.head.dtype, model.head.device
        self.any_greedy = any(job.temperature == 0 for job in jobs)
        B, longest = min(slots, len(jobs)), max(len(job.prompt) for job in jobs)
        if cpu.helps(model.head):
            model = copy_of(model, self.dtype)
            cpu.pack_weights(model, B)
        else:
            model = lora.cast(model, self.dtype)
        self.model, self.eos = model, torch.tensor(eos_ids, device=self.device)
        self.cache = self.new_cache(B, positions_for(longest + limit, self.device.type))
        self.slots = Slots.empty(B, limit, pad_id, self.device)
        self.owner = [None] * B                                        # the Job in each slot
        # Slot b has filled offset[b] + steps positions of the cache, or fewer: known without asking
        # the device.
        self.steps, self.offset = 0, [0] * B
        # {index: cache and logits} of the prompt that still has samples in the queue.
        self.held = {}
        # {(slots, cache positions): the step's CUDA graph, or None where it has run once, eagerly}.
        self.graphs = {} if graphs else None
        self.pool = torch.cuda.graph_pool_handle() if graphs else None

    def new_cache(self, rows, length):
        return KVCache(self.config, rows, length, self.device, self.dtype)

    def free(self):
        return [b for b, job in enumerate(self.owner) if job is None]

    def harvest(self):
        """Yield (job, Sample) of the slots that have ended, and free them. Waits for the device."""
        done = self.slots.done.tolist()
        ended = [b for b, job in enumerate(self.owner) if job is not None and done[b]]
        if not ended:
            return
        rows, = on_device(self.device, ended)
        stopped = torch.isin(self.slots.last[rows], self.eos).tolist()
        counts, tokens = self.slots.count[rows].tolist(), self.slots.tokens[rows].tolist()
        logprobs = self.slots.logprobs[rows].tolist()
        # A free slot goes on writing, at position 0 of its own row.
        self.slots.position.index_fill_(0, rows, 0)
        for k, b in enumerate(ended):
            job, n, self.owner[b] = self.owner[b], counts[k], None
            if math.isnan(sum(logprobs[k][:n])):
                raise FloatingPointError(
                    f"prompt {job.id!r}, sample {job.sample}: logits are not finite; a weight is "
                    f"not, or {self.dtype} overflows")
            yield job, Sample(tokens[k][:n], logprobs[k][:n], stopped[k])

    def admit(self):
        """Start queued jobs in free slots. True if it did: their first token may be the last.

        It waits until an eighth of the slots is free: prefills are worth batching.
        """
        free = self.free()
        if not free or not self.queue or len(free) < min(len(self.owner) // 8, len(self.queue)):
            return False
        jobs = [self.queue.popleft() for _ in range(min(len(free), len(self.queue)))]
        again = [job for job in jobs if job.index in self.held]
        batches = prefill_batches(jobs[len(again):], self.prefill_tokens)
        for batch in filter(None, [again, *batches]):
            rows, free = free[:len(batch)], free[len(batch):]
            for b, job in zip(rows, batch):
                self.owner[b], self.offset[b] = job, len(job.prompt) - self.steps
            self.start(rows, batch)
        return True

    def start(self, rows, jobs):
        """Put `jobs` into the slots `rows`, and draw the first token of each."""
        prompts = {job.index: job.prompt for job in jobs}
        first = next(iter(prompts))
        fresh, logits = self.held[first] if first in self.held else self.prefill(prompts)

        place = {index: k for k, index in enumerate(prompts)}
        source, rows, streams, positions = on_device(
            self.device, [place[job.index] for job in jobs], rows, [job.stream for job in jobs],
            [len(job.prompt) - 1 for job in jobs])                     # (jobs,) each
        temperatures, = on_device(self.device, [job.temperature for job in jobs])
        self.cache.copy_rows(fresh, source, rows)
        slots = self.slots
        slots.temperature[rows] = temperatures
        slots.stream[rows], slots.position[rows] = streams, positions
        # `x[rows] = 0` would copy the 0 to the device and wait.
        slots.count.index_fill_(0, rows, 0)
        slots.done.index_fill_(0, rows, False)
        drawn = choose(logits[source], slots.temperature[rows],
                       uniform(slots.stream[rows], slots.count[rows]), self.any_greedy)
        slots.record(rows, *drawn, self.eos)

    def prefill(self, prompts):
        """Run {index: prompt} through the model -> a cache, and the logits of each next token.

        The last prompt's are kept while the queue has more samples of it.
        """
        fresh = self.new_cache(len(prompts), max(map(len, prompts.values())))
        packed = pack(list(prompts.values()), self.device, fresh)
        hidden = self.model.model(packed)                              # (N, D)
        logits = self.model.lm_head(hidden[packed.last])               # (prompts, V)
        self.held, last = {}, list(prompts)[-1]
        if self.queue and self.queue[0].index == last:
            row = self.new_cache(1, fresh.length)
            row.copy_rows(fresh, slice(-1, None), slice(0, 1))
            self.held[last] = row, logits[-1:].clone()
        return fresh, logits

    def shrink(self):
        """With the queue empty and an eighth of the slots free, go on in the first slots alone.

        With graphs it waits for a half: each number of slots needs its own.
        """
        free = self.free()
        if self.queue or len(free) < len(self.owner) / (8 if self.graphs is None else 2):
            return
        B = len(self.owner) - len(free)
        source = [b for b, job in enumerate(self.owner) if job is not None and b >= B]
        target = [b for b in free if b < B]
        for to, b in zip(target, source):
            self.owner[to], self.offset[to] = self.owner[b], self.offset[b]
        if source:
            source, target = on_device(self.device, source, target)
            self.cache.copy_rows(self.cache, source, target)
            for x in vars(self.slots).values():
                x[target] = x[source]
        self.slots = Slots(*(x[:B] for x in vars(self.slots).values()))
        self.cache = self.cache.view(B, self.cache.length)
        self.owner, self.offset = self.owner[:B], self.offset[:B]

    def step(self):
        """One token more in every slot."""
        self.steps += 1
        used = self.steps + max(n for n, job in zip(self.offset, self.owner) if job is not None)
        # What is not there yet need not be read; each new length costs something: see STRIDE. Ended
        # slots may count past the cache.
        length = min(positions_for(used, self.device.type), self.cache.length)
        shape = len(self.owner), length

        # A function, for a replay needs none of the cache's views.
        def step():
            decode_step(self.model, self.cache.view(*shape), self.slots, self.eos, self.any_greedy)
        if self.graphs is None:
            step()
        elif shape not in self.graphs:
            # Run once first: a kernel's first launch loads it, which cannot be recorded.
            self.graphs[shape] = step()
        else:
            if self.graphs[shape] is None:
                self.graphs[shape] = recorded(step, self.pool)
            self.graphs[shape].replay()


@torch.inference_mode()
def run(model, jobs, *args):
    """Yield (Job, Sample) of all `jobs`, which are in the order of their prompts."""
    engine = Engine(model, jobs, *args)
    while True:
        yield from engine.harvest()
        if engine.admit():
            continue
        if len(engine.free()) == len(engine.owner):
            return
        engine.shrink()
        # To look for ended sequences waits for the device.
        for _ in range(8 if engine.device.type == "cuda" else 1):
            engine.step()


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
             seed=0, graphs=None, ids=None):
    """Yield (prompt index, sample index, Sample) for n samples of each prompt, each as it ends.

    Args:
        prompts: list of lists of token ids, none empty.
        temperature: one number, or n of them, one for each sample of a prompt. 0 is greedy.
        slots: sequences in flight; the KV cache holds slots * (longest prompt + max_new_tokens)
            positions. Where a GPU's memory runs out, the samples that are left are drawn with half
            of them; no sample changes.
        seed: an int. A sample follows from it, its prompt's id and its index, nothing else.
        graphs: run the decode step as CUDA graphs, which launch its thousand or so kernels at once;
            None: where the model is on the current CUDA device.
        ids: a str for each prompt, all different; None: "0", "1", ...
    Raises:
        ValueError: an argument is of no use, a sequence could outgrow the positions (`faults`).
        FloatingPointError: logits have no softmax; raised when their sequence has ended.
        torch.OutOfMemoryError: even one slot is too much.
    """
    temperatures = [temperature] * n if isinstance(temperature, (int, float)) else list(temperature)
    ids = list(map(str, range(len(prompts)))) if ids is None else ids
    fault = next(faults(model.config, prompts, ids, eos_ids, pad_id, max_new_tokens, n,
                        temperatures, slots), None)
    if fault:
        raise ValueError(fault)
    left = {(i, j): Job(i, j, ids[i], prompt, float(temperatures[j]), stream_of(seed, ids[i], j))
            for i, prompt in enumerate(prompts) for j in range(n)}
    dtype = model.model.dtype or model.head.dtype
    # Split weights are put together, by all processes, whatever is left to each. Weights in another
    # dtype would be cast anew in each step.
    if parallel.sharded(model.head) or left and dtype != model.head.dtype:
        model = copy_of(model, dtype)
    device, slots = model.head.device.type, min(slots, len(left))
    # A graph is recorded from a stream of the current device.
    current = device == "cuda" and model.head.get_device() == torch.cuda.current_device()
    prefill, graphs = PREFILL[device], current if graphs is None else graphs
    while left:
        try:
            for job, sample in run(model, list(left.values()), slots, max_new_tokens, prefill,
                                   eos_ids, pad_id, graphs):
                del left[job.index, job.sample]
                yield job.index, job.sample, sample
            return
        except torch.OutOfMemoryError:
            if slots == 1:
                raise
        # Not inside `except`, where the traceback still holds the engine's tensors.
        slots, prefill = slots // 2, max(prefill // 2, 1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"\nout of memory: the other {len(left)} samples are drawn with --slots {slots}",
              file=sys.stderr)


@torch.inference_mode()
def stream(model, prompt, *, eos_ids, pad_id, max_new_tokens, temperature=0.0, seed=0, id_="0"):
    """Yield the tokens of one sample as they come: those of `generate`'s sample 0 of prompt `id_`,
    its errors too. model: with its weights in the dtype of the arithmetic."""
    fault = next(faults(model.config, [prompt], [id_], eos_ids, pad_id, max_new_tokens, 1,
                        [temperature], 1), None)
    if fault:
        raise ValueError(fault)
    job = Job(0, 0, id_, prompt, float(temperature), stream_of(seed, id_, 0))
    engine = Engine(model, [job], 1, max_new_tokens, PREFILL[model.head.device.type], eos_ids,
                    pad_id, graphs=False)
    engine.admit()
    while True:
        yield engine.slots.last.item()
        if list(engine.harvest()):
            return
        engine.step()


def sample_all(model, prompts, n=1, **how):
    """`generate`, whose prompts are dealt out to the processes: -> the Samples of all, in every
    process, n of each prompt in turn. No sample depends on the number of processes."""
    mine = parallel.deal(range(len(prompts)))
    done = generate(model, [prompts[i] for i in mine], ids=[*map(str, mine)], n=n, **how)
    done = {(mine[k], j): sample for k, j, sample in done}
    done = {at: sample for part in parallel.gather(done) for at, sample in part.items()}
    return [done[at] for at in sorted(done)]


def respond(model, tokenizer, prompts, **how):
    """`generate` for {id: prompt ids}: yields (id, sample index, text, Sample), each as it ends.

    how: what else `generate` takes, less the ids of its tokens.
    """
    ids = list(prompts)
    samples = generate(model, list(prompts.values()), ids=ids, eos_ids=tokenizer.eos_ids,
                       pad_id=tokenizer.pad_id, **how)
    for i, j, sample in samples:
        yield ids[i], j, tokenizer.decode(sample.tokens), sample


if __name__ == "__main__":
    # ask.py needs fit.py, which measures what is above: it can't be imported here.
    runpy.run_module("nanodistill.ask", run_name="__main__")
