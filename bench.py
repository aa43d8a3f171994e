"""Speed and memory beside the peers, both sides alternately in one process. What the README's table of speed is made by.

    python bench.py losses                                            cross-entropy of 4,096 tokens on SmolLM2's head, fp32
    python bench.py losses --dtype bf16 --tokens 2048 --hidden 2048 --vocabulary 128256
    python bench.py generate --threads 1 --batch 16                   sampling on SmolLM2-135M's shape, bf16; --load same|ragged|samples
    python bench.py train --dtype bf16                                a forward and backward pass of SFT
    python bench.py ppo                                               three PPO iterations of a small model, from the loading of its weights on
    python bench.py memory --dtype bf16 --picture docs/memory.png     what a loss takes with larger vocabularies and more tokens
    python bench.py load --model SmolLM2-135M-Instruct                an HF folder, bf16

A side that is not installed (transformers, trl, cut-cross-entropy, liger-kernel) is left out, and said so. Prints one JSON line a side, and a table: the median
time of the rounds, its ratio to the first side's (to that of the matrix products above it), and the memory that a round adds to a fresh process at its highest.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from tqdm import tqdm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def losses(args):
    """{side: function of no arguments}: loss and both gradients. The first sides are the matrix products alone that any of them needs."""
    from nanodistill.losses import linear_cross_entropy, linear_logprobs

    dtype = DTYPES[args.dtype]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(args.vocabulary, args.hidden, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, args.vocabulary, (args.tokens,), generator=generator)

    def products(recomputed):
        """Logits (twice if recomputed), gradient of hidden, gradient of weight, 1,024 tokens at a time: the size that is fastest here."""
        h, w = hidden.detach(), weight.detach()
        logits, dh, dw = h.new_empty(min(1024, len(h)), len(w)), torch.empty_like(h), torch.empty_like(w)
        for part, into in zip(h.split(1024), dh.split(1024)):
            chunk = logits[:len(part)]
            for _ in range(1 + recomputed):
                torch.mm(part, w.T, out=chunk)
            torch.mm(chunk, w, out=into)
            torch.mm(chunk.T, part, out=dw)

    def backward(loss):
        loss.backward()
        hidden.grad = weight.grad = None

    def with_entropy():
        logprobs, entropy = linear_logprobs(hidden, weight, targets)
        backward(-(logprobs + 0.01 * entropy).mean())

    sides = {"three matrix products": lambda: products(False),
             "linear_cross_entropy": lambda: backward(linear_cross_entropy(hidden, weight, targets)),
             "naive": lambda: backward(F.cross_entropy(F.linear(hidden, weight).float(), targets))}
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    sides["F.linear_cross_entropy, chunk 512"] = lambda: backward(F.linear_cross_entropy(hidden, weight, targets, options=options))
    cut = peer("cut_cross_entropy.torch_compile", "torch_compile_linear_cross_entropy")
    if cut:
        sides["cut-cross-entropy, torch_compile"] = lambda: backward(cut(hidden, weight, targets))
    sides |= {"four matrix products": lambda: products(True), "linear_logprobs with entropy": with_entropy}
    liger = peer("liger_kernel.chunked_loss.fused_linear_ppo", "_ChunkedSelectiveLogProbFunction")
    if liger:
        sides["Liger, selective logprobs, no entropy"] = lambda: backward(-liger.apply(hidden, weight, targets, None, 1.0, 4096).mean())
    return sides


def peer(module, name):
    """A function of a package that may be missing; of a package whose own __init__ needs Triton, which CPUs have not, the one file."""
    package = module.partition(".")[0]
    found = importlib.util.find_spec(package)
    if not found:
        return print(f"{package} is not installed: left out")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        for loaded in [m for m in sys.modules if m.partition(".")[0] == package]:
            del sys.modules[loaded]
        parent = ""
        for part in module.split(".")[:-1]:                             # empty packages in place of the real ones
            parent = f"{parent}.{part}".lstrip(".")
            sys.modules[parent] = types.ModuleType(parent)
            sys.modules[parent].__path__ = [str(Path(found.origin).parent.joinpath(*parent.split(".")[1:]))]
        return getattr(importlib.import_module(module), name)


def load(args):
    """{side: function of no arguments}: an HF folder's weights into memory, each of them read once."""
    from nanodistill.weights import load as ours

    def read(model):
        return [p.view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32).max() for p in model.parameters()]

    dtype = DTYPES[args.dtype]
    sides = {"nanodistill": lambda: read(ours(args.model, dtype=dtype))}
    try:
        import transformers
        from transformers.models.llama import modeling_llama         # noqa: F401 -- else the first round would time this import
        transformers.utils.logging.disable_progress_bar()
        sides["transformers"] = lambda: read(transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype))
    except ImportError:
        print("transformers is not installed: left out")
    return sides


def smollm2(args):
    """A model of SmolLM2-135M's shape with random weights: ours and, if transformers is installed, theirs on the same ones."""
    from nanodistill.presets import SIZES
    from nanodistill.model import CausalLM, init_weights

    ours = init_weights(CausalLM(SIZES["135m"].shape), torch.Generator().manual_seed(0)).to(DTYPES[args.dtype])
    if not importlib.util.find_spec("transformers"):
        return ours, print("transformers is not installed: left out")
    import transformers
    config = asdict(ours.config)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    del config["rope_scaling"], config["model_type"]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="sdpa")).to(DTYPES[args.dtype])
    theirs.load_state_dict(ours.state_dict())
    theirs.generation_config.eos_token_id = None
    return ours, theirs


def generate(args):
    """{side: function}: sampling at temperature 1 with --batch sequences in flight; each returns its useful tokens, those up to the EOS.

    same: --batch prompts of 128 tokens, 128 new tokens each. ragged: --requests prompts of 32 to 128 tokens, whose responses end after 1 to 128
    (random weights draw one of 683 tokens that count as EOS once in 72). samples: 30 samples of one prompt, which end so.
    """
    from nanodistill.generate import generate as engine

    ours, theirs = smollm2(args)
    rng = random.Random(0)
    tokens = [rng.randrange(1000, 49000) for _ in range(128)]
    prompts = {"same": [tokens] * args.batch, "ragged": [tokens[:rng.randrange(32, 129)] for _ in range(args.requests)], "samples": [tokens]}[args.load]
    n, eos = 30 if args.load == "samples" else 1, [] if args.load == "same" else list(range(1, 684))

    def nanodistill():
        return sum(len(sample.tokens) for *_, sample in engine(ours, prompts, n=n, eos_ids=eos, pad_id=0, max_new_tokens=128, slots=args.batch))

    def hugging_face():
        useful = 0
        for rows in [prompts[i:i + args.batch] for i in range(0, len(prompts), args.batch)]:
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            out = theirs.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=128, num_return_sequences=n,
                                  eos_token_id=eos or None, pad_token_id=0)[:, longest:]
            useful += sum(next((t + 1 for t, token in enumerate(row) if 0 < token < 684), len(row)) if eos else 128 for row in out.tolist())
        return useful

    return {"nanodistill": nanodistill} | ({"Hugging Face generate": hugging_face} if theirs else {})


def train(args):
    """{side: function}: one forward and backward pass of SFT on 4 sequences of 512 tokens, all of which bear loss. The stages run ours as it is, not compiled."""
    from nanodistill.losses import linear_cross_entropy

    ours, theirs = smollm2(args)
    ids = torch.randint(0, 49152, (4, 513), generator=torch.Generator().manual_seed(0))

    def nanodistill(trunk):
        linear_cross_entropy(trunk(ids[:, :-1]), ours.head, ids[:, 1:]).backward()
        ours.zero_grad()

    compiled = torch.compile(ours.model)
    sides = {"nanodistill": lambda: nanodistill(ours.model), "nanodistill, compiled": lambda: nanodistill(compiled)}
    if theirs:
        theirs_compiled = torch.compile(theirs)

        def hugging_face():
            theirs_compiled(ids, labels=ids).loss.backward()
            theirs.zero_grad()
        sides["Hugging Face, compiled"] = hugging_face
    return sides


def ppo(args):
    """{side: function}: three iterations of 64 prompts, 64 new tokens, 4 passes of 4 minibatches, each with an optimizer step; the weights' loading included.

    A random model (hidden 256, 4 layers, vocabulary 512) with the tiny student's tokenizer and questions; ours runs as `train_rl.py` does. TRL splits a
    device's batch into minibatches but steps when accumulation is complete: with 4 x 16 once a pass, with 1 x 64, as here, once a minibatch.
    """
    import train_rl
    from data import TASKS
    from data import hub
    from nanodistill import weights
    from nanodistill.model import CausalLM, Config, ScalarModel, init_weights
    from nanodistill.tokenizer import Tokenizer

    scratch = tempfile.TemporaryDirectory()
    folder, generator = Path(scratch.name), torch.Generator().manual_seed(0)
    config = Config(512, 256, 768, 4, 4, 2, 64, max_position_embeddings=256, tie_word_embeddings=True)
    for name, kind in (("sft", CausalLM), ("rm", ScalarModel)):
        weights.save(init_weights(kind(config), generator), folder / name, hub.TINY / "student")
    questions = TASKS["arithmetic"](0).questions("train")
    (folder / "labels.jsonl").write_text("".join(json.dumps({"id": q["id"], "vote": "0"}) + "\n" for q in questions))
    flags = {"steps": 3, "prompts": 64, "samples": 1, "max-new-tokens": 64, "slots": 64, "ppo-epochs": 4, "minibatches": 4, "micro-batch": 16, "seed": 0,
             "learning-rate": 1e-6, "value-learning-rate": 1e-6, "kl-limit": 1e9, "threads": args.threads, "dtype": args.dtype, "out": folder}

    def nanodistill(keep=scratch):                                  # the folder lives as long as this function
        shutil.rmtree(folder / "rl", ignore_errors=True)
        with mock.patch("nanodistill.run.need"), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):   # no stage before or after
            train_rl.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])

    sides = {"nanodistill": nanodistill}
    if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
        import datasets
        import transformers
        from trl.experimental.ppo import PPOConfig, PPOTrainer
        transformers.utils.logging.disable_progress_bar()
        ours = Tokenizer(folder / "sft")
        prompts = datasets.Dataset.from_list([{"input_ids": ours.prompt_ids(TASKS["arithmetic"](0).prompt(q["question"]))} for q in questions[:192]])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "sft" / "tokenizer.json"), pad_token="<|pad|>", eos_token="<|end|>", padding_side="left")
        settings = dict(output_dir=str(folder / "trl"), per_device_train_batch_size=64, gradient_accumulation_steps=1, num_mini_batches=4, num_ppo_epochs=4,
                        total_episodes=192, response_length=64, stop_token="eos", temperature=1.0, local_rollout_forward_batch_size=64, num_sample_generations=0,
                        bf16=args.dtype == "bf16", use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=1e-6)

        def trl():
            policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=torch.float32) for _ in range(2))
            reward, value = (transformers.AutoModelForSequenceClassification.from_pretrained(folder / "rm", dtype=torch.float32) for _ in range(2))
            with contextlib.redirect_stdout(io.StringIO()):
                PPOTrainer(PPOConfig(**settings), tokenizer, policy, reference, reward, prompts, value).train()
        sides["TRL"] = trl
    else:
        print("trl or datasets is not installed: left out")
    return sides


def memory(args):
    """What `linear_cross_entropy` and naive cross-entropy take beyond their inputs and both gradients: JSON lines, a table and, with matplotlib, a picture.

    Each point is `bench.py losses` in a process of its own, its second call. Naive goes as far as its logits take 2 GiB.
    """
    size = DTYPES[args.dtype].itemsize
    panels = {"vocabulary": [32, 64, 128, 256], "tokens": [1, 2, 4, 8, 16, 32, 64]}
    taken = {(side, axis): {} for side in ("linear_cross_entropy", "naive") for axis in panels}
    for (side, axis), points in taken.items():
        for value in tqdm(panels[axis], desc=f"{side}, {axis}"):
            shape = {"tokens": args.tokens, "vocabulary": args.vocabulary, "hidden": args.hidden, axis: 1024 * value}
            if side == "naive" and shape["tokens"] * shape["vocabulary"] * size > 2**31:
                continue
            command = [sys.executable, __file__, "losses", "--dtype", args.dtype, "--threads", str(args.threads), "--memory-of", side]
            done = subprocess.run([*command, *(word for name, n in shape.items() for word in (f"--{name}", str(n)))], capture_output=True, text=True, check=True)
            gradients = (shape["tokens"] + shape["vocabulary"]) * args.hidden * size
            points[value] = round((int(done.stdout.rpartition("added ")[2]) - gradients) / 2**20)
            print(json.dumps({"work": "memory", "side": side, **shape, "dtype": args.dtype, "beyond_gradients_mib": points[value]}))
    for axis, values in panels.items():
        print(f"\n| {axis}, thousands | " + " | ".join(map(str, values)) + " |\n|" + "---|" * (len(values) + 1))
        for side in ("linear_cross_entropy", "naive"):
            print(f"| {side}, MiB | " + " | ".join(str(taken[side, axis].get(value, "")) for value in values) + " |")
    if not args.picture:
        return
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for plot, (axis, values) in zip(axes, panels.items()):
        for side in ("linear_cross_entropy", "naive"):
            points = taken[side, axis]
            plot.plot(points.keys(), points.values(), marker="o", label=side)
        plot.set(xlabel=f"{axis}, thousands", xscale="log", yscale="log", xticks=values, xticklabels=values)
        plot.minorticks_off()
    axes[0].set_ylabel("MiB beyond inputs and gradients")
    axes[0].legend()
    figure.savefig(args.picture, dpi=150)


def resident(count):
    """Bytes of this process in memory by Linux's count: "VmRSS" now, "VmHWM" the most since it was last reset."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{count}:")[1].split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["losses", "generate", "train", "ppo", "load", "memory"])
    parser.add_argument("--tokens", type=int, default=4096, help="rows of the hidden states (default: 4096)")
    parser.add_argument("--hidden", type=int, default=576, help="their width (default: 576, SmolLM2-135M's)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the head (default: 49152)")
    parser.add_argument("--load", choices=["same", "ragged", "samples"], default="same", help="what is sampled, for generate (default: same)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in flight, for generate (default: 16)")
    parser.add_argument("--requests", type=int, default=256, help="prompts of the ragged load (default: 256)")
    parser.add_argument("--model", default="", help="HF folder, for load")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="", help="default: bf16 for generate and load, else fp32")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of all sides in turn, after one that does not count (default: 5)")
    parser.add_argument("--picture", default="", help="where memory draws its picture (a .png; needs matplotlib)")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)           # how this script calls itself for one side in a fresh process
    args = parser.parse_args()
    args.dtype = args.dtype or ("bf16" if args.work in ("generate", "load") else "fp32")
    if args.work == "load" and not (Path(args.model) / "config.json").exists():
        parser.error("load needs --model, an HF folder")
    torch.set_num_threads(args.threads)
    if args.work == "memory":
        return memory(args)
    sides = {"losses": losses, "generate": generate, "train": train, "ppo": ppo, "load": load}[args.work](args)
    if args.memory_of:
        if args.work != "load":
            sides[args.memory_of]()                                 # what is compiled or imported in the first round stays out of the count
        Path("/proc/self/clear_refs").write_text("5")               # resets VmHWM
        before = resident("VmRSS")
        sides[args.memory_of]()
        print(f"added {resident('VmHWM') - before}")
        return

    seconds, made = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, side in sides.items():
            begun = time.perf_counter()
            made[name].append(side())
            seconds[name].append(time.perf_counter() - begun)
    first, table = None, [f"| side | seconds, median | of the first | {'useful tokens a second' if args.work == 'generate' else 'memory added, MiB'} |", "|---|---|---|---|"]
    for name in sides:
        median = statistics.median(seconds[name][1:])
        row = {"work": args.work, "side": name, "seconds": [round(s, 4) for s in seconds[name][1:]], "median": round(median, 4)}
        if args.work == "generate":
            last = row["tokens_a_second"] = round(statistics.median(m / s for m, s in zip(made[name][1:], seconds[name][1:])), 1)
        else:
            done = subprocess.run([sys.executable, *sys.argv, "--memory-of", name], capture_output=True, text=True, check=True)
            last = row["added_mib"] = round(int(done.stdout.rpartition("added ")[2]) / 2**20)
        first = median if first is None or name.endswith("matrix products") else first
        print(json.dumps({**row, "ratio": round(median / first, 3), **{name: value for name, value in vars(args).items() if name not in ("work", "memory_of")}}))
        table.append(f"| {name} | {median:.3f} | {median / first:.2f} | {last} |")
    print("\n".join(["", *table]))


if __name__ == "__main__":
    main()
