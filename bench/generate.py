"""Sampling at temperature 1 on SmolLM2-135M's shape with random weights, beside Hugging Face.

    python bench/generate.py --threads 1 --batch 16
    python bench/generate.py --threads 1 --load samples --batch 30
    python bench/generate.py --threads 1 --load ragged --batch 64

Backs docs/speed.md's rows of sampling, bf16, one thread; useful tokens are those up to the EOS:

                                 ours                     Hugging Face `generate`
    --batch 1                    58 tokens per second       33
    --batch 16                   377                      130
    --batch 64                   534                      151
    --load samples --batch 30    427 useful ones          72
    --load ragged --batch 64     435 useful ones          137
"""

import random

import common
import torch

from nanodistill.generate import generate


def prompts_of(args):
    """-> (prompts, samples of each, EOS ids)."""
    rng = random.Random(0)
    tokens = [rng.randrange(1000, 49000) for _ in range(128)]
    # Random weights draw one of these once in 72 tokens: responses of 1 to 128.
    ends = range(1, 684)
    if args.load == "same":
        return [tokens] * args.batch, 1, range(0)
    if args.load == "samples":
        return [tokens], 30, ends
    return [tokens[:rng.randrange(32, 129)] for _ in range(args.requests)], 1, ends


def hugging_face(model, prompts, n, eos_ids, new_tokens):
    """Samples of a batch of prompts, padded on the left -> the number of useful tokens."""
    longest = max(map(len, prompts))
    pads = [longest - len(row) for row in prompts]
    ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, prompts)])           # (B, T)
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, prompts)])
    out = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0,
                         max_new_tokens=new_tokens, num_return_sequences=n,
                         eos_token_id=list(eos_ids) or None, pad_token_id=0)
    ends = [[t + 1 for t, token in enumerate(row) if token in eos_ids]
            for row in out[:, longest:].tolist()]
    return sum(min(end, default=new_tokens) for end in ends)


def sides(args):
    ours, theirs = common.smollm2(args.layers, common.DTYPES[args.dtype])
    prompts, n, eos_ids = prompts_of(args)
    batches = [prompts[i:i + args.batch] for i in range(0, len(prompts), args.batch)]
    found = {"nanodistill": lambda: sum(
        len(sample.tokens) for *_, sample in generate(
            ours, prompts, n=n, eos_ids=list(eos_ids), pad_id=0,
            max_new_tokens=args.new_tokens, slots=args.batch))}
    if theirs:
        found["Hugging Face generate"] = lambda: sum(
            hugging_face(theirs, batch, n, eos_ids, args.new_tokens) for batch in batches)
    return found


if __name__ == "__main__":
    parser = common.flags(__doc__, dtype="bf16")
    parser.add_argument("--load", choices=["same", "ragged", "samples"], default="same",
                        help="same: a prompt of 128 tokens per sequence in flight, no EOS; ragged: "
                        "prompts of 32 to 128 tokens; samples: 30 of one prompt")
    parser.add_argument("--batch", type=int, default=16, help="sequences in flight")
    parser.add_argument("--requests", type=int, default=256, help="prompts of the ragged load")
    parser.add_argument("--new-tokens", type=int, default=128, help="of the longest response")
    parser.add_argument("--layers", type=int, default=30, help="fewer: a quick try")
    common.compare(parser, sides, tokens=True)
