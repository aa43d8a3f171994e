"""The dial, the flags of every stage, and settings.json: who wins, what is refused, and that it
is said."""

import json
import re

import pytest
import torch

import eval as evaluation
import train_rl
import train_sft
from data import teacher
from nanodistill import fit, parallel, presets, settings


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    """Where every student's PPO fits, so that --lora is 0 unless it is given."""
    monkeypatch.setattr(fit, "free_bytes", lambda device: 10**15)


def parse(*argv, script=train_rl, stage="rl", out=None):
    """{stage: config} of a command; the run folder is `out`, or named by the command itself."""
    folder = ["--out", str(out)] if out else []
    return settings.parse(stage, script.STAGES, "doc", [*argv, *folder])


def wrong(*argv, **kwargs):
    """What a wrong command is answered with."""
    with pytest.raises(SystemExit) as stopped:
        parse(*argv, **kwargs)
    return str(stopped.value)


@pytest.mark.parametrize("student, teacher_, task", [
    ("tiny", "tiny", "arithmetic"), ("135m", "1.7b", "gsm8k"), ("0.5b", "7b", "gsm8k"),
    ("1b", "8b", "gsm8k"), ("3b", "8b", "gsm8k")])
def test_the_student_alone_decides_the_rest(student, teacher_, task, capsys):
    for config in parse("--student", student).values():
        assert (config.student, config.teacher, config.task) == (student, teacher_, task)
        assert config.out == f"out/{task}-{student}"
    printed = capsys.readouterr().out
    # Each value is printed with its reason.
    if student != "tiny":
        assert presets.SIZES[teacher_].repository in printed
    assert "for " + student in printed


def test_the_repositories_are_those_that_the_dial_names():
    named = {size: presets.SIZES[size].repository for size in ("1.7b", "7b", "8b", "1b")}
    assert named == {"1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
                     "7b": "Qwen/Qwen2.5-7B-Instruct", "8b": "meta-llama/Llama-3.1-8B-Instruct",
                     "1b": "meta-llama/Llama-3.2-1B-Instruct"}


def test_rates_and_counts_come_from_the_table_of_sizes():
    tiny, small = parse(), parse("--student", "135m")
    assert (tiny["rl"].learning_rate, tiny["sft"].learning_rate) == (2e-4, 5e-4)
    assert tiny["rm"].optimizer == "muon"
    assert tiny["rl"].max_new_tokens == tiny["teacher"].max_new_tokens == 56
    assert small["rl"].max_new_tokens == 512 and small["rm"].samples == 30
    for row in presets.SETTINGS.values():
        assert len(row) == len(presets.COLUMNS)
    fields = {f"{s}.{f}" for s, c in train_rl.STAGES.items() for f in c.__dataclass_fields__}
    assert {n for n in presets.SETTINGS if "." in n} <= fields           # no row that nothing reads


def test_a_student_that_no_size_names_wants_its_teacher_named():
    assert "who teaches it" in wrong("--student", "org/model")
    config = parse("--student", "org/model", "--teacher", "8b")["rl"]
    assert config.task == "gsm8k" and config.out == "out/gsm8k-model-by-8b"
    assert "behind a server" in wrong("--student", "8b")
    server = ["--teacher-url", "http://127.0.0.1:1/v1", "--teacher-model", "m"]
    assert parse("--student", "8b", *server)["rl"].teacher == ""


def test_own_questions_are_asked_as_gsm8ks_are():
    config = parse("--student", "135m", "--data", "x/mine.jsonl")["rl"]
    assert config.task == "gsm8k" and config.out == "out/mine-135m"


@pytest.mark.parametrize("argv, words", [
    (["--data", "x", "--task", "arithmetic"], "--data does nothing"),
    (["--teacher-model", "m"], "--teacher-model does nothing without --teacher-url"),
    (["--teacher-url", "localhost:8000", "--teacher-model", "m"], "begins with http"),
    (["--teacher-url", "http://x/v1"], "needs --teacher-model"),
    (["--teacher-url", "http://x/v1", "--teacher-model", "m", "--teacher", "8b"], "can't be both"),
    (["--teacher.concurrency", "3"], "--concurrency does nothing without --teacher-url"),
    (["--revision", "main"], "--revision is for a student from the hub"),
    (["--teacher-revision", "main"], "--teacher-revision is for a teacher from the hub"),
    (["--kl-target", "3"], "--kl-target does nothing without --kl-control adaptive"),
    (["--algorithm", "rloo", "--samples", "2", "--lam", "0.9"],
     "--lam does nothing without --algorithm ppo"),
    (["--algorithm", "grpo", "--samples", "2", "--value-learning-rate", "1e-3"],
     "--value-learning-rate does nothing without --algorithm ppo"),
    (["--algorithm", "rloo", "--samples", "2", "--reward", "self", "--score", "logit"],
     "--score does nothing with --reward self"),
    (["--algorithm", "rloo"], "--samples 1: the responses to a question"),
    (["--reward", "self", "--value-from", "policy"], "--samples 1: the responses to a question"),
    (["--reward", "vote"], "--reward vote needs --value-from policy"),
    (["--reward", "gold"], "--reward gold: must be one of model, vote, self, function"),
    (["--reference", "teacher", "--lora", "4"], "--reference teacher: not with --lora"),
    (["--reference", "teacher", "--teacher-url", "http://x/v1", "--teacher-model", "m"],
     "--reference teacher: not with --lora, whose trunk is the reference, nor with a server"),
    (["--rm.token-loss", "1", "--rm.rm-loss", "bt"], "--token-loss does nothing"),
    (["--eval.flawed"], "--flawed does nothing"),
    (["--samples", "0"], "--samples 0: must be at least 1"),
    (["--steps", "-3"], "--steps -3: must be at least 1"),
    (["--steps", "2.5"], "--steps 2.5: wants a whole number"),
    (["--learning-rate", "nan"], "--learning-rate nan: wants a finite number"),
    (["--learning-rate", "0"], "must be more than 0"),
    (["--gamma", "1.5"], "--gamma 1.5: must be at most 1"),
    (["--teacher.temperatures", "0.7,,1"], "--temperatures 0.7,,1"),
    (["--teacher.temperatures", "-1"], "--temperatures -1"),
    (["--teacher.temperatures", "inf"], "--temperatures inf"),
    (["--task", "nothing"], "--task nothing: must be one of"),
    (["--prompts", "7"], "do not split into --minibatches 4"),
    (["--stepz", "3"], "--stepz: there is no such flag; --steps?"),
    (["--temperatures", "1.0"], "--temperatures: there is no such flag; --teacher.temperatures?"),
    (["--min-agreement", "0.5"], "--teacher.min-agreement?"),
    (["--rm.seed", "5"], "--rm.seed: there is no such flag"),
])
def test_what_is_wrong_with_the_flags_is_said(argv, words):
    message = wrong(*argv)
    assert words in message and len(message.splitlines()) <= 3


@pytest.mark.parametrize("address", ["user:hush@host/v1", "user@host", ":hush@host/v1?a=b",
                                     "a:hush@b@host/v1"])
def test_a_password_in_the_address_is_refused_and_not_repeated(tmp_path, address):
    server = ["--teacher-url", f"https://{address}", "--teacher-model", "m"]
    message = wrong("--student", "8b", *server, out=tmp_path)
    assert "OPENAI_API_KEY" in message and "settings.json" in message
    assert "hush" not in message and len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["host/v1@2", "host?mail=a@b", "host/#@", "host:8000/v1"])
def test_an_at_sign_behind_the_host_is_no_user(address):
    server = ["--teacher-url", f"https://{address}", "--teacher-model", "m"]
    assert parse("--student", "8b", *server)["rl"].teacher_url == f"https://{address}"


def test_all_that_is_wrong_is_said_at_once():
    message = wrong("--samples", "0", "--gamma", "nan", "--stepz", "1", "--kl-target", "2")
    assert all(w in message for w in ("--samples 0", "--gamma nan", "--stepz", "--kl-target"))


def test_models_of_an_evaluation_leave_nothing_for_the_runs_own_flags():
    kwargs = dict(script=evaluation, stage="eval")
    assert "--student does nothing" in wrong("--models", "a,b", "--student", "1b", **kwargs)
    config = parse("--models", "out/a/rl,out/b/rl/", **kwargs)["eval"]
    assert config.out == "out/arithmetic-a-rl+b-rl"
    config = parse("--task", "gsm8k", "--models", "out/gsm8k-1b/rl", **kwargs)["eval"]
    assert config.out == "out/gsm8k-gsm8k-1b-rl"


def test_another_seed_or_teacher_is_another_folder():
    assert parse("--seed", "5")["rl"].out == "out/arithmetic-tiny-seed5"
    assert parse("--student", "1b", "--teacher", "3b")["rl"].out == "out/gsm8k-1b-by-3b"


def test_a_common_flag_reaches_every_stage_and_a_prefixed_one_its_own():
    configs = parse("--max-new-tokens", "40", "--eval.max-new-tokens", "50", "--rm.samples", "8",
                    "--samples", "2", "--questions", "9")
    assert {s: c.max_new_tokens for s, c in configs.items()} == {
        "teacher": 40, "sft": 40, "rm": 40, "rl": 40, "eval": 50}
    assert {s: c.questions for s, c in configs.items()} == dict.fromkeys(configs, 9)
    assert (configs["rm"].samples, configs["rl"].samples, configs["teacher"].samples) == (8, 2, 10)


def test_a_stage_started_later_takes_the_settings_of_the_run(tmp_path):
    settings.save(tmp_path, "rl", parse("--student", "135m", "--sft.epochs", "7", "--seed", "3",
                                        "--rm.samples", "5", out=tmp_path))
    assert json.loads((tmp_path / "settings.json").read_text())["rm"]["samples"] == 5
    later = parse(script=train_sft, stage="sft", out=tmp_path)
    assert (later["sft"].epochs, later["sft"].student, later["sft"].seed) == (7.0, "135m", 3)
    assert later["teacher"].teacher == "1.7b"
    assert parse("--epochs", "2", script=train_sft, stage="sft", out=tmp_path)["sft"].epochs == 2
    evaluated = parse(script=evaluation, stage="eval", out=tmp_path)["eval"]
    assert (evaluated.student, evaluated.task, evaluated.seed) == ("135m", "gsm8k", 3)


def test_no_section_of_another_run_stays_behind(tmp_path):
    """train_sft.py knows nothing of PPO's section, which was another student's."""
    settings.save(tmp_path, "rl", parse("--student", "135m", out=tmp_path))
    settings.save(tmp_path, "sft", parse("--student", "1b", script=train_sft, stage="sft",
                                         out=tmp_path))
    later = parse(out=tmp_path)
    assert {c.student for c in later.values()} == {"1b"}
    assert later["rl"].learning_rate == presets.settings("1b")["rl.learning_rate"]


def test_a_folder_without_work_may_become_another_run(tmp_path):
    settings.save(tmp_path, "rl", parse("--student", "135m", out=tmp_path))
    config = parse("--student", "1b", out=tmp_path)["rl"]
    assert config.teacher == "8b"
    assert config.learning_rate == presets.settings("1b")["rl.learning_rate"]


@pytest.mark.parametrize("argv, words", [
    (["--seed", "4"], "--seed was 1, not 4"), (["--teacher", "3b"], "--teacher was '8b', not '3b'"),
    (["--teacher.min-agreement", "0.6"], "--teacher.min-agreement was 0.3, not 0.6"),
    (["--max-new-tokens", "9"], "--teacher.max-new-tokens was 512, not 9"),
    (["--questions", "9"], "--teacher.questions was 0, not 9"),
    (["--task", "mmlu_pro"], "--task was 'gsm8k', not 'mmlu_pro'")])
def test_labels_of_other_settings_are_named_and_not_used(tmp_path, argv, words):
    settings.save(tmp_path, "rl", parse("--student", "1b", out=tmp_path))
    (tmp_path / "labels.jsonl").write_text("{}\n")
    message = wrong(*argv, out=tmp_path)
    assert words in message and str(tmp_path / "labels.jsonl") in message and "--out" in message
    # Where nothing depends on it, nothing is in the way.
    parse("--rm.samples", "3", "--threads", "1", "--device", "cpu", "--steps", "5", out=tmp_path)


def test_the_vote_may_be_taken_anew_until_something_was_trained_on_it(tmp_path):
    kwargs = dict(script=teacher, stage="teacher", out=tmp_path)
    settings.save(tmp_path, "teacher", parse(**kwargs))
    for name in ("teacher.jsonl", "labels.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert parse("--min-agreement", "0.9", "--questions", "7", **kwargs)
    assert "--samples was 10, not 3" in wrong("--samples", "3", **kwargs)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text("{}")
    message = wrong("--min-agreement", "0.9", **kwargs)
    assert "labels.jsonl: --min-agreement was 0.4, not 0.9" in message


def test_what_was_made_before_there_was_a_flag_is_not_said_to_be_made_with_it(tmp_path):
    """A reward model of the teacher's vote alone stays one, where the default is another now."""
    def saved():
        return json.loads((tmp_path / "settings.json").read_text())
    settings.save(tmp_path, "rl", parse(out=tmp_path))
    older = saved()
    del older["rm"]["rm_votes"]
    (tmp_path / "settings.json").write_text(json.dumps(older))
    (tmp_path / "student.jsonl").write_text("{}\n")
    settings.save(tmp_path, "rl", parse("--rm.rm-votes", "teacher", out=tmp_path))
    assert saved()["rm"]["rm_votes"] == "teacher"                # it is not made yet
    (tmp_path / "settings.json").write_text(json.dumps(older))
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "config.json").write_text("{}")
    settings.save(tmp_path, "rl", parse("--steps", "3", out=tmp_path))
    assert "rm_votes" not in saved()["rm"] and saved()["rl"]["steps"] == 3


def test_an_unreadable_settings_file_is_named(tmp_path):
    for text in ("{", "[1]", '{"rl": 3}'):
        (tmp_path / "settings.json").write_text(text)
        assert str(tmp_path / "settings.json") in wrong(out=tmp_path)


def test_help_gives_each_flag_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "discount per token (default: 1.0)" in text
    assert "PPO steps; one step samples a batch and learns from it (by size: tiny 60, 135m" in text
    assert "--teacher.temperatures" in text and "--rm.samples" in text


def test_lora_is_chosen_where_ppo_of_all_weights_does_not_fit(monkeypatch, capsys):
    """By docs/memory.md's table: PPO of 1b takes 60 GB with bf16 arithmetic, more in fp32."""
    whole, given = parse("--student", "1b"), parse("--student", "1b", "--lora", "8")
    assert {c.lora for c in whole.values()} == {0} and {c.lora for c in given.values()} == {8}
    monkeypatch.setattr(fit, "free_bytes", lambda device: 24 * 10**9)
    capsys.readouterr()
    small = parse("--student", "1b")
    assert {c.lora for c in small.values()} == {32}
    assert re.search(r"--lora +32 +PPO of all weights in 24.0 GB does not fit",
                     capsys.readouterr().out)
    assert small["rl"].learning_rate == pytest.approx(10 * whole["rl"].learning_rate)
    assert small["sft"].learning_rate == pytest.approx(10 * whole["sft"].learning_rate)
    assert parse("--student", "1b", "--learning-rate", "1e-6")["rl"].learning_rate == 1e-6
    assert {c.lora for c in parse("--student", "135m").values()} == {0}      # 10 GB
    assert {c.lora for c in parse().values()} == {0}
    # Ten times the rates of AdamW; Muon's was that high already.
    tiny, big = parse("--lora", "32"), parse("--student", "1b", "--lora", "32")
    assert (tiny["rm"].learning_rate, tiny["rm"].optimizer) == (3e-3, "adamw")
    assert tiny["rl"].learning_rate == 2e-3 and tiny["sft"].learning_rate == 5e-3
    assert big["rm"].learning_rate == 1e-4 and big["rl"].learning_rate == 1e-5


def test_of_several_processes_the_dial_asks_for_the_memory_of_all(monkeypatch, capsys):
    """8b: by hand, 14 bytes of each of 2 x 7.8e9 weights are 217 GB; an eighth is 27 GB, beside
    which the sampler's 16 GB fit 72 GB."""
    monkeypatch.setattr(fit, "free_bytes", lambda device: 72 * 10**9)
    monkeypatch.setattr(fit, "pick_device", torch.device)
    taught = ("--student", "8b", "--device", "cuda", "--teacher-url", "http://host/v1",
              "--teacher-model", "m", "--dry-run")
    assert parse(*taught)["rl"].lora == 32
    assert parse(*taught, "--gpus", "8")["rl"].lora == 0
    # As torchrun says; nothing is sent between them here.
    monkeypatch.setattr(parallel, "world", lambda: 8)
    monkeypatch.setattr(parallel, "local_world", lambda: 8)
    monkeypatch.setattr(parallel, "start", lambda device: None)
    monkeypatch.setattr(parallel, "gather", lambda part: [part] * 8)
    assert parse(*taught)["rl"].lora == 0
    # All go by the one that has the least.
    monkeypatch.setattr(parallel, "gather", lambda part: [part] * 7 + [24 * 10**9])
    capsys.readouterr()
    assert parse(*taught)["rl"].lora == 32
    assert re.search(r"--lora +32 +PPO of all weights in 8 x 24.0 GB does not fit",
                     capsys.readouterr().out)


def test_gpus_is_for_a_dry_run_and_counts_whole_machines(tmp_path):
    assert "does nothing without --dry-run" in wrong("--gpus", "8")
    assert "--gpus 12" in wrong("--gpus", "12", "--dry-run")
    configs = parse("--gpus", "16", "--dry-run", out=tmp_path)
    assert configs["rl"].gpus == configs["sft"].gpus == 16
    settings.save(tmp_path, "rl", configs)
    assert "gpus" not in (tmp_path / "settings.json").read_text()


def test_a_password_of_an_older_program_is_neither_shown_nor_a_hindrance(tmp_path):
    """Its settings.json may have one in the server's address."""
    told = ("--student", "8b", "--teacher-url", "http://host/v1", "--teacher-model", "m")
    settings.save(tmp_path, "rl", parse(*told, out=tmp_path))
    path = tmp_path / "settings.json"
    path.write_text(path.read_text().replace("http://host", "http://user:secret@host"))
    (tmp_path / "teacher.jsonl").write_text("{}\n")
    assert parse(*told, out=tmp_path)["rl"].teacher_url == "http://host/v1"
    other = [*told[:3], "http://other/v1", *told[4:]]
    said = wrong(*other, out=tmp_path)
    assert "secret" not in said and "--teacher-url was 'http://host/v1', not 'http://other" in said
