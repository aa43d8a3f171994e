"""Is the memory that fit.py plans what a stage takes of a CUDA device?

    python bench/plan.py                                    135m and 1b, each with and without LoRA
    python bench/plan.py --sizes 3b --stages sft rm --micro-batch 8 --gb 141
    python bench/plan.py --sizes 8b --ranks 0 --shards 8    one of 8 processes, with its weights

Backs docs/log.md's tables of the planner. The peaks are the caching allocator's, of the stages' own
functions on random weights: sequences of 256 + 512 tokens, batches of 64. Needs a card, or the stub
of one that bench/gpu.py describes, whose memory is "emulated".
"""

import contextlib
import ctypes
import gc
import itertools
import os
from unittest import mock

import common
import torch

import train_rl
import train_rm
import train_sft
from nanodistill import fit, generate, lora, optim, parallel, run, weights
from nanodistill.model import CausalLM, ScalarModel, init_weights
from nanodistill.presets import SIZES
from nanodistill.reward import score_sequences


STUB = ctypes.CDLL(os.environ["FAKE_CUDA"] + "/libcuda.so.1") if "FAKE_CUDA" in os.environ else None
BF16, BATCH, LENGTHS = torch.bfloat16, 64, dict(prompt=256, response=512)
# The stub has none.
torch.backends.cuda.enable_cudnn_sdp(not STUB)


@contextlib.contextmanager
def ending(limit):
    """On the stub no kernel says that a sequence has ended: after `limit` tokens we do."""
    harvest = generate.Engine.harvest

    def told(engine):
        done = engine.slots.done
        ctypes.memset(done.data_ptr(), engine.steps + 1 >= limit, len(done))
        yield from harvest(engine)
    with mock.patch.object(generate.Engine, "harvest", told) if STUB else contextlib.nullcontext():
        yield


def alone(shards):
    """Be the first of so many processes, without the others: nothing is sent, and what the others
    would send is as it comes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    os.environ |= {"TORCHELASTIC_RUN_ID": "", "RANK": "0", "WORLD_SIZE": str(shards),
                   "LOCAL_WORLD_SIZE": str(shards)}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=shards)


def new_part(kind, shape, dtype):
    """This process's part of a model's weights."""
    with torch.device("meta"):
        model = kind(shape).to(dtype)
    parallel.shard(model, parallel.world(), "cuda", BF16).to_empty(device="cuda")
    if kind is CausalLM and shape.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for p in model.parameters():
        p.to_local().detach().normal_(0.0, 0.02)
    return model


def new(kind, shape, dtype=torch.float32, split=True):
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        several = split and parallel.world() > 1
        model = new_part(kind, shape, dtype) if several else init_weights(kind(shape))
    torch.set_default_dtype(torch.float32)
    # As weights.load does.
    model.model.compiled = True
    return model


def trained(kind, shape, rank, checkpoint=False):
    model = new(kind, shape, BF16 if rank else torch.float32)
    model.model.dtype, model.model.checkpoint = BF16, checkpoint
    return lora.adapt(model, rank) if rank else model


def adamw(model):
    return torch.optim.AdamW(optim.groups(lora.trained(model).values()), 1e-6, (0.9, 0.95),
                             fused=True)


def sample(model, prompts, response, slots=64, graphs=None):
    with ending(response):
        for _ in generate.generate(model, prompts, eos_ids=[2], pad_id=0, max_new_tokens=response,
                                   slots=slots, graphs=graphs):
            pass


def settle(*models):
    # What the stub answers means nothing.
    with contextlib.suppress(FloatingPointError) if STUB else contextlib.nullcontext():
        run.Watch("saving").settle(*models)


def score(model, rows, size):
    # The scores of the other processes, which are not there, are missing.
    with contextlib.suppress(KeyError) if parallel.world() > 1 else contextlib.nullcontext():
        score_sequences(model, rows, size)


def stage(name, shape, rank, size, prompt, response, checkpoint=False, slots=64):
    """{phase: function} of a stage whose models are made here, with passes of `size` sequences and
    two passes an optimizer step, or one of the whole BATCH; sampling is of `slots`."""
    torch.manual_seed(0)
    many = min(2 * size * parallel.world(), BATCH)
    ids = torch.randint(3, shape.vocab_size, (many, prompt + response)).tolist()
    prompts = [row[:prompt] for row in (ids * slots)[:slots]]
    if name == "sft":
        model = trained(CausalLM, shape, rank, checkpoint)
        optimizers, rows = [adamw(model)], [(row[:prompt], row[prompt:]) for row in ids]
        return {"pass": lambda: train_sft.gradients(size, model, optimizers[0], rows[:size]),
                "step": lambda: (train_sft.gradients(size, model, optimizers[0], rows),
                                 optim.clipped_step(model, optimizers, 1.0)),
                "held out": lambda: train_sft.held_out_loss(size, model, rows),
                "saving": lambda: settle(model)}
    if name == "rm":
        student = new(CausalLM, shape, BF16, split=False)
        sample(student, prompts, response, slots, graphs=False)
        del student
        model = trained(ScalarModel, shape, rank, checkpoint)
        optimizers, config = [adamw(model)], train_rm.Config()
        rows = [train_rm.Example("", prompt, row, True) for row in ids]
        return {"pass": lambda: train_rm.gradients(size, config, model, optimizers, rows[:size]),
                "step": lambda: (train_rm.gradients(size, config, model, optimizers, rows),
                                 optim.clipped_step(model, optimizers, 1.0)),
                "held out": lambda: score(model, ids, size),
                "saving": lambda: settle(model)}
    reference = new(CausalLM, shape, BF16).requires_grad_(False)
    if rank:
        policy = lora.adapt(lora.share(reference), rank)
        reward_model, value_model = (
            lora.adapt(weights.stand_on(reference, ScalarModel), rank) for _ in range(2))
    else:
        reward_model = new(ScalarModel, shape, BF16)
        policy, value_model = (trained(kind, shape, 0) for kind in (CausalLM, ScalarModel))
    reward_model.requires_grad_(False)
    policy.model.checkpoint = value_model.model.checkpoint = checkpoint
    models = policy, reference, reward_model, value_model
    optimizers, config = [adamw(policy), adamw(value_model)], train_rl.Config(score="logit")
    counts, grid = [response] * len(ids), torch.zeros(len(ids), response, device="cuda")
    experience = train_rl.Experience(ids, counts, grid == 0, grid, grid, grid, grid)

    def gradients(count):
        return train_rl.gradients(size, config, models, optimizers, range(count), experience)
    return {"sampling": lambda: sample(policy, prompts, response, slots, graphs=False),
            "describing": lambda: train_rl.describe(size, config, models, ids, counts, ids),
            "pass": lambda: gradients(size),
            "step": lambda: (gradients(len(ids)), [optim.clipped_step(m, [o], 1.0) for m, o in zip(
                (policy, value_model), optimizers)]),
            "saving": lambda: settle(policy, value_model)}


def arguments(parser):
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device")
    torch.set_num_threads(args.threads)
    return args


def measure(name, shape, rank, choice):
    """{phase: bytes at most} of a stage on the card."""
    # Dynamo compiles a function eight times at most.
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    works = stage(name, shape, rank, choice.micro_batch, **LENGTHS, checkpoint=choice.checkpoint,
                  slots=choice.slots)
    peaks = {"making": torch.cuda.max_memory_allocated()}
    # The optimizer's state is there from the second step on.
    for phase in ["step", *works]:
        torch.cuda.reset_peak_memory_stats()
        works[phase]()
        peaks[phase] = torch.cuda.max_memory_allocated()
    return peaks


def main():
    parser = common.flags(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["135m", "1b"], help="presets")
    parser.add_argument("--stages", nargs="+", choices=fit.LEARN, default=fit.LEARN)
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 32], help="0: without LoRA")
    parser.add_argument("--micro-batch", type=int, default=0, help="0: what fits --gb")
    parser.add_argument("--slots", type=int, default=64, help="0: what fits --gb")
    parser.add_argument("--checkpoint", action="store_true", default=None,
                        help="activation checkpointing; not given: where it must be")
    parser.add_argument("--shards", type=int, default=1, help="processes that the weights are "
                        "split over; only one of them runs, and sends nothing")
    parser.add_argument("--gb", type=int, default=80, help="of the card that is planned for")
    args = arguments(parser)
    if args.shards > 1:
        alone(args.shards)
    print("| | planned, GB | taken | ratio | most in |", "|---|---|---|---|---|", sep="\n")
    for size, name, rank in itertools.product(args.sizes, args.stages, args.ranks):
        what, shape = f"{size} {name}" + f", LoRA {rank}" * (rank > 0), SIZES[size].shape
        try:
            choice = fit.choose(name, shape, BF16, int(args.gb * fit.USED), batch=BATCH, **LENGTHS,
                                jobs=256, slots=args.slots, micro_batch=args.micro_batch,
                                checkpoint=args.checkpoint, rank=rank, world=args.shards,
                                shards=args.shards)
            peaks = measure(name, shape, rank, choice)
            most = max(peaks, key=peaks.get)
            how = fit.flags(name, choice.micro_batch, choice.checkpoint, choice.slots)
            print(f"| {what} {how} | {choice.peak / 1e9:.2f} | {peaks[most] / 1e9:.2f} | "
                  f"{choice.peak / peaks[most]:.3f} | {most} |", flush=True)
        except (ValueError, torch.OutOfMemoryError) as error:
            print(f"| {what} | {str(error).splitlines()[0]} | | | |", flush=True)


if __name__ == "__main__":
    main()
