"""Several processes, one per GPU, on one machine or several: torchrun starts them, and this file is
all that a stage knows of it.

    torchrun --nproc-per-node 8 train_rl.py --student 8b

Each process runs the same script and draws the same batches, but computes its own part of each. A
loss is divided by the count of the *whole* batch; so gradients are summed, never averaged, and are
those of one process. What a step needs of all sequences is put together by `sum_` (each process
adds its own rows to zeros, so the sum is exact) or `gather`, and is the same everywhere.

A model's weights are whole in each process, or where they do not fit, split over some (`shard`, by
FSDP2): then each forward and backward pass is one of all processes. With one process nothing here
does anything. This file imports torch only and can be copied out alone.
"""

import atexit
import functools
import os
import socket
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map


def _torchrun(name, alone):
    return int(os.environ[name]) if dist.is_torchelastic_launched() else alone


def rank():
    """This process's number. Number 0 alone prints and writes."""
    return _torchrun("RANK", 0)


def world():
    """How many processes there are."""
    return _torchrun("WORLD_SIZE", 1)


def local_rank():
    """This process's number among those on its machine."""
    return _torchrun("LOCAL_RANK", 0)


def local_world():
    """How many of them are on this machine."""
    return _torchrun("LOCAL_WORLD_SIZE", 1)


def start(device):
    """Join the processes that torchrun started, if it did; those of a machine have a GPU each."""
    if world() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Long: the others wait while the first asks a server or writes a large file. torchrun, not
    # this, ends them all when one has died.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(days=7))
    atexit.register(dist.destroy_process_group)


def meeting_point():
    """The environment in which as many children of these processes meet: at another port, where
    the first of them listens."""
    if world() == 1:
        return {}
    with socket.socket() as free:
        free.bind(("", 0))
        port = gather(free.getsockname()[1])[0]
    return {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


# ---- work and its results ----

def deal(items):
    """This process's part of a list: what `rank` is dealt where all are dealt out in turn."""
    return items[rank()::world()]


def micro_batches(items, size):
    """Yield (some, 1): this process's part of `items`, `size` at a time. As often in every process,
    for a model whose weights are split waits for all: where nothing is left, (one of them, 0). What
    follows from `some` is multiplied by that number."""
    mine = deal(items)
    for start in range(0, -(-len(items) // world()), size):
        some = mine[start:start + size]
        yield (some, 1) if some else (items[:1], 0)


def gather(part):
    """Any picklable object of each process -> the list of all, on every process."""
    parts = [part] * world()
    if world() > 1:
        dist.all_gather_object(parts, part)
    return parts


def any_(flag):
    """Is it true in any process? The same answer in all. Waits for no GPU."""
    if world() == 1:
        return flag
    flag = torch.tensor(int(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def sum_(*tensors):
    """Sum each tensor over the processes, in place."""
    if world() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


# ---- weights ----

@functools.cache
def _mesh(device, shards):
    from torch.distributed.device_mesh import init_device_mesh
    replicas = world() // shards
    sizes, names = ((shards,), ("shards",)) if replicas == 1 else (
        (replicas, shards), ("replicas", "shards"))
    return init_device_mesh(device, sizes, mesh_dim_names=names)


def shard(model, shards, device, dtype):
    """Split the matrices of a CausalLM or ScalarModel on the meta device over `shards` processes, a
    layer at a time; 1: leave them whole. Layers are gathered in `dtype`, their gradients summed in
    fp32. Such a model must be called itself, not its parts, and by all processes. Vectors stay
    whole: they are small, and in `dtype` norms would be rounded."""
    if shards > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        # Nobody changes in place what such a model returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        vectors = {p for p in model.parameters() if p.dim() == 1}
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=_mesh(torch.device(device).type, shards), mp_policy=policy,
                        ignored_params=vectors)
            part.set_gradient_divide_factor(1.0)
            # gloo can sum, but not scale and sum.
            part.set_force_sum_reduction_for_comms(True)
        # Embedding and head stay gathered for a backward pass, if there will be one.
        model.register_forward_hook(
            lambda model, *_: None if torch.is_grad_enabled() else model.reshard())
    return model


def sharded(x):
    """Is a tensor one process's part of a whole?"""
    return hasattr(x, "full_tensor")


def splits():
    """Are any weights in this process split?"""
    return _mesh.cache_info().currsize > 0


def own(x):
    """This process's part of a tensor."""
    return x.to_local() if sharded(x) else x


def sum_gradients(*models):
    """Sum the gradients of what each process has whole; FSDP2 has summed the others."""
    sum_(*(p.grad for model in models for p in model.parameters()
           if p.grad is not None and not sharded(p)))


def whole(x):
    """A tensor put together, where it is split: all processes must ask."""
    return x.full_tensor() if sharded(x) else x


def to_save(tree):
    """A tree of dicts and lists with its tensors whole, on the CPU of process 0; the others take
    part and get None."""
    def one(x):
        x = whole(x)
        return None if rank() else x.cpu() if isinstance(x, torch.Tensor) else x
    return tree_map(one, tree) if world() > 1 else tree


def like(x, parameter):
    """A whole tensor, the same in every process -> split as `parameter` is, without a message."""
    if sharded(x) or not sharded(parameter) or x.shape != parameter.shape:
        return x
    from torch.distributed.tensor import distribute_tensor
    x = x.detach() if parameter.is_meta else x.detach().to(parameter.device)
    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
