"""LoRA (arXiv 2106.09685): a frozen trunk, and small trained adapters beside its linear layers.

    y = W x + alpha / rank * B (A x)

W is frozen, in whatever dtype it has. A (rank, in) and B (out, rank) are fp32 and trained; B starts
at zero, so a new adapter changes nothing. Every linear layer of every block gets one, as in "LoRA
Without Regret" (Thinking Machines, 2025), which finds rates of about ten times those of full
training, and in RL even rank 1 enough.

Several models may stand on one trunk: `share` makes another model of the same tensors, and `adapt`
gives it adapters of its own. No weight is held twice, and a model without adapters is the trunk.
This file imports torch only and can be copied out alone.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F


ALPHA = 32                                 # as in "LoRA Without Regret", whatever the rank


class LoRALinear(nn.Linear):
    """A linear layer on the weights of another, which stay, and an adapter of its own."""

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        fp32 = dict(bias=False, device=self.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(self.in_features, rank, **fp32)
        self.lora_B = nn.Linear(rank, self.out_features, **fp32)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, self.in_features)
        y = F.linear(rows, self.weight.to(x.dtype), bias)              # (rows, out)
        low = F.linear(rows, self.lora_A.weight.to(x.dtype))           # (rows, rank)
        # One kernel: the sum is rounded once, y read and written once.
        y.addmm_(low, self.lora_B.weight.to(y.dtype).T, alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)

    def merged(self):
        """W + alpha / rank * B A, fp32 (out, in)."""
        return self.weight.float() + self.scale * (self.lora_B.weight @ self.lora_A.weight)


def adapt(model, rank, alpha=ALPHA):
    """Freeze a CausalLM or ScalarModel, and add an adapter to each linear layer of its blocks.

    What is trained then are the adapters and a ScalarModel's head, which becomes fp32.
    """
    model.requires_grad_(False)
    # With adapters, compiled layers take longer (docs/log.md).
    model.model.compiled = False
    for name, module in [*model.model.layers.named_modules()]:
        if isinstance(module, nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), own, LoRALinear(module, rank, alpha))
    if hasattr(model, "score"):
        model.score.float().requires_grad_(True)
    return model


def share(module):
    """Another module of the same tensors: what is added to one does not change the other."""
    tensors = [*module.parameters()]
    tensors += [x for m in module.modules() for x in vars(m).values() if torch.is_tensor(x)]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def cast(model, dtype):
    """Another model of the same trunk with the adapters in `dtype`, so that sampling does not cast
    them anew for each token. A model whose adapters are so, or that has none, as it is."""
    if all(p.dtype == dtype for name, p in model.named_parameters() if ".lora_" in name):
        return model
    model = share(model)
    for module in [m for m in model.modules() if isinstance(m, LoRALinear)]:
        for low in (module.lora_A, module.lora_B):
            low.weight = nn.Parameter(low.weight.detach().to(dtype), requires_grad=False)
    return model


def trained(model):
    """{name: parameter} of what is trained: all of a model without adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def described(model):
    """Rank, alpha and share of trained weights, as a line for people."""
    layer = next(m for m in model.modules() if isinstance(m, LoRALinear))
    own, all_ = (sum(p.numel() for p in some) for some in (trained(model).values(),
                                                           model.parameters()))
    rank = layer.lora_A.out_features
    return (f"LoRA of rank {rank}, alpha {layer.scale * rank:g}: {own / 1e6:.2f} of "
            f"{all_ / 1e6:.2f} million weights are trained ({own / all_:.1%})")


@torch.no_grad()
def merged(model):
    """Yield (name, tensor) of the weights that a model without adapters would have. All of them are
    fp32 where there are adapters; else they are the model's own."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    for name, p in model.named_parameters():
        owner, _, own = name.rpartition(".")
        if ".lora_" in name:
            continue
        if owner in layers and own == "weight":
            yield name, layers[owner].merged()
        else:
            yield name, p.detach().float() if layers else p.detach()
