"""The fused losses and both of their gradients, beside the peers' and beside bare matrix products.

    python bench/losses.py                      4,096 tokens on SmolLM2-135M's head, fp32
    python bench/losses.py --dtype bf16
    python bench/losses.py --dtype bf16 --tokens 2048 --hidden 2048 --vocabulary 128256

Backs docs/speed.md's rows of cross-entropy and of log-probabilities with entropy:

                                          ours              beside
    cross-entropy, bf16                   0.92 s, +159 MiB  its three matrix products alone 0.86 s;
                                                            cut-cross-entropy's torch_compile
                                                            1.02 s, +442;
                                                            F.linear_cross_entropy in chunks of 512
                                                            4.3 s, +583; naive 2.7 s, +2,304
    fp32                                  3.61 s, +222 MiB  3.49 s; 3.62 s, +884; 3.76 s, +233;
                                                            5.3 s, +2,304
    bf16, 2,048 x 2,048 x 128,256         4.11 s, +767 MiB  3.87 s; 4.57 s, +1,002; naive 7.8 s,
                                                            +3,006
    log-probabilities and entropy, bf16   1.24 s, +153 MiB  its four products alone 1.12 s; Liger's
                                                            selective logprobs, without entropy,
                                                            4.5 s, +271

Matrix products are what any of these needs at least: nothing that computes the gradients too can
be faster than they are.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import common
import torch
import torch.nn.functional as F

from nanodistill.losses import linear_cross_entropy, linear_logprobs


def sides(args):
    dtype, generator = common.DTYPES[args.dtype], torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, generator=generator)
    hidden = hidden.to(dtype).requires_grad_()                                 # (N, D)
    weight = 0.02 * torch.randn(args.vocabulary, args.hidden, generator=generator)
    weight = weight.to(dtype).requires_grad_()                                 # (V, D)
    targets = torch.randint(0, args.vocabulary, (args.tokens,), generator=generator)    # (N,)
    inputs = hidden, weight, targets

    def backward(loss):
        loss.backward()
        hidden.grad = weight.grad = None

    def with_entropy():
        logprobs, entropy = linear_logprobs(*inputs, ignore_index=None)
        backward(-(logprobs + 0.01 * entropy).mean())

    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    found = {
        "three matrix products": lambda: products(hidden, weight, 1),
        "linear_cross_entropy": lambda: backward(linear_cross_entropy(*inputs)),
        "naive": lambda: backward(F.cross_entropy(F.linear(hidden, weight).float(), targets)),
        "F.linear_cross_entropy, chunk 512":
            lambda: backward(F.linear_cross_entropy(*inputs, options=chunks))}
    if common.installed("cut_cross_entropy"):
        cut = peer("cut_cross_entropy.torch_compile", "torch_compile_linear_cross_entropy")
        found["cut-cross-entropy, torch_compile"] = lambda: backward(cut(*inputs))
    found["four matrix products"] = lambda: products(hidden, weight, 2)
    found["linear_logprobs with entropy"] = with_entropy
    if common.installed("liger_kernel"):
        liger = peer("liger_kernel.chunked_loss.fused_linear_ppo",
                     "_ChunkedSelectiveLogProbFunction").apply
        found["Liger, selective logprobs, no entropy"] = \
            lambda: backward(-liger(*inputs, None, 1.0, 4096).mean())
    return found


def products(hidden, weight, times):
    """Logits, `times` times, and the gradients of hidden and weight.

    1,024 tokens at a time: the size that was fastest.
    """
    h, w = hidden.detach(), weight.detach()
    buffer = h.new_empty(min(1024, len(h)), len(w))
    dh, dw = torch.empty_like(h), torch.empty_like(w)
    for part, into in zip(h.split(1024), dh.split(1024)):
        logits = buffer[:len(part)]                                            # (n, V)
        for _ in range(times):
            torch.mm(part, w.T, out=logits)
        torch.mm(logits, w, out=into)
        torch.mm(logits.T, part, out=dw)


def peer(module, name):
    """A function of a package whose own __init__ may need Triton, which CPUs lack: then of the one
    file, with empty packages around it."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        pass
    package, *inner = module.split(".")[:-1]
    for loaded in [m for m in sys.modules if m.partition(".")[0] == package]:
        del sys.modules[loaded]
    folder = Path(importlib.util.find_spec(package).origin).parent
    for depth in range(len(inner) + 1):
        empty = types.ModuleType(".".join([package, *inner[:depth]]))
        empty.__path__ = [str(folder.joinpath(*inner[:depth]))]
        sys.modules[empty.__name__] = empty
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    parser = common.flags(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="rows of the hidden states")
    parser.add_argument("--hidden", type=int, default=576, help="their width")
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the head")
    common.compare(parser, sides, bases=("three matrix products", "four matrix products"))
