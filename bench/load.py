"""An HF folder's weights into memory, each of them read once, beside transformers.

    python bench/load.py --model SmolLM2-135M-Instruct

Backs docs/speed.md's row of loading: bf16, 0.046 s, +269 MiB of a 257 MiB file; transformers
0.068 s, +269. Weights are mapped, not read, until something uses them: so each side looks at all
of them.
"""

import importlib

import common
import torch

from nanodistill import weights


def read(model):
    """Look at every weight: the largest of each tensor, its bits taken as integers."""
    return [p.view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32).max()
            for p in model.parameters()]


def sides(args):
    dtype = common.DTYPES[args.dtype]
    found = {"nanodistill": lambda: read(weights.load(args.model, dtype=dtype))}
    if common.installed("transformers"):
        import transformers

        # Else the first round would time this import.
        importlib.import_module("transformers.models.llama.modeling_llama")
        transformers.utils.logging.disable_progress_bar()
        load = transformers.AutoModelForCausalLM.from_pretrained
        found["transformers"] = lambda: read(load(args.model, dtype=dtype))
    return found


if __name__ == "__main__":
    parser = common.flags(__doc__, dtype="bf16")
    parser.add_argument("--model", required=True, help="an HF folder")
    # A program loads once: its first run is what counts.
    common.compare(parser, sides, warm=False)
