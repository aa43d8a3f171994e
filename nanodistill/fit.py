"""Will it fit? The memory of a stage by part, from its shapes, and the fastest settings that fit.

Weights, gradients and optimizer state are counted. The rest is measured: the model's own forward
and backward pass, prefill and decode step run on meta tensors, which have a shape and no memory,
and the bytes alive are added up. In each phase of a pass the most is linear in the layers, so that
models of two and of three layers stand for all. Not counted: CUDA's context, kernels' scratch, and
what the allocator loses at the ends of its blocks (2% at 135m); SPARE is for them.

`python -m data.dry_run` prints docs/memory.md's table "What fits which card".
"""

import bisect
import dataclasses
import functools
import os
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanodistill import generate, lora, losses, parallel
from nanodistill.batches import KVCache, Packed
from nanodistill.model import CausalLM, Config, ScalarModel
from nanodistill.presets import SIZES


BYTES = {torch.float32: 4, torch.bfloat16: 2}
SPARE = 0.1         # of what is free is not planned with: see "Not counted" above
CUBLAS = 2**25      # bytes that cuBLAS takes for each thread that calls it, on Hopper; less before
SCORED = 16         # sequences that eval.py scores at once
LEARN = ("sft", "rm", "rl")
# An assumption, measured nowhere: tokens of a pass whose arithmetic takes as long as what each pass
# takes whatever its size.
FIXED = {"cuda": 2048, "mps": 2048, "cpu": 100}
GBS = (24, 48, 80, 141)         # of the usual cards
USED = 1e9 * (1 - SPARE)        # of a card's GB, bytes that are planned with


# ---- measuring on meta tensors ----

class On(TorchFunctionMode):
    """Inside, meta tensors say that they lie on `device`, and its kernels are those that run."""
    IS_CPU, IS_CUDA = torch.Tensor.is_cpu.__get__, torch.Tensor.is_cuda.__get__

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == self.IS_CPU or function == self.IS_CUDA:
            return self.device == ("cpu" if function == self.IS_CPU else "cuda")
        if function is F.rms_norm and self.device == "cuda":
            # CUDA has one kernel for it, which keeps for backward what layer_norm's does.
            return F.layer_norm(*args, kwargs["weight"], None, kwargs["eps"])
        if function is F.scaled_dot_product_attention and self.device != "mps":
            # Flash attention keeps no (T, T) weights.
            flash = "_scaled_dot_product_flash_attention"
            if self.device == "cpu":
                return getattr(torch.ops.aten, flash + "_for_cpu")(*args, 0.0, True)[0]
            return getattr(torch.ops.aten, flash)(*args, 0.0, True)[0]
        return function(*args, **kwargs)

    def around(self, function, compiled=False):
        """`function`, run in this mode wherever it is called from. For backward it keeps what it
        would keep `compiled`."""
        def run(*args):
            with self, saved_tensors_hooks(keep, give_back) if compiled else nullcontext():
                return function(*args)
        return run


def keep(x):
    """What a compiled layer keeps of x: fp32 copies are made again from bf16, and the gate's silu
    is computed again (seen in torch 2.13: tests/test_fit.py)."""
    made_by = x.grad_fn.name() if x.grad_fn else ""
    if made_by == "ToCopyBackward0" and x.dtype == torch.float32:
        return x.to(torch.bfloat16), x.dtype
    return (x.shape, x.dtype) if made_by == "SiluBackward0" else (x, x.dtype)


def give_back(kept):
    x, dtype = kept
    return x.to(dtype) if isinstance(x, torch.Tensor) else torch.empty(
        x, dtype=dtype, device="meta")


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are made inside and alive, `now`, and the most of each phase."""

    def __init__(self, model):
        super().__init__()
        # A view of a weight is no new memory.
        self.alive = {p.untyped_storage()._cdata: None for p in model.parameters()}
        self.now, self.phase, self.peaks = 0, "", {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.alive:
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.alive[key] = weakref.ref(storage, lambda _, k=key, n=size: self.free(k, n))
                self.now += size
        # Autograd adds two gradients in place. Under a mode it makes a third, for that moment.
        if torch.is_grad_enabled() or function != torch.ops.aten.add.Tensor:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)
        return result

    def start(self, phase):
        self.phase = phase

    def free(self, key, size):
        del self.alive[key]
        self.now -= size


def key(config, layers):
    """A Config with this many layers and without tables of angles, as something that hashes."""
    return dataclasses.astuple(dataclasses.replace(
        config, num_hidden_layers=layers, max_position_embeddings=1, rope_scaling=None))


def most(peaks, config, *args):
    """The most bytes of the phases that `peaks(shape, *args)` measures, with all of the layers."""
    two, three = (peaks(key(config, layers), *args) for layers in (2, 3))
    return max(two[p] + (three[p] - two[p]) * (config.num_hidden_layers - 2) for p in two)


def on_meta(kind, shape, sequences, length, device):
    """A model of this shape, and packed sequences of `length` tokens, as `device` is given them."""
    with torch.device("meta"):
        positions = torch.arange(length).repeat(sequences)
        cells = torch.arange(sequences * length)
        packed = Packed(cells, positions, cells, [length] * sequences)
        if device == "cuda":
            packed.ends = torch.zeros(sequences + 1, dtype=torch.int32)
        return kind(Config(*shape)), packed


def as_fsdp2(model, shards, again):
    """Let a pass of `model`, its weights those gathered, take what FSDP2's does (as in torch 2.13:
    tests/test_fit.py). Returns a function that ends the pass.

    Two layers are gathered, and all that is in no layer. A layer's gradients are copied to fp32 at
    its end; the copies stay until the next one's, the process's part of their sum for good.
    """
    def empty(parameters, parts=1):
        return [torch.empty(p.numel() // parts, device="meta") for p in parameters]

    layers, copies = model.model.layers, []
    sums = empty(model.parameters(), shards) if again else []
    later = {*layers[2:].parameters()}
    gathered = [torch.empty_like(p) for p in model.parameters() if p not in later]

    def reduce(part, *_):
        made = [p for p in part.parameters() if p.grad is not None]
        copies.clear()
        copies.extend(empty(made))
        for p in made:
            p.grad = None
        own = empty(made, shards)
        sums.extend(own * (not again))

    def end():
        gathered.clear()
        reduce(model)

    for layer in layers:
        layer.register_full_backward_hook(reduce)
    return end


@functools.cache
def pass_peaks(shape, head, dtype, sequences, length, seen, checkpoint, again, rank, device,
               shards=1):
    """{phase: bytes} beyond the weights of a forward and backward pass, gradients counted.

    Args:
        head: "cross_entropy" or "logprobs" of the fused losses, or "scalar", of the last `seen`
            tokens of each sequence; or "scores", whose pass has no gradients.
        again: the pass adds to gradients that are there.
        rank: of the adapters; 0: all weights are trained.
        shards: processes that the weights are split over; what is gathered is counted then.
    """
    kind = ScalarModel if head in ("scalar", "scores") else CausalLM
    model, packed = on_meta(kind, shape, sequences, length, device)
    model.to(dtype if head == "scores" or rank or shards > 1 else torch.float32)
    if rank:
        lora.adapt(model, rank)
    model.model.dtype, model.model.checkpoint = dtype, checkpoint
    for layer in model.model.layers:           # backward leaves the mode, and may run them again
        layer.forward = On(device).around(
            layer.forward, compiled=device == "cuda" and not (checkpoint or rank))
    with On(device), Peak(model) as memory, torch.set_grad_enabled(head != "scores"):
        def embedded(_, __, x):
            if x.requires_grad:
                x.register_hook(lambda _: memory.start("embedding"))
        model.model.embed_tokens.register_forward_hook(embedded)
        for p in model.parameters() if shards == 1 else ():
            p.grad = torch.zeros_like(p) if again and p.requires_grad else None
        if shards > 1:
            end = as_fsdp2(model, shards, again)
        hidden = model.model(packed)
        if head != "scores":
            hidden.register_hook(lambda _: memory.start("layers"))
        hidden = hidden.index_select(0, packed.ids.new_zeros(sequences * seen))
        targets = packed.ids.new_zeros(len(hidden))
        if kind is ScalarModel:
            loss = model.score(hidden).float().sum()
        elif head == "logprobs":
            loss = losses.linear_logprobs(hidden, model.head, targets, ignore_index=None)[0].sum()
        else:
            loss = losses.linear_cross_entropy(hidden, model.head, targets, 1, None)
        del hidden
        if head != "scores":
            loss.backward()
        if shards > 1:
            memory.start("rest")
            end()
        return memory.peaks


@functools.cache
def sampling_peaks(shape, dtype, slots, prompt, response, rank, device):
    """{phase: bytes} beyond the weights of `generate`: KV cache, state, prefill, decode step."""
    prompts = min(slots, max(generate.PREFILL[device] // prompt, 1))
    model, packed = on_meta(CausalLM, shape, prompts, prompt, device)
    model = model.to(dtype).requires_grad_(False)
    if rank:
        lora.adapt(model, rank)
    with On(device), Peak(model) as memory, torch.inference_mode(), torch.device("meta"):
        rows, u = torch.zeros(slots, dtype=torch.long), torch.zeros(slots)
        state = generate.Slots.empty(slots, response, 0, "meta")
        positions = generate.positions_for(prompt + response, device)
        cache = KVCache(model.config, slots, positions, "meta", dtype)
        fresh = packed.cache = KVCache(model.config, prompts, prompt, "meta", dtype)
        memory.start("prefill")
        logits = model.lm_head(model.model(packed)[:prompts])
        memory.start("copy")
        cache.copy_rows(fresh, rows, rows)
        memory.start("first token")
        generate.choose(logits[rows], u, u)
        del fresh, packed, logits
        memory.start("decode")
        generate.decode_step(model, cache, state, rows[:1])
        return memory.peaks


# ---- the plan ----

@functools.cache
def count(kind, shape, rank):
    with torch.device("meta"):
        model = kind(Config(*shape))
        parameters = lora.trained(lora.adapt(model, rank)).values() if rank else model.parameters()
        return sum(p.numel() for p in parameters)


def parameters(config, kind=CausalLM, rank=0):
    """How many a model has, a tied head once; with a `rank`, those that are trained of it."""
    return count(kind, key(config, config.num_hidden_layers), rank)


def taking_part(config):
    """Which of "rl"'s models do its algorithm and its reward need? Two flags of `plan`."""
    return {"scored": getattr(config, "reward", "model") == "model",
            "valued": getattr(config, "algorithm", "ppo") == "ppo"}


def plan(stage, shape, dtype, *, batch, micro_batch, slots, prompt, response, checkpoint=False,
         rank=0, device="cuda", world=1, shards=1, scored=True, valued=True, reference=None):
    """{part: bytes} of a stage in each process, "peak" the most at one time. Trained weights are
    fp32.

    Args:
        stage: "teacher", "sft", "rm", "rl" or "eval".
        dtype: of the arithmetic and of frozen weights.
        batch: sequences an optimizer step accumulates over; for "eval" micro_batch of them are
            scored at once.
        prompt, response: tokens of the longest of each.
        rank: of LoRA's adapters, on one frozen trunk; 0: all weights are trained.
        device: "cuda", "mps" or "cpu".
        world: processes; each takes its part of a batch.
        shards: how many of them the weights are split over, as parallel.shard does.
        scored, valued: of "rl", is there a reward model, a value model?
        reference: of "rl", the Config of a reference that is not the student.
    """
    if stage in LEARN:
        batch = -(-batch // world)
    length, size = prompt + response, BYTES[dtype]
    cuda, cpu, bf16 = device == "cuda", device == "cpu", dtype == torch.bfloat16
    causal, scalar = parameters(shape), parameters(shape, ScalarModel)
    policy, value = parameters(shape, rank=rank), parameters(shape, ScalarModel, rank)
    # (parameters, head, tokens of a sequence, those that the head sees) of what is trained.
    trained = {"sft": [(policy, "cross_entropy", length - 1, response)],
               "rm": [(value, "scalar", length, response + 1)],
               "rl": [(policy, "logprobs", length - 1, response),
                      (value, "scalar", length - 1, response)][:1 + valued]}.get(stage, [])
    reference = reference or shape
    frozen = {"teacher": [causal], "eval": [causal],
              "rl": [parameters(reference), scalar][:1 + scored]}.get(stage, [])
    learned, stored = sum(n for n, *_ in trained), size * sum(frozen)
    if rank and stage in LEARN:
        # One trunk; of the reward model, its adapters and its head beside it.
        stored = size * (scalar if stage == "rm" else causal)
        stored += 4 * value * (stage == "rl" and scored)
    learned, stored = -(-learned // shards), -(-stored // shards)
    models = {"rl": [reference] + [shape] * (1 + scored + valued)}.get(stage, [shape])
    angles = sum(4 * m.max_position_embeddings * m.head_dim for m in models)
    parts = {"weights": 4 * learned + stored + angles,
             "best weights": 4 * learned if cpu and stage == "rm" else 0,
             "optimizer": 8 * learned, "gradients": 4 * learned, "activations": 0,
             "sampler's weights": 0, "KV cache": 0, "sampling": 0}
    held = parts["weights"] + parts["best weights"] + parts["optimizer"]
    if trained:
        # Where gradients are added to, those of all models are there; else the value model's are
        # made while the policy's are there. Held-out scoring makes none, and takes less.
        again = micro_batch < batch
        passes = [most(pass_peaks, shape, head, dtype, min(micro_batch, batch), tokens, seen,
                       checkpoint, again, rank, device, shards)
                  for _, head, tokens, seen in trained]
        beside = [learned - n // shards if again else i * policy // shards
                  for i, (n, *_) in enumerate(trained)]
        parts["activations"] = 2 * CUBLAS * cuda - parts["gradients"] + max(
            own + 4 * n for own, n in zip(passes, beside))
        if reference != shape:
            # Its pass makes no gradients, and comes before there are any.
            parts["activations"] = max(parts["activations"], most(
                pass_peaks, reference, "scores", dtype, min(micro_batch, batch), length, 1, False,
                False, 0, device) - parts["gradients"])
    elif stage == "eval":
        parts["activations"] = CUBLAS * cuda + most(
            pass_peaks, shape, "scores", dtype, micro_batch, length, 1, False, False, 0,
            device)
    if stage != "sft":
        # rm samples the SFT student before its own weights are there. In bf16 on CPU `generate`
        # packs the matrices anew, of which an untied embedding is none.
        embedding = shape.vocab_size * shape.hidden_size * (not shape.tie_word_embeddings)
        parts["sampler's weights"] = size * (causal * (stage == "rm" or stage == "rl" and not rank
                                                       and (bf16 or shards > 1))
                                             + (causal - embedding) * (cpu and bf16))
        positions = generate.positions_for(length, device)
        cache = KVCache(shape, slots, positions, "meta", dtype)
        parts["KV cache"] = sum(x.nbytes for x in cache.k + cache.v)
        parts["sampling"] = CUBLAS * cuda - parts["KV cache"] + most(
            sampling_peaks, shape, dtype, slots, prompt, response, rank * (stage == "rl"), device)
    sampler = parts["sampler's weights"] + parts["KV cache"] + parts["sampling"]
    parts["peak"] = max(held + parts["gradients"] + parts["activations"],
                        sampler + held * (stage != "rm"))
    return parts


# ---- the device, what is free on it, and what fits ----

def pick_device(name):
    """The torch.device that `--device` means: of several processes each has a GPU of its own.
    Raises ValueError where there is none of its kind."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
              "cpu": True}
    if name == "auto":
        name = next(kind for kind in usable if usable[kind])
    if not usable[name]:
        why = f"this PyTorch ({torch.__version__}) is not built for it" if name == "mps" or not \
            torch.backends.cuda.is_built() else "PyTorch finds no card (look at nvidia-smi)"
        raise ValueError(f"--device {name}: {why}. --device auto takes what is there")
    if name == "cuda" and parallel.world() > 1:
        if parallel.local_world() > torch.cuda.device_count():
            raise ValueError(f"torchrun started {parallel.local_world()} processes here, and there "
                             f"are {torch.cuda.device_count()} GPUs: --nproc-per-node says how "
                             "many it starts")
        return torch.device("cuda", parallel.local_rank())
    return torch.device(name)


def pick_dtype(name, device):
    """The dtype of the arithmetic that `--dtype` means on a device."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def free_memory(root=Path("/")):
    """Bytes of main memory that are free, within what the process's control groups allow."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:                                              # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for _, controllers, path in (line.split(":", 2) for line in groups):
        first = controllers == "memory"                          # of version 1; "" is version 2
        top = root / "sys/fs/cgroup" / controllers
        limit, used, cache = (("memory.limit_in_bytes", "memory.usage_in_bytes",
                               "total_inactive_file") if first else
                              ("memory.max", "memory.current", "inactive_file"))
        for group in (top / path.strip("/"), *(top / path.strip("/")).parents):
            try:
                stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
                free = min(free, int((group / limit).read_text()) + int(stat[cache])
                           - int((group / used).read_text()))
            except (OSError, ValueError, KeyError):              # not here, or "max"
                pass
    return free


def free_bytes(device):
    """Bytes that a process may take on `device` now: what is free, but for SPARE."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    else:
        free = free_memory() // parallel.local_world()
    return int(free * (1 - SPARE))


@dataclass(frozen=True)
class Choice:
    """What a stage takes, the bytes of its plan's peak, and a line that says it."""
    slots: int
    micro_batch: int
    checkpoint: bool
    peak: int
    line: str
    shards: int = 1


def processes(gpus=0):
    """`choose`'s world and local: as torchrun says, or as on so many `gpus`, eight a machine."""
    return {"world": gpus or parallel.world(),
            "local": min(gpus, 8) or parallel.local_world()}


def asked(config, gpus=0):
    """What a stage's flags say to `choose`, and its processes (`gpus`: of `processes`)."""
    return {"slots": config.slots, "micro_batch": getattr(config, "micro_batch", 0),
            "checkpoint": getattr(config, "checkpoint", None), "rank": config.lora,
            "shards": config.shards, **taking_part(config), **processes(gpus)}


def flags(stage, micro_batch, checkpoint, slots):
    """The three settings as they are typed, those that the stage has."""
    learn = f"--micro-batch {micro_batch} --{'' if checkpoint else 'no-'}checkpoint"
    return " ".join([learn] * (stage in LEARN) + [f"--slots {slots}"] * (stage != "sft"))


def choose(stage, shape, dtype, free, *, batch=0, prompt, response, jobs=0, device="cuda", slots=0,
           micro_batch=0, checkpoint=None, rank=0, world=1, local=1, shards=0, **models):
    """The fastest settings whose plan takes at most `free` bytes in each process; those given stay.
    Weights are split only where they must be: over one machine's processes, or else over all.

    Args:
        batch: sequences an optimizer step; micro_batch divides it where stage is "rl".
        jobs: samples that will be drawn.
        world, local: processes, and those of one machine. shards: as `plan` takes it; 0: chosen.
        models: `plan`'s scored, valued and reference.
    Raises:
        ValueError: nothing fits; says what the least takes and what would fit.
    """
    batch, jobs = batch or SCORED, -(-jobs // world)
    if stage in LEARN:
        batch = -(-batch // world)
    sizes = [batch >> k for k in range(batch.bit_length())]
    if stage == "rl":
        sizes = [b for b in range(batch, 0, -1) if batch % b == 0]
    if micro_batch or stage not in LEARN:
        sizes = [min(micro_batch or batch, batch)]
    counts = [slots] if slots else [2**k for k in range(8, -1, -1) if k == 0 or 2**(k - 1) < jobs]
    checkpoints = [False, True] if stage in LEARN and checkpoint is None else [bool(checkpoint)]
    may_split = stage in LEARN and not rank
    splits = [*dict.fromkeys([shards] if shards else [1, local, world])] if may_split else [1]

    def peak(b, again, s, shards=splits[-1], shape=shape, response=response):
        return plan(stage, shape, dtype, batch=batch, micro_batch=b, slots=s, prompt=prompt,
                    response=response, checkpoint=again, rank=rank, device=device,
                    shards=shards, **models)["peak"]

    def seconds(b, again):
        """Of a sequence, in units of its arithmetic's."""
        return (4 / 3 if again else 1) * (1 + FIXED[device] / (b * (prompt + response)))

    def largest(values, fits):
        """The first of `values`, which fall, that fits; None if none does."""
        i = 0 if fits(values[0]) else bisect.bisect_left(values, True, key=fits)
        return values[i] if i < len(values) else None

    def fastest(shards):
        best = None                                          # (seconds, micro-batch, checkpoint)
        for again in checkpoints:
            if best is None or seconds(sizes[0], again) < best[0]:
                b = largest(sizes, lambda b, again=again:
                            peak(b, again, counts[-1], shards) <= free)
                best = min(filter(None, (best, b and (seconds(b, again), b, again))), default=None)
        if best:
            _, b, again = best
            s = largest(counts, lambda s: peak(b, again, s, shards) <= free)
            most = peak(b, again, s, shards)
            split = f", weights split over {shards} processes" * (shards > 1)
            return Choice(s, b, again, most, f"fitted to {free / 1e9:.1f} GB free: "
                          f"{flags(stage, b, again, s)}, {most / 1e9:.1f} GB at most{split}",
                          shards)

    choice = next(filter(None, map(fastest, splits)), None)
    if choice:
        return choice

    least = sizes[-1], checkpoints[-1], counts[-1]
    need, role = peak(*least), "teacher" if stage == "teacher" else "student"
    names = [n for n, size in SIZES.items() if (size.as_student or role == "teacher")
             and parameters(size.shape) < parameters(shape)]
    names.sort(key=lambda n: -parameters(SIZES[n].shape))
    would = [
        "what is chosen where --slots, --micro-batch and --checkpoint are not given" * (
            peak(1 if stage in LEARN else batch, stage in LEARN, 1) <= free),
        next((f"--{role} {n}" for n in names if peak(*least, shape=SIZES[n].shape) <= free), ""),
        f"--shards {world}" * (may_split and splits[-1] < world and peak(*least, world) <= free),
        next((f"torchrun with {n} GPUs" for n in (2, 4, 8, 16, 32, 64) if n > world
              and may_split and not shards and device == "cuda" and peak(*least, n) <= free), ""),
        next((f"--max-new-tokens {n}" for n in (256, 128, 64)
              if n < response and peak(*least, response=n) <= free), ""),
        f"{next((gb for gb in GBS if need <= gb * USED), int(need / USED) + 1)} GB of memory"]
    raise ValueError(f"{stage} does not fit: {flags(stage, *least)} takes {need / 1e9:.1f} GB, and "
                     f"{free / 1e9:.1f} GB are free on {device}.\n"
                     f"What would fit: {', or '.join(filter(None, would))}.")
