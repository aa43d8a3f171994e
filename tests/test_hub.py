"""The hub, by a stand-in for it (hub.py): what is fetched, every way in which it can fail, and the
literal command of the README."""

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ASSETS
from hub import CHATML, LLAMA, WEIGHTS, Hub, Repository, build
from huggingface_hub import _tree_cache, constants, file_download

import data.hub
from data.hub import bytes_to_fetch, resolve
from nanodistill import vote, weights
from nanodistill.generate import generate
from nanodistill.tokenizer import Tokenizer
from nanodistill.weights import load, load_config


ROOT = Path(__file__).resolve().parents[1]
STUDENT, TEACHER = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FETCHED = ["config.json", "generation_config.json", WEIGHTS, "tokenizer.json",
           "tokenizer_config.json"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name on the hub: folder} of a student, a teacher, and a student of another family."""
    root = tmp_path_factory.mktemp("models")
    return {STUDENT: build(root / "1b", STUDENT),
            TEACHER: build(root / "8b", TEACHER, {"7": 0.7, "8": 0.2, "3": 0.1}, seed=1),
            SMALL: build(root / "135m", SMALL)}


@pytest.fixture
def at(monkeypatch, tmp_path):
    """at(Hub) -> the same, running, and taken for the hub by this process; the cache is empty."""
    running = []

    def start(hub):
        running.append(hub.__enter__())
        point(hub.url)
        return hub

    def point(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            url + "/{repo_id}/resolve/{revision}/{filename}")

    start.point = point
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(data.hub, "_silent", set())
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield start
    for hub in running:
        hub.__exit__()


@contextmanager
def fault(*words, flag="--student 1b", seconds=5):
    """What is inside ends in one message: of at most three lines, with all `words`, and in time."""
    begun = time.time()
    with pytest.raises(SystemExit) as caught:
        yield
    message = caught.value.code
    assert isinstance(message, str) and message.startswith(flag), message
    assert message.count("\n") < 3, message
    for word in words:
        assert word in message, message
    assert time.time() - begun < seconds


def nobody():
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def same_files(folder, source, names=FETCHED):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name


# ---- what is fetched ----

def test_a_repository_is_fetched_whole_and_once(at, folders):
    hub = at(Hub({STUDENT: Repository(folders[STUDENT])}))
    size = (folders[STUDENT] / WEIGHTS).stat().st_size
    assert bytes_to_fetch("1b") == size
    folder = resolve("1b", "student")
    same_files(folder, folders[STUDENT])                                 # the README is not fetched
    assert bytes_to_fetch("1b") == bytes_to_fetch(str(folder)) == bytes_to_fetch("tiny") == 0
    assert sorted(hub.fetched(STUDENT)) == sorted(FETCHED)
    assert resolve(STUDENT, "models") == folder and len(hub.fetched(STUDENT)) == len(FETCHED)


def test_weights_that_a_newer_commit_kept_are_not_counted_again(at, folders, tmp_path):
    source = shutil.copytree(folders[STUDENT], tmp_path / "source")
    hub = at(Hub({STUDENT: Repository(source)}))
    first = resolve("1b", "student")
    (source / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert bytes_to_fetch("1b") == 0
    second = resolve("1b", "student")
    assert first != second and hub.fetched(STUDENT).count(WEIGHTS) == 1
    same_files(second, source)


def test_without_weights_the_small_files_are_fetched(at, folders):
    hub = at(Hub({STUDENT: Repository(folders[STUDENT])}))
    folder = resolve("1b", "student", weights=False)
    same_files(folder, folders[STUDENT], [name for name in FETCHED if name != WEIGHTS])
    assert WEIGHTS not in hub.fetched(STUDENT) + hub.fetched(STUDENT, "HEAD")
    assert load_config(folder).hidden_size == 64 and Tokenizer(folder).eos_ids
    assert bytes_to_fetch("1b") == (folders[STUDENT] / WEIGHTS).stat().st_size
    same_files(resolve("1b", "student"), folders[STUDENT])


def test_a_download_that_breaks_off_goes_on_where_it_was(at, folders, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)          # the hub's own is 10 MB
    hub = at(Hub({STUDENT: Repository(folders[STUDENT], breaks=1)}))
    same_files(resolve("1b", "student"), folders[STUDENT])
    ranges = [r.range for r in hub.requests if r.method == "GET" and r.path.endswith(WEIGHTS)]
    half = (folders[STUDENT] / WEIGHTS).stat().st_size // 2
    assert len(ranges) == 2 and ranges[0] == ""
    assert half - 4096 <= int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= half


def test_a_download_that_keeps_breaking_off_is_gone_on_with_by_the_same_command(at, folders):
    repository = Repository(folders[STUDENT], breaks=10**6)
    hub = at(Hub({STUDENT: repository}))
    with fault("broke off", "The same command goes on", "--student 135m"):
        resolve("1b", "student")
    before = [name for name in hub.fetched(STUDENT) if name != WEIGHTS]
    repository.breaks = 0
    same_files(resolve("1b", "student"), folders[STUDENT])
    assert sorted(name for name in hub.fetched(STUDENT) if name != WEIGHTS) == sorted(before)


def test_a_renamed_repository_is_found(at, folders, monkeypatch):
    hub = at(Hub({STUDENT: Repository(renamed="meta/New"),
                  "meta/New": Repository(folders[STUDENT], gated="key")}))
    monkeypatch.setenv("HF_TOKEN", "key")
    same_files(resolve("1b", "student"), folders[STUDENT])
    assert sorted(hub.fetched("meta/New")) == sorted(FETCHED)


def test_a_branch_and_a_commit_are_taken(at, folders):
    branch = Repository(folders[TEACHER])
    at(Hub({STUDENT: Repository(folders[STUDENT], branches={"v2": branch})}))
    main, size = resolve("1b", "student"), (folders[TEACHER] / WEIGHTS).stat().st_size
    assert bytes_to_fetch("1b", "v2") == bytes_to_fetch("1b", branch.commit) == size
    folder = resolve("1b", "student", branch.commit)
    assert folder == resolve("1b", "student", "v2") != main
    same_files(folder, folders[TEACHER])
    assert bytes_to_fetch("1b", "v2") == 0


# ---- access ----

@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name, role", [("1b", "student"), ("8b", "teacher")])
def test_a_gated_repository_says_how_to_get_in(at, folders, monkeypatch, name, role, whole):
    repository = STUDENT if name == "1b" else TEACHER
    hub = at(Hub({repository: Repository(folders[repository], gated="right")}))
    words = ("gated", f"https://huggingface.co/{repository}", "hf auth login", "--student 135m",
             "--student 0.5b")
    with fault(*words, "no token is set", flag=f"--{role} {name}"):
        resolve(name, role, weights=whole)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with fault(*words, "your token does not open it", flag=f"--{role} {name}"):
        resolve(name, role, weights=whole)
    assert not hub.fetched(repository)
    monkeypatch.setenv("HF_TOKEN", "right")
    same_files(resolve(name, role), folders[repository])


def test_small_files_in_the_cache_are_no_access(at, folders, monkeypatch):
    """They were fetched with a token that is gone: the weights could not be."""
    at(Hub({STUDENT: Repository(folders[STUDENT], gated="right")}))
    monkeypatch.setenv("HF_TOKEN", "right")
    resolve("1b", "student", weights=False)
    monkeypatch.delenv("HF_TOKEN")
    with fault("gated"):
        resolve("1b", "student", weights=False)


def test_missing_and_private_repositories(at, folders, monkeypatch):
    at(Hub({"me/own": Repository(folders[STUDENT], private="mine")}))
    for token in ("", "mine"):
        monkeypatch.setenv("HF_TOKEN", token)
        with fault("no model me/none, or it is private", "hf auth login", flag="--student me/none"):
            resolve("me/none", "student")
    monkeypatch.setenv("HF_TOKEN", "")
    with fault("private", "hf auth login", "--student 135m", flag="--teacher me/own"):
        resolve("me/own", "teacher")
    monkeypatch.setenv("HF_TOKEN", "mine")
    same_files(resolve("me/own", "teacher"), folders[STUDENT])


def test_no_such_revision(at, folders):
    at(Hub({STUDENT: Repository(folders[STUDENT])}))
    with fault("no such branch, tag or commit", STUDENT, flag="--revision v9"):
        resolve("1b", "student", "v9")
    with fault(flag="--teacher-revision v9"):
        resolve("1b", "teacher", "v9")


@pytest.mark.parametrize("status, words", [
    (503, "answers 503"), (429, "answers 429"), (401, "does not take your token")])
def test_a_hub_that_answers_with_an_error(at, folders, monkeypatch, status, words):
    monkeypatch.setenv("HF_TOKEN", "old")
    at(Hub({STUDENT: Repository(folders[STUDENT], status=status)}))
    with fault(words, "hf auth login"):
        resolve("1b", "student")
    assert bytes_to_fetch("1b") == 0


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_repository_without_what_we_read(at, folders, tmp_path, file):
    source = shutil.copytree(folders[STUDENT], tmp_path / "source")
    (source / file).unlink()
    at(Hub({STUDENT: Repository(source)}))
    with fault(f"has no {file} on the hub"):
        resolve("1b", "student")


# ---- no network ----

def test_nobody_at_the_endpoint(at):
    at.point(nobody())
    with fault("cannot be reached", "Connection refused", "--student 135m", "--student tiny"):
        resolve("1b", "student")
    assert bytes_to_fetch("1b") == 0


def test_a_hub_that_never_answers_is_given_up_within_seconds(at, folders, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    hub = at(Hub(silent=True))
    with fault("cannot be reached", "--student tiny", seconds=5):
        resolve("1b", "student")
    asked = len(hub.requests)
    with fault("cannot be reached", flag="--teacher 8b", seconds=0.5):   # and not asked once more
        resolve("8b", "teacher")
    assert len(hub.requests) == asked


# Ways in which the hub is lost. Each returns what the message says of it.

def offline(at, monkeypatch, hub):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "HF_HUB_OFFLINE is set"


def unreachable(at, monkeypatch, hub):
    at.point(nobody())
    return "cannot be reached"


def out_of_order(at, monkeypatch, hub):
    hub.repositories[STUDENT].status = 503
    return "answers 503"


def no_longer_let_in(at, monkeypatch, hub):
    hub.repositories[STUDENT].gated = "other"
    return "gated"


TROUBLES = [offline, unreachable, out_of_order, no_longer_let_in]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_copy_without_weights_in_the_cache_is_no_model(at, folders, monkeypatch, trouble, listed):
    hub = at(Hub({STUDENT: Repository(folders[STUDENT])}))
    folder = resolve("1b", "student", weights=False)
    if not listed:                                   # as a cache that an older program has filled
        shutil.rmtree(folder.parents[1] / "trees")
        monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    words = trouble(at, monkeypatch, hub)
    for whole in (True, False):
        with fault(words):
            resolve("1b", "student", weights=whole)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_whole_copy_in_the_cache_is_used_and_said(at, folders, monkeypatch, capsys, trouble):
    hub = at(Hub({STUDENT: Repository(folders[STUDENT])}))
    folder = resolve("1b", "student")
    words = trouble(at, monkeypatch, hub)
    capsys.readouterr()
    assert resolve("1b", "student") == resolve("1b", "student", weights=False) == folder
    said = capsys.readouterr().out
    if trouble is offline:                                               # it was asked for
        assert said == ""
    else:
        assert words in said and said.count("Taken from the cache") == 2
    assert bytes_to_fetch("1b") == 0


def test_offline_says_so_and_names_what_the_cache_lacks(at, folders, monkeypatch):
    at(Hub({STUDENT: Repository(folders[STUDENT])}))
    resolve("1b", "student", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with fault("HF_HUB_OFFLINE is set", f"lacks {WEIGHTS}", "Unset it"):
        resolve("1b", "student")
    with fault("HF_HUB_OFFLINE is set", "is not in the cache", flag="--teacher 8b"):
        resolve("8b", "teacher")


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "No space left"),
                                           (errno.EACCES, "Permission denied")])
def test_a_cache_that_cannot_be_written(at, folders, monkeypatch, number, words):
    def http_get(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    at(Hub({STUDENT: Repository(folders[STUDENT])}))
    monkeypatch.setattr(file_download, "http_get", http_get)
    with fault("cache", words, "HF_HOME"):
        resolve("1b", "student")


def test_a_cut_shard_index_is_not_taken_for_weights(at, folders, tmp_path):
    """Of two shards that the index names the hub has one."""
    source = shutil.copytree(folders[STUDENT], tmp_path / "source")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (source / WEIGHTS).rename(source / shards[0])
    (source / weights.INDEX).write_text(json.dumps({"weight_map": dict(zip("ab", shards))}))
    at(Hub({STUDENT: Repository(source)}))
    with fault(f"has no {shards[1]} on the hub"):
        resolve("1b", "student")


# ---- names ----

def test_tiny_is_two_models():
    with fault("data/tiny/teacher", "data/tiny/student", flag="--models tiny"):
        resolve("tiny", "models")


@pytest.mark.parametrize("name", ["no-such-thing", "a/b/c", "./a", "a/b c", "", "/no/such"])
def test_a_name_that_means_no_model(name):
    with fault("not a preset", "135m", flag=f"--student {name}:"):
        resolve(name, "student")
    assert bytes_to_fetch(name) == 0


# ---- config.json ----

@pytest.mark.parametrize("change, words", [
    (lambda raw: raw.pop("hidden_size"), "lacks hidden_size"),
    (lambda raw: [raw.pop(key) for key in ("vocab_size", "num_hidden_layers")],
     "lacks vocab_size, num_hidden_layers"),
    (lambda raw: raw.pop("model_type"), "names no model_type"),
    (lambda raw: raw["rope_scaling"].pop("factor"), "lacks factor of rope_scaling"),
    (lambda raw: raw.update(rope_scaling=8), "rope_scaling is not an object: 8"),
    (lambda raw: raw.update(hidden_size="64"), "not a whole number above 0: hidden_size = '64'"),
    (lambda raw: raw.update(num_hidden_layers=0), "num_hidden_layers = 0"),
    (lambda raw: raw.update(num_key_value_heads=3), "do not share 3 num_key_value_heads evenly"),
])
def test_a_config_with_a_fault_is_named_with_it(folders, tmp_path, change, words):
    raw = json.loads((folders[STUDENT] / "config.json").read_text())
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [("{", "is not JSON"), ("\xff", "is not JSON"),
                                            ("[1]", "is not a JSON object"), ("", "is not JSON")])
def test_a_config_that_is_no_json(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=words):
        load_config(tmp_path)


# ---- the models themselves ----

@pytest.mark.parametrize("name, family", [(STUDENT, LLAMA), (TEACHER, LLAMA), (SMALL, CHATML)])
def test_the_models_answer_so_that_most_votes_count_and_not_all(folders, name, family):
    tokenizer, model = Tokenizer(folders[name]), load(folders[name])
    assert model.config.tie_word_embeddings == (name != TEACHER)
    prompts = [tokenizer.prompt_ids(f"Ann has {i} eggs. How many?") for i in range(60)]
    answers = [[None] * 10 for _ in prompts]
    for i, j, sample in generate(model, prompts, n=10, max_new_tokens=16,
                                 eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id):
        text = tokenizer.decode(sample.tokens)
        assert sample.ended and (text == "I" or text.startswith("#### "))
        answers[i][j] = text.removeprefix("#### ") if text != "I" else None
    agreement = [vote.majority(row, 0.3).agreement for row in answers]
    assert 0.5 < sum(a >= 0.3 for a in agreement) / 60 and min(agreement) < 0.9
    assert any(None in row for row in answers)
    assert tokenizer.tokenizer.id_to_token(tokenizer.eos_ids[0]) == family.stops[0]


def test_the_models_are_llamas_to_transformers(folders):
    transformers = pytest.importorskip("transformers")
    for folder in folders.values():
        ours = Tokenizer(folder).prompt_ids("Ann has 3 eggs.")
        theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": "Ann has 3 eggs."}], add_generation_prompt=True)
        assert theirs["input_ids"] == ours
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            ids = torch.tensor([ours])
            assert (model(ids).logits - load(folder)(ids)).abs().max() <= 1e-4


# ---- the command ----

def command(cwd, env, *flags):
    """`python train_rl.py --student 1b ...` as a newcomer types it, and nothing else."""
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return subprocess.run([sys.executable, str(ROOT / "train_rl.py"), "--student", "1b", *flags],
                          cwd=cwd, env={**clean, "OMP_NUM_THREADS": "1", **env},
                          capture_output=True, text=True, timeout=1500)


def to_the_table(tmp_path, folders, cwd, *flags):
    """The command with the hub's stand-in, from nothing; asserts what it must come to."""
    repositories = {STUDENT: Repository(folders[STUDENT], gated="key"),
                    TEACHER: Repository(folders[TEACHER], gated="key", breaks=1)}
    with Hub(repositories) as hub:
        done = command(cwd, hub.environment(tmp_path / "home", "key"), "--steps", "2",
                       "--questions", "96", "--max-new-tokens", "16", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| rl |" in done.stdout and "Traceback" not in done.stderr
    for name in repositories:
        assert set(hub.fetched(name)) == set(FETCHED)
    assert hub.fetched(TEACHER).count(WEIGHTS) == 2                      # it broke off once
    [out] = (cwd / "out").iterdir()
    settings = json.loads((out / "settings.json").read_text())["rl"]
    assert (settings["student"], settings["teacher"], settings["task"]) == ("1b", "8b", "gsm8k")
    assert all((out / stage / WEIGHTS).exists() for stage in ("sft", "rm", "rl"))
    assert len((out / "labels.jsonl").read_text().splitlines()) == 96
    return done


def test_the_literal_command(tmp_path, folders, assets):
    """From a machine with GSM8K in the cache and nothing else to the table of results."""
    home = tmp_path / "home" / "nanodistill" / "gsm8k"
    home.mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(assets / "gsm8k" / name, home / name)
    to_the_table(tmp_path, folders, tmp_path)


@pytest.mark.skipif(ASSETS.exists(), reason="the test before it goes the same way")
def test_the_command_with_own_questions(tmp_path, folders):
    """The same with a file of questions without answers, which needs no data of others."""
    rng = random.Random(0)
    rows = [{"question": f"Ann has {rng.randrange(90)} eggs and buys {rng.randrange(90)} more. "
                         "How many has she?"} for _ in range(120)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    to_the_table(tmp_path, folders, tmp_path, "--data", "own.jsonl")


@pytest.mark.parametrize("there", [True, False])
def test_the_command_without_token_or_network_says_what_to_do(tmp_path, folders, there):
    """Within seconds, in a few lines, and before anything was made."""
    begun = time.time()
    gated = {name: Repository(folders[name], gated="key") for name in (STUDENT, TEACHER)}
    with Hub(gated) as hub:
        env = hub.environment(tmp_path / "home")
        if not there:
            env["HF_ENDPOINT"] = nobody()
        env["NANODISTILL_GSM8K_URL"] = nobody()
        done = command(tmp_path, env)
    assert time.time() - begun < 20
    assert done.returncode != 0 and "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) <= 10, done.stderr
    assert "--student 1b" in done.stderr and "--teacher 8b" in done.stderr
    assert ("hf auth login" if there else "cannot be reached") in done.stderr
    assert "--student 135m" in done.stderr and "--student tiny" in done.stderr
    assert not list(tmp_path.glob("out/*/*"))
