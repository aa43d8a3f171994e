"""A stand-in for the Hugging Face hub on the loopback address, and models small enough for it.

    with Hub({"org/name": Repository(build(folder))}) as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})

It speaks as much of the hub's HTTP as `snapshot_download`, `hf_hub_download` and
`HfApi().model_info` need, without Xet. As on the real hub, anybody may list a gated repository,
and only who has access gets its files.
"""

import hashlib
import json
import math
import random
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from nanodistill.model import CausalLM, init_weights
from nanodistill.weights import load_config


# ---- the hub ----

WEIGHTS = "model.safetensors"


@dataclass
class Repository:
    """A folder on the hub: the one commit of the branch "main"."""
    folder: Path | None = None
    gated: str = ""                # its files need this token: 401 without any, 403 with another
    private: str = ""              # without this token it looks as if it were not there
    renamed: str = ""              # all requests are sent on to this name (307)
    status: int = 0                # each request is answered by this: 503, 429
    breaks: int = 0                # so many answers with the weights break off in the middle
    branches: dict = field(default_factory=dict)           # {another branch: its Repository}

    @property
    def files(self):
        return sorted(path.name for path in self.folder.iterdir())

    @property
    def commit(self):
        blobs = "".join(name + self.blob(name) for name in self.files)
        return hashlib.sha1(blobs.encode()).hexdigest()

    def blob(self, name):
        """Git's id of the file."""
        data = (self.folder / name).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def large(self, name):
        """{"sha256", "size"} of a file that the hub keeps outside git, else None."""
        if not name.endswith(".safetensors"):
            return None
        data = (self.folder / name).read_bytes()
        return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}


@dataclass
class Request:
    method: str
    path: str
    token: str
    range: str                     # "bytes=5-", or ""


@dataclass
class Hub:
    """The server, from `with` to its end. `requests`: all that came, in order. `silent`: it takes
    requests and answers none."""
    repositories: dict = field(default_factory=dict)
    silent: bool = False

    def __enter__(self):
        hub, self.requests, self.over = self, [], threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def fetched(self, name, method="GET"):
        """Files of the repository `name` that were asked for, in order."""
        start = f"/{name}/resolve/"
        return [r.path.split("/")[-1] for r in self.requests
                if r.method == method and r.path.startswith(start)]

    def environment(self, home, token=""):
        """Environment variables with which a subprocess takes this for the hub, and `home` for the
        place of its cache."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token,
                "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.requests.append(
            Request(request.command, path, token, request.headers.get("Range", "")))
        if self.silent:
            return self.over.wait()
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.repositories.get(name)
        if repository is None or repository.private and token != repository.private:
            return send(request, 404 if token else 401, error="RepoNotFound")
        if repository.status:
            return send(request, repository.status)
        if repository.renamed:
            there = request.path.replace(name, repository.renamed, 1)
            return send(request, 307, {"Location": there})
        heads = {"main": repository, **repository.branches}
        heads |= {head.commit: head for head in heads.values()}
        repository = heads.get(rest[1] if len(rest) > 1 else "main")
        if repository is None:
            return send(request, 404, error="RevisionNotFound")
        if api and rest[:1] == ["tree"]:
            rows = []
            for file in repository.files:
                large = repository.large(file)
                rows.append({"type": "file", "path": file, "oid": repository.blob(file),
                             "size": (repository.folder / file).stat().st_size,
                             **({"lfs": {**large, "oid": large["sha256"]}} if large else {})})
            return send(request, 200, body=json.dumps(rows).encode())
        if api:
            siblings = [{"rfilename": file, "blobId": repository.blob(file),
                         "size": (repository.folder / file).stat().st_size,
                         "lfs": repository.large(file)} for file in repository.files]
            return send(request, 200, body=json.dumps({
                "id": name, "modelId": name, "sha": repository.commit, "private": False,
                "gated": "manual" if repository.gated else False, "tags": [],
                "siblings": siblings}).encode())
        return self.file(request, repository, rest[-1], token)

    def file(self, request, repository, name, token):
        if repository.gated and token != repository.gated:
            return send(request, 403 if token else 401, error="GatedRepo")
        commit = {"X-Repo-Commit": repository.commit}
        if name not in repository.files:
            return send(request, 404, commit, error="EntryNotFound")
        body, large = (repository.folder / name).read_bytes(), repository.large(name)
        headers = {**commit, "Accept-Ranges": "bytes",
                   "ETag": f'"{large["sha256"] if large else repository.blob(name)}"'}
        start = request.headers.get("Range", "")
        if start:
            first = int(start.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            body = body[first:]
        breaks = name == WEIGHTS and request.command == "GET" and repository.breaks > 0
        repository.breaks -= breaks
        send(request, 206 if start else 200, headers, body, sent=len(body) // 2 if breaks else None)


def send(request, status, headers=(), body=b"", error="", sent=None):
    """One answer. `sent`: so many bytes of the body, and the connection is closed."""
    request.send_response(status)
    if error:
        headers = {**dict(headers), "X-Error-Code": error, "X-Error-Message": error}
    for key, value in {**dict(headers), "Content-Length": str(len(body))}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body[:sent])
        request.wfile.flush()
    if sent is not None:
        request.close_connection = True


# ---- its models ----

# Llama 3's way of splitting text before the merges, and its wrapping of a chat in words of ours.
LLAMA_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- set today = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set words = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set words = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + today + "\\n\\n" }}
{{- words + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help, in few words.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@dataclass(frozen=True)
class Family:
    """What the tokenizers of a family share. `stops`: the first ends a turn. `last`: the token that
    a prompt ends with."""
    special: tuple
    bos: str
    stops: tuple
    pad: str
    template: str
    last: str


LLAMA = Family(("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>",
                "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
                "<|python_tag|>"),
               "<|begin_of_text|>", ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"), "",
               LLAMA_TEMPLATE, "\n\n")
CHATML = Family(("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                "<|im_start|>", ("<|im_end|>",), "<|im_end|>", CHATML_TEMPLATE, "\n")


WORDS = """the of and to in a is that for it as was with be by on not he his but at are this have
from or had an they which one you were all her she there would their we him been has when who will
no more if out so up said what its about than into them can only other time new some could these two
may first then do any like my now over such our man me even most made after also did many off before
must well back through years much where your way down should because long each just state people too
mr little good world make very year still see own work men day get here old how left cost costs
dollars per week hours total number money buys bought sells sold pays gives twice half as if times
apples eggs books friends school days minutes price needs spend spends earns walks eats box boxes
car house children water miles pounds percent remaining together every another both same three four
five six seven eight nine ten twenty hundred final answer alone line write system user assistant"""


@lru_cache
def tokenizer(family):
    """A byte-level BPE of some 1,200 tokens, learned from a few hundred made-up sentences."""
    rng = random.Random(0)
    words = WORDS.split()
    text = [f"{' '.join(rng.sample(words, 12)).capitalize()}. {rng.choice(words)}, "
            f"{rng.choice(words)}\n\n#### {rng.randrange(1000)}\nCutting Knowledge Date: 26 Dec "
            "2023. Solve this problem step by step. On the last line write four hash marks"
            for _ in range(400)]
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in family.special])
    if family is LLAMA:
        bos = family.bos
        bpe.post_processor = processors.TemplateProcessing(
            f"{bos} $A", f"{bos} $A {bos} $B", [(bos, bpe.token_to_id(bos))])
    return bpe


def machine(family, answers, none=0.1):
    """{token: {the next: its probability}}, as text: after a prompt comes "####", a blank, one of
    `answers` and the end, or, with the probability `none`, "I" and the end."""
    end = family.stops[0]
    return {family.last: {"####": 1 - none, "I": none}, "####": {" ": 1.0}, " ": answers,
            **{token: {end: 1.0} for token in ("I", *answers)}}


def build(folder, name="meta-llama/Llama-3.2-1B-Instruct", answers=None, seed=0):
    """Write a model of Llama's shape, 2 layers of 64, to `folder`; returns it.

    `name` decides the family, and the head is tied but for the 8B, as on the real hub. The weights
    are random, with a path that drowns them: the first layer's MLP looks up the token it stands at
    and adds the embeddings of those that `machine` lets follow. So a response is "#### 7" and the
    end, or another of `answers` {digit: probability}, or "I".
    """
    family, tied = LLAMA if "llama" in name else CHATML, "8B" not in name
    answers = answers or {"7": 0.45, "8": 0.25, "3": 0.2, "5": 0.1}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bpe = tokenizer(family)
    bpe.save(str(folder / "tokenizer.json"))
    ids = {token: bpe.token_to_id(token) for token in family.special}
    stops = [ids[token] for token in family.stops]
    stops = stops if len(stops) > 1 else stops[0]
    rope = {"factor": 8.0 if "3.1" in name else 32.0,
            "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"}

    def write(file, values):
        (folder / file).write_text(json.dumps(values, indent=2) + "\n")

    write("config.json", {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": ids[family.bos], "eos_token_id": stops, "head_dim": 16,
        "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 96, "max_position_embeddings": 131072 if family is LLAMA else 8192,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": rope if family is LLAMA else None,
        "rope_theta": 500000.0 if family is LLAMA else 100000.0, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": True,
        "vocab_size": bpe.get_vocab_size()})
    write("generation_config.json", {
        "bos_token_id": ids[family.bos], "do_sample": True, "eos_token_id": stops,
        "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.45.0.dev0"})
    write("tokenizer_config.json", {
        "added_tokens_decoder": {str(i): {"content": token, "special": True}
                                 for token, i in ids.items()},
        "bos_token": family.bos, "eos_token": family.stops[0], "chat_template": family.template,
        "clean_up_tokenization_spaces": False, "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"pad_token": family.pad} if family.pad else {})})
    (folder / "README.md").write_text(f"# {name}\n")

    def token(text):
        found = bpe.encode(text, add_special_tokens=False).ids
        assert len(found) == 1, f"{text!r} is {len(found)} tokens"
        return found[0]

    model = CausalLM(load_config(folder))
    init_weights(model, torch.Generator().manual_seed(seed), std=0.02)
    weights = {key: value.detach().clone() for key, value in model.named_parameters()}
    chain = {token(a): {token(b): p for b, p in following.items()}
             for a, following in machine(family, answers).items()}
    end = token(family.stops[0])
    # Each token of the chain has a dimension of its own, all others share one, and one is spare.
    dimension = {t: k for k, t in enumerate(sorted({*chain, end}))}
    rest, spare = len(dimension), len(dimension) + 1
    # After the last norm a hidden state has length 8: an embedding of 4 times a basis vector reads
    # 32 times the state's share along it.
    embedding = weights["model.embed_tokens.weight"]                 # (V, D)
    embedding[:, :rest], embedding[:, rest], embedding[:, spare] = 0, 4, 0
    for t, k in dimension.items():
        embedding[t] = 0
        embedding[t, k] = 4
    gate, up, down = (weights[f"model.layers.0.mlp.{part}_proj.weight"]
                      for part in ("gate", "up", "down"))            # (96, D), (96, D), (D, 96)
    follow = {rest: {end: 1.0}, **{dimension[t]: following for t, following in chain.items()}}
    for k, following in follow.items():                              # neuron k looks token k up
        gate[k], up[k], down[:, k] = 0, 0, 0
        gate[k, k] = up[k, k] = 1                                    # 8 after the norm: 8 * 8 = 64
        for t, p in following.items():
            down[dimension[t], k] = (16 + math.log(p)) / 32              # a logit of 16 + log p
        down[spare, k] = (1 - down[:, k].square().sum()).sqrt()      # so that the length is 1
        down[:, k] *= 20                                             # 1,280, beside the token's 4
    if not tied:
        weights["lm_head.weight"] = embedding.clone()
    save_file({key: value.to(torch.bfloat16).contiguous() for key, value in weights.items()},
              folder / WEIGHTS, metadata={"format": "pt"})
    return folder
