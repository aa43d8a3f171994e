"""The text of --dry-run: what each missing stage takes of memory, tokens, FLOPs and hours.

Memory is planned (nanodistill/fit.py). Hours are an estimate from a roofline: nothing here was
measured on a card.
"""

import functools
import math
import textwrap
from dataclasses import dataclass

import torch

from data import hub
from nanodistill import fit, weights
from nanodistill.fit import GBS, LEARN, SCORED, USED, choose, free_bytes, parameters, plan
from nanodistill.presets import SIZES


# {task: tokens of a long prompt, of the mean one}, by SmolLM2's tokenizer (arithmetic: tiny's). Of
# GSM8K's 8,792 prompts one is longer than the long one, of MMLU-Pro's 11,873 five are.
PROMPTS = {"arithmetic": (96, 31), "gsm8k": (256, 123), "mmlu_pro": (1280, 254)}
# Assumptions, measured nowhere. A response is half of --max-new-tokens. GOOD: the fraction of the
# teacher's responses that SFT trains on. PRODUCTS, BANDWIDTH: the fraction of a card's peak that is
# achieved.
GOOD, PRODUCTS, BANDWIDTH = 0.5, 0.4, 0.6
LOADED = {"teacher": "sampled", "sft": "trained", "rm": "sampled, then trained with a scalar head",
          "rl": "as policy, {}", "eval": "sampled one at a time"}


@dataclass(frozen=True)
class Card:
    name: str
    gb: int
    flops: float                # per second, dense bf16 products with fp32 sums
    bandwidth: float            # bytes per second


# NVIDIA's data sheets; for the 4090 the white paper of the Ada architecture.
CARDS = (Card("RTX 4090", 24, 165e12, 1.01e12), Card("L40S", 48, 362e12, 0.864e12),
         Card("A100 80GB", 80, 312e12, 2.04e12), Card("H100 SXM", 80, 989e12, 3.35e12),
         Card("H200", 141, 989e12, 4.8e12))


# ---- what it costs ----

@dataclass
class Cost:
    """Tokens and FLOPs of a stage."""
    sampled: float = 0
    read: float = 0                      # by a forward pass alone, prompts among them
    trained: float = 0                   # by a forward and backward pass
    flops: float = 0                     # of what is read and trained
    decode_flops: float = 0
    decode_bytes: float = 0              # read by decoding: weights at each step, the cache; bf16

    def run(self, shape, sequences, prompt, response, times=2, head=0):
        """Whole sequences through the layers, their responses through the head.

        times, head: FLOPs per weight and token, of the layers and of the head. 2 forward, 6 with
        backward, 8 where backward repeats the forward pass: that of the layers with checkpointing,
        and that of linear_logprobs.
        """
        tokens = sequences * (prompt + response)
        self.flops += times * tokens * (matrices(shape) + attended(shape) * (prompt + response) / 2)
        self.flops += head * sequences * response * shape.vocab_size * shape.hidden_size
        if times == 2:
            self.read += tokens
        else:
            self.trained += tokens

    def sample(self, shape, prompts, n, prompt, response, cached, slots):
        """n samples of each prompt; each step attends to all `cached` positions."""
        self.run(shape, prompts, prompt, 0)
        tokens = prompts * n * response
        numbers = matrices(shape) + shape.vocab_size * shape.hidden_size
        cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * cached
        self.sampled += tokens
        self.decode_flops += 2 * tokens * (numbers + attended(shape) * cached)
        self.decode_bytes += 2 * tokens * (numbers / min(slots, prompts * n) + cache)

    def hours(self, card):
        """A roofline: products at PRODUCTS of the card's peak; decoding takes as long as the slower
        of its products and its reads."""
        products = PRODUCTS * card.flops
        decode = max(self.decode_flops / products, self.decode_bytes / (BANDWIDTH * card.bandwidth))
        return (self.flops / products + decode) / 3600


def matrices(shape):
    """Weights of the layers' matrices."""
    heads = 2 * (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    return shape.num_hidden_layers * shape.hidden_size * (heads + 3 * shape.intermediate_size)


def attended(shape):
    """What attention multiplies for one token and one position that it sees, counted as weights."""
    return 2 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim


def cost(stage, settings, models, counts, slots=256, checkpoint=False, reference=None):
    """The Cost of a stage.

    Args:
        settings: {stage: config}. counts: {"train": questions, "test": questions}.
        models: Configs of what the stage samples; all others have the last one's shape, but for
            the `reference` of "rl" where there is a Config of it.
    """
    config, work, student = settings[stage], Cost(), models[-1]
    scored, valued = fit.taking_part(settings.get("rl", config)).values()
    long, prompt = PROMPTS[config.task]
    # Frozen weights want no gradient of their own.
    response, saved = config.max_new_tokens / 2, 2 if config.lora else 0
    times = (8 if checkpoint else 6) - saved
    samples, train, test = getattr(config, "samples", 0), counts["train"], counts["test"]
    taught = getattr(settings.get("teacher"), "samples", 10)
    sample = functools.partial(work.sample, prompt=prompt, response=response, slots=slots,
                               cached=long + config.max_new_tokens)
    run = functools.partial(work.run, student, prompt=prompt, response=response)
    if stage == "teacher":
        sample(student, train, samples)
    elif stage == "sft":
        run(config.epochs * train * taught * GOOD, times=times, head=6 - saved)
    elif stage == "rm":
        sample(student, train, samples)
        run(config.epochs * train * (taught + samples), times=times)
    elif stage == "rl":
        prompts, drawn = config.steps * config.prompts, config.steps * config.prompts * samples
        sample(student, prompts, samples)
        work.run(reference or student, drawn, prompt, response, head=2)
        for head in (2, *[0] * (scored + valued)):   # policy; value and reward model
            run(drawn, head=head)
        for head in (8 - saved, 0)[:1 + valued]:     # policy; value model
            run(drawn * config.ppo_epochs, times=times, head=head)
    else:
        for model in models:
            sample(model, test, 1 + samples)
        run(len(models) * test * samples * scored)   # the reward model
    return work


# ---- for people ----

def named(stage, config):
    """[(name, role, revision)] of the models here that a stage samples."""
    if getattr(config, "models", ""):
        return [(name, "models", "") for name in config.models.split(",")]
    student = config.student, "student", config.revision
    teacher = [(config.teacher, "teacher", config.teacher_revision)]
    if config.teacher_url:                       # behind a server, so not here
        teacher = []
    return {"teacher": teacher, "eval": teacher + [student] * 3}.get(stage, [student])


def fitted(stage, config, model, counts, free, device, reference=None):
    """`choose` by a stage's config, for prompts of the task's usual lengths -> Choice, plan."""
    fp32 = config.dtype == "fp32" or config.dtype == "auto" and device != "cuda"
    where = dict(prompt=PROMPTS[config.task][0], response=config.max_new_tokens, device=device)
    batch, samples = getattr(config, "batch_size", SCORED), getattr(config, "samples", 0)
    jobs = samples * counts["test" if stage == "eval" else "train"]
    if stage == "rl":
        jobs = config.prompts * samples
        batch = jobs // config.minibatches
    args = stage, model, torch.float32 if fp32 else torch.bfloat16
    given = {**fit.asked(config, config.gpus), "reference": reference}
    choice = choose(*args, free, batch=batch, jobs=jobs, **where, **given)
    chosen = {key: getattr(choice, key) for key in ("slots", "micro_batch", "checkpoint", "shards")}
    return choice, plan(*args, batch=batch, **where, **{
        key: value for key, value in {**given, **chosen}.items() if key != "local"})


def memories(device, gpus=0):
    """[(name, bytes that may be used, device)]: this machine's unless `gpus` are meant, then those
    of cards."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    here = "mps" if here == "cpu" and torch.backends.mps.is_available() else here
    asked = here if device == "auto" else device
    own = [("here", free_bytes(asked), asked)] if asked in ("cpu", here) and not gpus else []
    return own + [(f"{gb} GB", int(gb * USED), "cuda") for gb in GBS]


def report(settings, missing, counts):
    """The text of --dry-run: what each stage takes of memory, what fits where, tokens and FLOPs;
    then hours by stage and card.

    Args:
        settings: {stage: config}. missing: the stages that would run, in their order.
        counts: {"train": questions, "test": questions}.
    """
    lines, hours, gpus = [], [], settings[missing[0]].gpus
    each = f"{gpus} x " * (gpus > 0)
    for stage in missing:
        config, choices, memory = settings[stage], {}, ""
        names = named(stage, config)
        if not names:
            lines.append(f"{stage}: {config.teacher_model}, behind a server: no memory here")
            continue
        models = [shape(*name) for name in names]
        largest = max(models, key=parameters)
        reference, others = None, ["reference"]
        if getattr(config, "reference", "sft") == "teacher":
            reference = shape(config.teacher, "teacher", config.teacher_revision)
            others = [f"{config.teacher} as reference"]
        others += [f"{name} model" for name, there in zip(
            ("reward", "value"), fit.taking_part(config).values()) if there]
        lines.append(f"{stage}: {', '.join(dict.fromkeys(name for name, *_ in names))}, at most "
                     f"{parameters(largest):,} parameters; "
                     f"{LOADED[stage].format(', '.join(others))}")
        for name, free, device in memories(config.device, gpus):
            try:
                choices[name], parts = fitted(stage, config, largest, counts, free, device,
                                              reference)
                lines.append(f"  {each}{name:7} {choices[name].line}")
                memory = memory or f"GB, {name}: " + ", ".join(
                    f"{part} {size / 1e9:.2f}" for part, size in parts.items() if size)
            except ValueError as error:
                lines.append(f"  {each}{name:7} {str(error).partition(', and ')[0]}")
        lines += textwrap.wrap(memory, 98, initial_indent="  ", subsequent_indent="    ")
        work = cost(stage, settings, models, counts, reference=reference)
        lines.append(f"  M tokens: {work.sampled / 1e6:,.2f} sampled, {work.read / 1e6:,.2f} read, "
                     f"{work.trained / 1e6:,.2f} trained on; without checkpointing "
                     f"{(work.flops + work.decode_flops) / 1e15:,.3g} PFLOP")
        fits = [(card, choices.get(f"{card.gb} GB")) for card in CARDS]
        hours.append((stage, [
            cost(stage, settings, models, counts, c.slots, c.checkpoint, reference).hours(card)
            / (gpus or 1) if c else math.nan for card, c in fits]))
    hours.append(("total", [sum(column) for column in zip(*(row for _, row in hours))]))
    prompt, width = PROMPTS[settings[missing[0]].task][1], 11
    lines += ["", *textwrap.wrap(
        f"Hours, an estimate from a roofline, not measured: {PRODUCTS:.0%} of a card's bf16 "
        f"products per second, {BANDWIDTH:.0%} of its bandwidth; prompts of {prompt} tokens, "
        f"responses half as long as --max-new-tokens, SFT on {GOOD:.0%} of the teacher's "
        "responses; held-out evaluations are left out; nan: does not fit"
        f"{f'; {gpus} cards at best, with nothing lost between them' * (gpus > 0)}.", 100),
        " " * 8 + "".join(f"{card.name:>{width}}" for card in CARDS)]
    return "\n".join(lines + [f"{stage:8}" + "".join(f"{x:{width}.2g}" for x in row)
                              for stage, row in hours])


def shape(name, role, revision=""):
    """The Config that --student or --teacher means; no weights are downloaded for it."""
    if name in SIZES:
        return SIZES[name].shape
    return weights.load_config(hub.resolve(name, role, revision, weights=False))


def cell(name, stage, micro_batch, rank=0):
    """A stage's peak in GB, and the smallest card that holds it."""
    peak = plan(stage, SIZES[name].shape, torch.bfloat16, batch=64, micro_batch=micro_batch,
                slots=64, prompt=256, response=512, rank=rank)["peak"]
    return f"{peak / 1e9:.1f} ({next((gb for gb in GBS if peak <= gb * USED), 'none')})"


def table():
    """docs/memory.md's "What fits which card" as markdown."""
    rows = [[name, cell(name, "teacher", 1)] + [f"{cell(name, stage, 8)} / {cell(name, stage, 1)}"
                                                for stage in LEARN]
            for name, size in SIZES.items() if size.as_student]
    head = ["model", "sampling it as teacher", "SFT", "reward model", "PPO"]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * 5, *rows])


def lora_table(rank=32):
    """docs/memory.md's table of PPO with LoRA as markdown."""
    names = [name for name, size in SIZES.items() if size.as_student]
    cells = [" / ".join(cell(name, "rl", b, rank) for b in (8, 1)) for name in names]
    rows = [["PPO, GB", *names], ["---"] * (len(names) + 1), ["8 sequences / 1", *cells]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table(), lora_table(), sep="\n\n")
