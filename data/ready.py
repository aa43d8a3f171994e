"""What must be there before the first stage starts; and which stages that one will run.

A run takes hours, so what can be known at its beginning must not stop it later: access to the
models, the task's rows, the server, the device, memory, disk, the run folder. `check` tries them
all and lists all that is wrong.
"""

import os
import shutil
import sys
from pathlib import Path

from huggingface_hub import constants

from data import TASKS, hub, server, task_of
from data.dry_run import report
from nanodistill import fit, parallel, run, weights
from nanodistill.tokenizer import Tokenizer


ORDER = ("teacher", "sft", "rm", "rl", "eval")


def uses(stage, config):
    """The models that a stage loads: "teacher", "student"."""
    models = {"teacher": ("teacher",), "eval": ("teacher", "student")}.get(stage, ("student",))
    return models + ("teacher",) * (getattr(config, "reference", "sft") == "teacher")


def missing(stage, configs):
    """The stages that `stage` will run, itself the last but for the evaluation after PPO."""
    folder = Path(configs[stage].out)
    done = {"teacher": (folder / "labels.jsonl").exists(), "eval": False,
            **{s: weights.complete(folder / s) for s in ("sft", "rm", "rl")}}
    scored = fit.taking_part(configs[stage])["scored"]
    needed = [s for s in ORDER if s in configs and (s != "rm" or scored)]
    first = next((s for s in reversed(needed) if done[s]), None)
    return needed[needed.index(first) + 1:] if first else needed


def rows(config, split):
    """The questions of a split that a stage uses."""
    return task_of(config).questions(split)[:config.questions or None]


def check(stage, configs):
    """Try everything that the missing stages need. Raises SystemExit that lists what is wrong, in
    any of the processes."""
    config, problems = configs[stage], []

    def attempt(function, *args):
        """The function's value; or None, with one problem more."""
        try:
            return function(*args)
        except SystemExit as error:
            problems.append(str(error.code))
        except (ValueError, OSError, ImportError) as error:
            problems.append(str(error))

    device = attempt(fit.pick_device, config.device)
    if device:
        parallel.start(device)
    of_all = parallel.gather if device else lambda own: [own]
    # The first process's view counts: it may be at work already when another one looks.
    stages = of_all(missing(stage, configs))[0]
    devices = {s: attempt(fit.pick_device, configs[s].device) for s in stages}
    attempt(writable, Path(config.out))
    problems += run.stale(Path(config.out))
    reward_model = Path(config.out, "rm")
    scored = "rl" in stages and fit.taking_part(configs["rl"])["scored"]
    if scored and "rm" not in stages and config.lora and not (
            reward_model / weights.ADAPTER).exists():
        problems.append(f"{reward_model} was trained without --lora, and PPO with it needs its "
                        "adapter: give --lora 0, or another --out")
    train = attempt(rows, configs.get("teacher", config), "train") if stages != ["eval"] else []
    test = attempt(rows, configs["eval"], "test") if "eval" in stages else []
    if train == [] and stages != ["eval"]:
        problems.append(f"--task {config.task}: there is no training question")
    if test == [] and stages == ["eval"] and config.models:
        problems.append(f"--task {config.task}: there is no test question with an answer")
    if config.teacher_url and "teacher" in stages:
        problems += server.problems(config.teacher_url, config.teacher_model,
                                    os.environ.get("OPENAI_API_KEY", ""))
    folders, bytes_needed = {}, 0
    if getattr(config, "models", ""):
        for name in config.models.split(","):
            folders[name] = attempt(hub.resolve, name, "models", "", False)
    else:
        roles = {role for s in stages for role in uses(s, configs[s])}
        for role in sorted(roles - ({"teacher"} if config.teacher_url else set())):
            name = getattr(config, role)
            revision = config.revision if role == "student" else config.teacher_revision
            folders[role] = attempt(hub.resolve, name, role, revision, False)
            if folders[role]:
                bytes_needed += attempt(hub.bytes_to_fetch, name, revision) or 0
    asked, reference = (train or []) + (test or []), None
    if "teacher" in folders and "rl" in stages and configs["rl"].reference == "teacher":
        reference = folders["teacher"] and attempt(weights.load_config, folders["teacher"])
        if all(folders.values()):
            attempt(comparable, folders["teacher"], folders["student"], config.date)
    for name, folder in folders.items():
        shape = folder and attempt(weights.load_config, folder)
        tokenizer = folder and attempt(Tokenizer, folder, config.date)
        if not (shape and tokenizer and asked):
            continue
        task = task_of(config)
        lengths = [len(tokenizer.prompt_ids(task.prompt(q["question"]))) for q in asked]
        for s in stages:
            if name not in uses(s, configs[s]) and not getattr(config, "models", ""):
                continue
            most = shape.max_position_embeddings - configs[s].max_new_tokens
            fitting = [n for n in lengths if n <= most]          # a stage names the others
            if not fitting:
                problems.append(
                    f"{name}: its {shape.max_position_embeddings} positions hold no question "
                    f"(prompts of {min(lengths)} to {max(lengths)} tokens) and --max-new-tokens "
                    f"{configs[s].max_new_tokens}: fewer of the one, or shorter questions")
                break
            if devices[s] and not (s == "rl" and name == "teacher"):
                attempt(fits, s, configs[s], shape, devices[s], max(fitting), reference)
    problems += disk(config, folders.get("student"), stages, bytes_needed)
    problems = [problem for each in of_all(problems) for problem in each]
    if problems:
        sys.exit("\n".join(dict.fromkeys("\n".join(problems).splitlines())))


def comparable(teacher, student, date):
    """Raises ValueError unless a teacher can say how probable a student's tokens are."""
    both = teacher, student
    tokenizers = [Tokenizer(folder, date) for folder in both]
    theirs, own = ([t.tokenizer.id_to_token(i) for i in range(t.vocab_size)] for t in tokenizers)
    prompt, same = ((t.prompt_ids("1 + 1?"), t.eos_ids[0]) for t in tokenizers)
    most, needed = (weights.load_config(folder).max_position_embeddings for folder in both)
    rules = [("vocabulary", theirs == own), ("chat template", prompt == same),
             ("positions", most >= needed)]
    differ = [what for what, same in rules if not same]
    if differ:
        raise ValueError(f"--reference teacher: {teacher} and the student, {student}, differ in "
                         f"{' and '.join(differ)}, so it can't say how probable the student's "
                         "tokens are. --reference sft")


def fits(stage, config, shape, device, longest, reference=None):
    """Raises ValueError where no setting lets the stage fit the memory that is free."""
    batch = getattr(config, "batch_size", fit.SCORED)
    if stage == "rl":
        batch = config.prompts * config.samples // config.minibatches
    fit.choose(stage, shape, fit.pick_dtype(config.dtype, device), fit.free_bytes(device),
               batch=batch, prompt=longest, response=config.max_new_tokens, jobs=256,
               device=device.type, reference=reference if stage == "rl" else None,
               **fit.asked(config))


def writable(folder):
    """Raises ValueError unless files can be written in `folder`, which need not be there yet."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {folder}: {there} is not a folder that may be written to")


def disk(config, student, stages, download):
    """Problems of space: what is fetched goes to the hub's cache, what is trained to --out."""
    shape = weights.load_config(student) if student else None
    count = fit.parameters(shape) if student else 0
    trained = fit.parameters(shape, rank=config.lora) if student and config.lora else count
    # The fp32 folders stay. Beside them is the largest checkpoint, twice while one is written. It
    # has 4 bytes per parameter for the weights and 8 for AdamW's moments, the reward model's 4 for
    # the best ones; in PPO it is the weights and moments of two models, or of the policy alone.
    kept = 4 * count * len({"sft", "rm", "rl"} & set(stages))
    both = fit.taking_part(config)["valued"]
    sizes = {"sft": 12 * trained, "rm": 16 * trained, "rl": 12 * trained * (1 + both)}
    resume = max((sizes[s] for s in stages if s in sizes), default=0)
    problems, disks = [], {}
    for path, size, what in ((Path(constants.HF_HUB_CACHE), download, "models to be fetched"),
                             (Path(config.out), kept + 2 * resume, "weights and checkpoints")):
        path = next(p for p in (path, *path.absolute().parents) if p.exists())
        use = disks.setdefault(os.stat(path).st_dev, [path, 0, []])
        use[1] += size
        use[2].append(f"{size / 1e9:.1f} GB of {what}")
    for path, size, parts in disks.values():
        free = shutil.disk_usage(path).free
        if size > free:
            problems.append(f"the disk of {path} has {free / 1e9:.1f} GB free, and this run writes "
                            f"{' and '.join(parts)}: free some, or set --out or HF_HOME elsewhere")
    return problems


def dry_run(stage, configs):
    """The text of --dry-run: the stages that are missing, what each takes of memory and time."""
    config, counts = configs[stage], {}
    for split, s in (("train", "teacher"), ("test", "eval")):
        try:
            counts[split] = len(rows(configs.get(s, config), split))
        except (OSError, ValueError, ImportError):
            counts[split] = TASKS[config.task].published[split]
    return report(configs, missing(stage, configs), counts)
