"""A forward and backward pass of SFT on SmolLM2-135M's shape, beside Hugging Face.

    python bench/train.py --dtype bf16
    python bench/train.py

Backs docs/speed.md's rows of training, 4 sequences of 512 tokens, all of which bear loss:

            ours                          Hugging Face, compiled
    bf16    3.1 s; compiled whole 2.6     3.9
    fp32    10.2 s; compiled whole 9.5    9.9

On a CPU the stages run ours as it is, or where many sequences in fp32 are before them, compiled by
layer, around its attention; on CUDA always so. Whole it would be compiled anew for each batch, for
packed batches are all of another shape.
"""

import common
import torch

from nanodistill.losses import linear_cross_entropy


def sides(args):
    ours, theirs = common.smollm2(args.layers, common.DTYPES[args.dtype])
    ids = torch.randint(0, 49152, (4, 513), generator=torch.Generator().manual_seed(0))

    def nanodistill(trunk, by_layer=False):
        ours.model.compiled = by_layer
        linear_cross_entropy(trunk(ids[:, :-1]), ours.head, ids[:, 1:]).backward()
        ours.zero_grad()

    def hugging_face(model):
        model(ids, labels=ids).loss.backward()
        theirs.zero_grad()

    compiled = torch.compile(ours.model)
    found = {"nanodistill": lambda: nanodistill(ours.model),
             "nanodistill, compiled by layer": lambda: nanodistill(ours.model, by_layer=True),
             "nanodistill, compiled": lambda: nanodistill(compiled)}
    if theirs:
        theirs_compiled = torch.compile(theirs)
        found["Hugging Face, compiled"] = lambda: hugging_face(theirs_compiled)
    return found


if __name__ == "__main__":
    parser = common.flags(__doc__)
    parser.add_argument("--layers", type=int, default=30, help="fewer: a quick try")
    common.compare(parser, sides)
