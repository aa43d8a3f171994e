"""A run's settings: a stage's dataclass -> command-line flags, the dial of sizes, settings.json.

`parse` makes flags of a stage's Config: its own as they are, those of the stages that it may have
to run first behind that stage's name (`--rm.samples 8`). A value is the first of these: what the
command line gives; what settings.json in the run folder says, so that a stage started later uses
the same; what the student's size means (presets.py); the field's default. Work that was made with
other settings than are asked for is never continued: an error names what differs.
"""

import argparse
import dataclasses
import datetime
import difflib
import json
import math
import re
import sys
from pathlib import Path

from nanodistill import presets
from nanodistill.files import write_atomic


# What each stage makes, and which of the stage's settings it depends on besides those of the whole
# run; None: on all of them.
SAMPLED = ("samples", "temperatures", "max_new_tokens", "teacher_extra", "reasoning")
MADE = {"teacher": {"teacher.jsonl": SAMPLED,
                    "labels.jsonl": (*SAMPLED, "questions", "min_agreement")},
        "sft": {"sft": None},
        "rm": {"student.jsonl": ("samples", "max_new_tokens"), "rm": None},
        "rl": {"rl": None}}


def flag(default, help, choices=None, least=None, above=None, most=None, result=True,
         run_wide=False, only=None):
    """A dataclass field that `parse` turns into a command-line flag.

    Args:
        default: None: the student's size decides (presets.py), or `dial`, or fit.py.
        least, above, most: what the number must not be below, must be above, must not be above.
        result: False for what says only where or how fast.
        run_wide: the same in all stages of a run.
        only: (another flag, its value), without which this one does nothing.
    """
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": choices, "least": least, "above": above, "most": most,
        "result": result, "run_wide": run_wide, "only": only})


@dataclasses.dataclass
class Common:
    """The flags of every stage. Each script's Config adds its own."""
    # What the run is about: the same in all its stages.
    student: str = flag("tiny", "the student's base, which decides the rest: "
                        + ", ".join(presets.STUDENTS) + ", a hub name or an HF folder",
                        run_wide=True)
    revision: str = flag("", "branch, tag or commit of the student on the hub", run_wide=True)
    teacher: str = flag(None, "the teacher, named in the same way; a size has one of its own",
                        run_wide=True)
    teacher_revision: str = flag("", "branch, tag or commit of the teacher on the hub",
                                 run_wide=True)
    teacher_url: str = flag("", "the teacher is behind this OpenAI-compatible server instead, "
                            "such as http://host:8000/v1", run_wide=True)
    teacher_model: str = flag("", "its name on that server", run_wide=True)
    task: str = flag(None, "what is asked; not given: arithmetic of tiny, gsm8k of all others",
                     ("arithmetic", "gsm8k", "mmlu_pro"), run_wide=True)
    data: str = flag("", "own questions: a .jsonl file with one `question` per line, or a folder "
                     "with train.jsonl and, to be scored, test.jsonl with one `answer` per line; "
                     "not given: the task's published rows", run_wide=True)
    date: str = flag(None, "what chat templates that print today's date are given, such as "
                     "2026-01-31; not given: the day the run began", run_wide=True)
    seed: int = flag(1, "samples, order of the batches, and the embedded task's questions",
                     least=0, most=2**62, run_wide=True)
    lora: int = flag(None, "LoRA: the rank of small adapters, trained on the frozen weights "
                     "in every stage; 0 = all weights are trained; not given: 0 where PPO of the "
                     "student's size fits the memory so, else 32", least=0, most=4096,
                     run_wide=True)
    out: str = flag(None, "run folder; not given: out/<task>-<student>", result=False,
                    run_wide=True)
    tracker: str = flag("", "a Python module with init, log and finish, such as trackio or wandb: "
                        "it is handed what metrics.jsonl gets", result=False, run_wide=True)
    dry_run: bool = flag(False, "say what would run and what it takes of memory and time, and "
                         "stop; needs no weights", result=False, run_wide=True)
    gpus: int = flag(0, "with --dry-run: what it takes on so many GPUs (torchrun says how many "
                     "there are; 0 = as it does)", least=0, result=False, run_wide=True)
    # What each stage may have of its own.
    questions: int = flag(0, "questions used of the stage's split; 0 = all", least=0)
    max_new_tokens: int = flag(None, "a response is cut off here", least=1)
    slots: int = flag(0, "sequences sampled at once, by each process; 0 = as many as fit the "
                      "memory, at most 256", least=0, result=False)
    device: str = flag("auto", "auto: cuda if there is one, else mps (untested), else cpu",
                       ("auto", "cuda", "mps", "cpu"), result=False)
    dtype: str = flag("auto", "of the arithmetic; trained weights stay fp32; auto: bf16 on CUDA, "
                      "else fp32", ("auto", "bf16", "fp32"), result=False)
    shards: int = flag(0, "processes that share one copy of the weights; 1 = each has all of them; "
                       "0 = 1 where that fits, else those of a machine, else all", least=0,
                       result=False)
    threads: int = flag(0, "CPU threads; 0 = PyTorch's choice", least=0, result=False)

    def problems(self, given):
        """What is wrong with these values together; `given`: names of those that were typed."""
        return []


@dataclasses.dataclass
class Training(Common):
    """The flags of every stage that trains, beside its own."""
    micro_batch: int = flag(0, "responses per forward and backward pass, two in a pair; the "
                            "gradient does not depend on it; 0 = as many as fit the memory",
                            least=0, result=False)
    checkpoint: bool = flag(None, "activation checkpointing: a layer's activations are computed "
                            "again in backward instead of kept; not given: where it must be",
                            result=False)
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm", above=0)
    save_minutes: float = flag(10.0, "time between checkpoints", above=0, result=False)


COMMON = [field.name for field in dataclasses.fields(Common)]


def option(stage, own, name):
    """The flag as a person types it: --rm.samples, or --samples in the stage itself."""
    return f"--{'' if stage == own else stage + '.'}{name.replace('_', '-')}"


# ---- the command line ----

class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"{message}\n{self.prog} --help explains every flag.")


def arguments(stage, stages, doc):
    """The parser. It takes every value as text, so that `convert` can name all that are wrong."""
    hidden = [option(s, stage, f.name) for s, config in stages.items() if s != stage
              for f in dataclasses.fields(config) if not f.metadata["run_wide"]]
    rows = [" ".join(hidden[i:i + 4]) for i in range(0, len(hidden), 4)]
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="\n  ".join(["Flags of the other stages, as their own --help explains "
                                        "them:", *rows]) if rows else None)
    for s, config in stages.items():
        for field in dataclasses.fields(config):
            if s != stage and field.metadata["run_wide"]:
                continue
            row = presets.SETTINGS.get(f"{s}.{field.name}", presets.SETTINGS.get(field.name))
            columns = ", ".join(f"{c} {v}" for c, v in zip(presets.COLUMNS, row or ()))
            default = f"by size: {columns}" if row else f"default: {field.default}"
            shown = default if field.default not in (None, "") or row else ""
            help, choices = field.metadata["help"], field.metadata["choices"]
            if shown:
                help += f" ({shown})"
            if field.type is bool:
                takes = {"action": argparse.BooleanOptionalAction}
            elif choices:
                takes = {"metavar": "|".join(choices)}
            else:
                takes = {"metavar": field.type.__name__.upper()}
            help = help.replace("%", "%%") if s == stage else argparse.SUPPRESS
            parser.add_argument(option(s, stage, field.name), dest=f"{s} {field.name}",
                                default=argparse.SUPPRESS, help=help, **takes)
    return parser


def convert(field, text):
    """A flag's text (or a bool, yes or no) -> its value. Raises ValueError: what is wanted."""
    limits, value = field.metadata, text
    if field.type in (int, float):
        try:
            value = field.type(text)
        except ValueError:
            wanted = "a whole number" if field.type is int else "a number"
            raise ValueError(f"wants {wanted}") from None
        if not math.isfinite(value):
            raise ValueError("wants a finite number")
        for bound, wrong, words in (("least", lambda limit: value < limit, "at least"),
                                    ("above", lambda limit: value <= limit, "more than"),
                                    ("most", lambda limit: value > limit, "at most")):
            if limits[bound] is not None and wrong(limits[bound]):
                raise ValueError(f"must be {words} {limits[bound]}")
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"must be one of {', '.join(limits['choices'])}")
    return value


def read_command_line(stage, stages, doc, argv):
    """-> ({(stage, name): value} of what was given, [what is wrong])."""
    parser, given, problems = arguments(stage, stages, doc), {}, []
    typed, unknown = parser.parse_known_args(argv)
    for key, text in vars(typed).items():
        s, name = key.split()
        field = next(f for f in dataclasses.fields(stages[s]) if f.name == name)
        try:
            given[s, name] = convert(field, text)
        except ValueError as error:
            problems.append(f"{option(s, stage, name)} {text}: {error}")
    flags = [*parser._option_string_actions]
    for text in (u.partition("=")[0] for u in unknown):
        elsewhere = [f for f in flags if f.partition(".")[2] == text.lstrip("-")]
        near = elsewhere or difflib.get_close_matches(text, flags, 1)
        guess = f"; {' or '.join(near)}?" if near else ""
        problems.append(f"{text}: there is no such flag{guess}")
    # A flag that every stage has goes to all of them, unless one got its own.
    for name in COMMON:
        if (stage, name) in given:
            for s in stages:
                given.setdefault((s, name), given[stage, name])
    return given, problems


# ---- the dial ----

def dial(given):
    """What the run-wide flags given mean for those that were not: {name: (value, reason)}."""
    student, url = given.get("student", "tiny"), given.get("teacher_url")
    size, derived = presets.SIZES.get(student), {}
    if given.get("data"):
        derived["task"] = "gsm8k", "own questions are asked as GSM8K's are"
    elif student == "tiny":
        derived["task"] = "arithmetic", "what the tiny models were made for"
    else:
        derived["task"] = "gsm8k", "the task of every student but tiny"
    if url:
        derived["teacher"] = "", "it is behind a server"
    elif student == "tiny":
        derived["teacher"] = "tiny", "tiny's own"
    elif size and size.teacher:
        repository = presets.SIZES[size.teacher].repository
        derived["teacher"] = size.teacher, f"{student}'s own: {repository}"
    else:
        derived["teacher"] = "", f"{student}'s own"
    derived["lora"] = rank_that_fits(size, given) if size and "lora" not in given else (0, "")
    derived = {name: value for name, value in derived.items() if name not in given}
    task = given.get("task") or derived["task"][0]
    # The folder's name tells this run from others: task or data, student, teacher, seed.
    parts = [Path(given["data"]).stem if given.get("data") else task]
    if given.get("models"):
        parts.append("+".join("-".join(Path(m).parts[-2:]) for m in given["models"].split(",")))
    else:
        parts.append(Path(student).name)
    named = given.get("teacher_model") if url else given.get("teacher")
    if named:
        parts.append(f"by-{Path(named).name}")
    if given.get("seed", 1) != 1:
        parts.append(f"seed{given['seed']}")
    derived["out"] = f"out/{'-'.join(parts)}", "after what the run is"
    derived["date"] = datetime.date.today().isoformat(), "today, and in this run from now on"
    return derived


def rank_that_fits(size, given):
    """--lora where it is not given -> (rank, reason): 0 where PPO of all weights fits the memory
    that is free, with prompts and responses of 256 and 512 tokens."""
    from nanodistill import fit, parallel  # they import torch, which takes 1 s
    gpus = given.get("gpus", 0)
    try:
        device = fit.pick_device(given.get("device", "auto"))
    except ValueError:                                           # which the stage says at once
        return 0, ""
    if gpus and device.type != "cuda":                           # those meant are elsewhere
        return 0, ""
    # All processes must come to the same answer.
    parallel.start(device)
    free = min(parallel.gather(fit.free_bytes(device)))
    dtype, processes = fit.pick_dtype(given.get("dtype", "auto"), device), fit.processes(gpus)
    world = processes["world"]
    what = f"PPO of all weights in {f'{world} x ' * (world > 1)}{free / 1e9:.1f} GB"
    try:
        fit.choose("rl", size.shape, dtype, free, batch=64, prompt=256, response=512, jobs=256,
                   device=device.type, shards=given.get("shards", 0), **processes)
    except ValueError:
        return presets.RANK, f"{what} does not fit"
    return 0, f"{what} fits"


def idle(given, values):
    """Problems of the run-wide flags: what is missing or wrong, and what would do nothing."""
    student, teacher, url = values["student"], values["teacher"], values["teacher_url"]
    if "models" in given:
        needless = [f for f in ("student", "revision", "teacher", "teacher_revision",
                                "teacher_url", "teacher_model") if f in given]
        return [f"{option('', '', f)} does nothing beside --models, which names all that is "
                "compared" for f in needless]
    server = "--teacher-url http://host:8000/v1 --teacher-model NAME"
    try:
        datetime.date.fromisoformat(values["date"])
        no_date = False
    except ValueError:
        no_date = True
    gpus = values["gpus"]
    rules = [
        (gpus and not values["dry_run"], "--gpus does nothing without --dry-run: torchrun says how "
         "many"),
        (gpus > 8 and gpus % 8, f"--gpus {gpus}: above 8, whole machines of 8 are planned for"),
        (no_date, f"--date {values['date']}: wants a day such as 2026-01-31"),
        (student == "8b" and not (teacher or url), "--student 8b: its teacher is larger than most "
         f"machines hold, so it is behind a server: {server} (or --teacher names a local one)"),
        (student != "8b" and not (teacher or url), f"--student {student}: who teaches it? Name it: "
         f"--teacher {'|'.join(s for s in presets.SIZES)}, a hub name or a folder; or {server}"),
        ("data" in given and values["task"] == "arithmetic", "--data does nothing: --task "
         "arithmetic makes its questions. Own questions need no --task"),
        ("teacher" in given and url, "--teacher and --teacher-url: it can't be both"),
        (url and not url.startswith(("http://", "https://")),
         f"--teacher-url {bare(url)}: an address begins with http:// or https://"),
        # The message does not repeat the address: it may go to a log.
        (url and re.match(r"\w+://[^/?#]*@", url), "--teacher-url: a user or password in the "
         "address would be written to settings.json. Leave it out, and put the key into "
         "OPENAI_API_KEY (of HTTP's basic authentication: Basic and the base64 of user:password)"),
        (url and not values["teacher_model"], "--teacher-url needs --teacher-model: the model's "
         "name on that server"),
        ("teacher_model" in given and not url, "--teacher-model does nothing without "
         "--teacher-url"),
        ("teacher_revision" in given and (url or teacher == "tiny" or Path(teacher).exists()),
         "--teacher-revision is for a teacher from the hub, which this one is not"),
        ("revision" in given and (student == "tiny" or Path(student).exists()),
         f"--revision is for a student from the hub, which {student} is not"),
    ]
    return [message for wrong, message in rules if wrong]


def needless(config, given):
    """Problems of a stage's flags that were typed and do nothing (`flag`'s `only`)."""
    fields = [f for f in dataclasses.fields(config) if f.metadata["only"] and f.name in given]
    return [f"{option('', '', f.name)} does nothing without {option('', '', other)} {value}"
            for f in fields for other, value in [f.metadata["only"]]
            if getattr(config, other) != value]


# ---- settings.json ----

def load(folder):
    """{stage: {name: value}} of a run folder, or {}. Raises ValueError if it is unreadable."""
    path = Path(folder) / "settings.json"
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {s: dict(values) for s, values in saved.items()}
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{path} can't be read ({error}): delete it, or give another "
                         "--out") from None


def begun(path):
    """Is there a file, or a folder with something in it?"""
    return path.is_file() or path.is_dir() and any(path.iterdir())


def made(folder, stage):
    """Paths of what a stage has made in `folder` so far, finished or not."""
    return [p for p in (Path(folder) / name for name in MADE.get(stage, ())) if begun(p)]


def bare(value):
    """The value; an address without the user and password that it may have."""
    return re.sub(r"//[^/?#]*@", "//", value) if isinstance(value, str) else value


def conflicts(folder, stage, configs, saved):
    """What lies in the run folder and was made with other settings than are asked for."""
    found = {}                                                   # {what differs: paths}
    for s in MADE:
        config = configs.get(s, configs[stage])
        for path in made(folder, s) if s in saved else ():
            # The vote is cheap, and repeated at each start until something was trained on it.
            if path.name == "labels.jsonl" and stage == "teacher" and not made(folder, "sft"):
                continue
            own = MADE[s][path.name]
            differ = [f"{option(stage if f.metadata['run_wide'] else s, stage, f.name)} was "
                      f"{bare(saved[s][f.name])!r}, not {bare(getattr(config, f.name))!r}"
                      for f in dataclasses.fields(config)
                      if f.metadata["result"] and f.name in saved[s]
                      and not (s == "teacher" and f.name == "lora")
                      and (f.metadata["run_wide"] or s in configs and (not own or f.name in own))
                      and bare(saved[s][f.name]) != bare(getattr(config, f.name))]
            if differ:
                found.setdefault("; ".join(differ), []).append(str(path))
    return [f"made with other settings: {', '.join(paths)}: {differ}. Give those, another --out, "
            "or delete it and what was made from it" for differ, paths in found.items()]


def save(folder, stage, configs):
    """Write settings.json: this stage's settings, and those of the stages it may run."""
    asked = configs[stage]
    run_wide = [f.name for f in dataclasses.fields(Common)
                if f.metadata["run_wide"] and f.metadata["result"]]
    # A section that another run left in this folder, without any work, is dropped.
    saved = {s: values for s, values in load(folder).items()
             if s in configs or all(values.get(k, getattr(asked, k)) == getattr(asked, k)
                                    for k in run_wide)}
    for s, config in configs.items():
        # Of a stage that made something, but has no section, the settings are not known.
        if s == stage or s in saved or not made(folder, s):
            # What was made before there was a flag was not made by its default of today.
            done = s != stage and s in saved and all(
                begun(Path(folder) / name) for name in MADE.get(s, (s,)))
            saved[s] = {k: v for k, v in vars(config).items() if k not in (
                "out", "dry_run", "gpus") and (not done or k in saved[s])}
    write_atomic(Path(folder) / "settings.json", json.dumps(saved, indent=1) + "\n")


def parse(stage, stages, doc, argv=None):
    """Command line -> {stage: config} of this stage and of those that it may have to run first.

    Args:
        stages: {"teacher": data.teacher.Config, ...}, with `stage` among them.
        doc: the script's docstring, which --help shows.
    Raises:
        SystemExit: with all that is wrong, one line each.
    """
    given, problems = read_command_line(stage, stages, doc, argv)
    own = {name: value for (s, name), value in given.items() if s == stage}
    folder = own.get("out") or dial(own)["out"][0]
    try:
        saved = load(folder)
    except ValueError as error:
        saved, problems = {}, [*problems, str(error)]
    # A folder in which nothing was made yet may be given to another run, with settings of its own.
    named = next(iter(saved.values()), {})
    same = all(named.get(k, own[k]) == own[k] for k in ("student", "teacher", "task") if k in own)
    if not same and not any(made(folder, s) for s in MADE):
        saved, named = {}, {}
    run_wide = {f.name for f in dataclasses.fields(Common) if f.metadata["run_wide"]}
    known = {**{k: v for k, v in named.items() if k in run_wide}, **own}
    derived = {**dial(known), "out": (folder, "after what the run is")}
    lora = known.get("lora", derived.get("lora", (0,))[0])
    column = presets.settings(known.get("student", "tiny"), lora)

    configs, reasons = {}, {}
    for s, config in stages.items():
        values = {}
        for field in dataclasses.fields(config):
            name = field.name
            before = saved.get(s, named if name in run_wide else {})
            by_size = next((key for key in (f"{s}.{name}", name) if key in column), None)
            if (s, name) in given:
                value, reason = given[s, name], "given"
            elif name in before:
                value, reason = before[name], "settings.json"
            elif name in derived:
                value, reason = derived[name]
            elif by_size:
                value, reason = column[by_size], f"for {known.get('student', 'tiny')}"
            else:
                value, reason = field.default, ""
            values[name], reasons[s, name] = value, reason
        configs[s] = config(**values)
    problems += idle(own, vars(configs[stage]))
    for s, config in configs.items():
        typed = {n for t, n in given if t == s}
        problems += [f"{s}: {p}" if s != stage else p
                     for p in needless(config, typed) + config.problems(typed)]
    problems += conflicts(folder, stage, configs, saved)
    if problems:
        sys.exit("\n".join(dict.fromkeys(problems)))
    show(stage, configs, reasons)
    return configs


def show(stage, configs, reasons):
    """Print the settings that are not plain defaults, each with its reason."""
    print(f"{stage}: settings, beside the defaults; {configs[stage].out}/settings.json has all")
    for s, config in configs.items():
        for field in dataclasses.fields(config):
            value, reason = getattr(config, field.name), reasons[s, field.name]
            # Another stage prints its settings when it runs; here only what was given for it.
            told = s == stage or reason == "given" and field.name not in COMMON
            if told and reason and value != field.default:
                print(f"  {option(s, stage, field.name):26} {value!s:34} {reason}")
