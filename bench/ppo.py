"""Three PPO iterations of a small model, from the loading of its weights on, beside TRL.

    python bench/ppo.py --dtype bf16
    python bench/ppo.py

Backs docs/speed.md's rows of PPO, 64 prompts x 64 tokens, 4 x 4 minibatches:

            ours      TRL 1.12
    bf16    9.5 s     26.6 s
    fp32    22.1 s    26.4 s

A random model (hidden 256, 4 layers, vocabulary 512) with the tiny student's tokenizer and
questions. Ours is what `train_rl.py` does, but for the evaluation that it runs in the end. Each
minibatch is an optimizer step on both sides: TRL steps once per accumulation, so with one device
batch of 64 four times per pass, as ours does (with 4 x 16 it would once).
"""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import common
import torch

import train_rl
from data import TASKS, hub, ready
from nanodistill import run, settings, weights
from nanodistill.model import CausalLM, Config, ScalarModel, init_weights
from nanodistill.tokenizer import Tokenizer


def prepare(folder, task):
    """A run folder as the stages before PPO leave it: random sft/ and rm/, a vote per question."""
    generator = torch.Generator().manual_seed(0)
    shape = Config(512, 256, 768, 4, 4, 2, 64, max_position_embeddings=256,
                   tie_word_embeddings=True)
    for name, kind in (("sft", CausalLM), ("rm", ScalarModel)):
        weights.save(init_weights(kind(shape), generator), folder / name, hub.TINY / "student")
    votes = [json.dumps({"id": q["id"], "vote": "0"}) + "\n" for q in task.questions("train")]
    (folder / "labels.jsonl").write_text("".join(votes))


def nanodistill(folder, args):
    """`train_rl.main`, less the evaluation."""
    flags = {
        "steps": 3, "prompts": 64, "samples": 1, "max-new-tokens": 64, "slots": 64,
        "ppo-epochs": 4, "minibatches": 4, "micro-batch": 16, "seed": 0, "learning-rate": 1e-6,
        "value-learning-rate": 1e-6, "kl-limit": 1e9, "threads": args.threads,
        "dtype": args.dtype, "out": folder}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    shutil.rmtree(folder / "rl", ignore_errors=True)
    configs = settings.parse("rl", train_rl.STAGES, train_rl.__doc__, argv)
    ready.check("rl", configs)
    started = run.start(configs, "rl")
    run.made_from(folder, "rl", "labels.jsonl", "sft", "rm")
    train_rl.train(configs["rl"], *started)


def trl(folder, args, prompts):
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "sft" / "tokenizer.json"), pad_token="<|pad|>",
        eos_token="<|end|>", padding_side="left")
    config = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=64,
        gradient_accumulation_steps=1, num_mini_batches=4, num_ppo_epochs=4, total_episodes=192,
        response_length=64, stop_token="eos", temperature=1.0,
        local_rollout_forward_batch_size=64, num_sample_generations=0, bf16=args.dtype == "bf16",
        use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no",
        disable_tqdm=True, learning_rate=1e-6)
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(
        folder / "sft", dtype=torch.float32) for _ in range(2))
    reward, value = (transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "rm", dtype=torch.float32) for _ in range(2))
    PPOTrainer(config, tokenizer, policy, reference, reward, prompts, value).train()


def quietly(work, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work(*args)


def sides(args, folder):
    task = TASKS["arithmetic"](0)
    prepare(folder, task)
    found = {"nanodistill": lambda: quietly(nanodistill, folder, args)}
    if common.installed("transformers", "trl", "datasets"):
        import datasets
        import transformers

        transformers.utils.logging.disable_progress_bar()
        tokenizer = Tokenizer(folder / "sft")
        prompts = datasets.Dataset.from_list([
            {"input_ids": tokenizer.prompt_ids(task.prompt(q["question"]))}
            for q in task.questions("train")[:192]])
        found["TRL"] = lambda: quietly(trl, folder, args, prompts)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        common.compare(common.flags(__doc__), lambda args: sides(args, Path(scratch)))
