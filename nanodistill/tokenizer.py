"""Text to token ids and back: an HF folder's tokenizer.json, its chat template and its stop tokens.

Questions come from data, and data may contain the text of a special token ("<|eot_id|>"). Such text
stays text: only the chat template's own special tokens become special. Templates come from outside
too, and are rendered in Jinja's sandbox.
"""

import copy
import json
import re
import secrets
from datetime import datetime
from pathlib import Path

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja", "generation_config.json")


def read_json(path):
    """The object in a JSON file; {} if there is no file. Raises ValueError that names the file: it
    is not JSON (NaN is not), is no object, or has a key twice in one object."""
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key stands twice: {[key for key, _ in pairs]!r:.200}")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        value = json.loads(text, object_pairs_hook=once, parse_constant=int)     # int("NaN") raises
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


class Tokenizer:
    """The tokenizer of an HF folder.

    `date` ("2026-11-25") is the day that templates print; None: today.
    `eos_ids` list[int]: what ends a response. First the one that training appends, which is the
    template's end of turn; then those of generation_config.json, else of config.json.
    `pad_id` int: fills the batch on the right. It is never one of `eos_ids`, so that the end of a
    response is learned and scored.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
        ValueError: names a file that is damaged; or no stop token is named, the model has no row
            for a token, or the template fails on a question or leaves it out. A template that
            loops for ever is not found out.
    """

    def __init__(self, folder, date=None):
        self.folder = folder = Path(folder)
        path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not path.exists():
            raise FileNotFoundError(f"{folder}: no tokenizer.json. Convert the model's tokenizer "
                                    "with transformers' save_pretrained first.")
        try:
            self.tokenizer = HFTokenizer.from_file(str(path))
        except Exception as error:                               # it has no type of its own
            raise ValueError(f"{path} is no tokenizer: {error!r:.300}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # Despite its name: from here on `encode` reads "<|eot_id|>" as text.
        self.tokenizer.encode_special_tokens = True
        config, shape = read_json(settings), read_json(folder / "config.json")
        if "added_tokens_decoder" not in config:                 # as transformers reads old folders
            config |= read_json(folder / "special_tokens_map.json")
        # A special token is a text, or an object with its "content", or null.
        texts = {key: value.get("content") if isinstance(value, dict) else value
                 for key, value in config.items() if key.endswith("_token")}
        self.named = {key: text for key, text in texts.items() if isinstance(text, str)}
        ids = set(self.tokenizer.get_vocab().values())
        self.vocab_size, rows = max(ids, default=-1) + 1, shape.get("vocab_size")
        if isinstance(rows, int) and self.vocab_size > rows:
            raise ValueError(f"{path} has token ids up to {self.vocab_size - 1}, and config.json's "
                             f"vocab_size is {rows}: the model has no row for them")
        self._names(ids)

        self.source = folder / "chat_template.jinja"
        if not self.source.exists():
            self.source = settings
        template, self.template, end = config.get("chat_template"), None, None
        if template is not None or self.source != settings:
            now = datetime.fromisoformat(date) if date else datetime.now()
            self.template = _compile(self.source, template, now)
            if self.mark not in self.render(self.mark):
                raise ValueError(f"{self.source}: the chat template leaves the question out")
            turns = self._render([("user", "Q"), ("assistant", self.mark)], False)
            # The first special token behind an answer closes it.
            end = re.search(self.special, turns.partition(self.mark)[2])

        # The stop tokens: of generation_config.json, else of config.json, else the eos_token.
        eos = self.special_ids.get(self.named.get("eos_token"))
        for path in (folder / "generation_config.json", folder / "config.json"):
            stops = read_json(path).get("eos_token_id")
            if stops is not None:
                break
        else:
            path, stops = settings, eos
        if stops is None:
            stops = []
        elif not isinstance(stops, list):
            stops = [stops]
        wrong = [i for i in stops if type(i) is not int or i not in ids]
        if wrong or ids <= set(stops):
            raise ValueError(f"{path}: eos_token_id {wrong or stops}: no tokens, or all there are")
        # Training appends the first: what closes an answer, else the eos_token if it is among them.
        if end:
            stops = [self.special_ids[end[0]], *stops]
        elif eos in stops:
            stops = [eos, *stops]
        if not stops:
            raise ValueError(f"{folder}: no eos_token_id in generation_config.json or config.json: "
                             "nothing would end a response.")
        self.eos_ids = list(dict.fromkeys(stops))

        # Other programs find padding by its id, so a token that prompts hold is taken last.
        prompt, pads = self.prompt_ids("Q"), [self.special_ids.get(self.named.get("pad_token"))]
        if self.mark in self.decode(prompt):
            raise ValueError(f"{folder / 'tokenizer.json'}: the special tokens of a prompt are not "
                             "read as such: mark them as not normalized")
        pads += sorted(self.special_ids.values(), key=lambda i: i in prompt) + sorted(ids)
        self.pad_id = next(i for i in pads if i is not None and i not in self.eos_ids)

    def _names(self, ids):
        """Set `special_ids` {text: id}, and give each special token a second name, which no text
        from data can guess. So a whole prompt can be encoded at once: in it the template's special
        tokens have these names, and the data's text has none."""
        tokens = self.tokenizer.get_added_tokens_decoder         # () -> {id: AddedToken}
        marked = {token.content for token in tokens().values() if token.special}
        self.tokenizer.add_special_tokens([                      # named, but not marked as special
            text for text in {*self.named.values()} - marked
            if self.tokenizer.token_to_id(text) in ids])
        found = {token.content: (i, token) for i, token in tokens().items() if token.special}
        self.mark = f"{secrets.randbelow(10**24):024}"           # digits: no filter changes them
        self.special_ids = {text: i for text, (i, _) in found.items()}
        names = sorted(found, key=len, reverse=True)             # the longest that fits is meant
        self.special = "|".join(map(re.escape, names)) or "(?!)"
        self.alias = {text: f"\ue000{i}-{self.mark}\ue001" for text, i in self.special_ids.items()}
        self.tokenizer.add_tokens([
            AddedToken(self.alias[text], single_word=token.single_word, lstrip=token.lstrip,
                       rstrip=token.rstrip, normalized=token.normalized)
            for text, (_, token) in found.items()])
        self.alias_ids = {self.tokenizer.token_to_id(alias): self.special_ids[text]
                          for text, alias in self.alias.items()}

    def files(self):
        """{name: bytes or text}: the files of a folder with this tokenizer, in which other programs
        find the same stop tokens and the same padding."""
        files = {name: (self.folder / name).read_bytes() for name in FILES
                 if (self.folder / name).exists()}
        changes, same = {"generation_config.json": {"eos_token_id": self.eos_ids}}, copy.copy(self)
        pad = {"pad_token": self.tokenizer.id_to_token(self.pad_id)}
        same.named = {**self.named, **pad}
        if self.pad_id in self.special_ids.values() and same.render("Q") == self.render("Q"):
            changes |= {name: pad for name in files if name in (FILES[1], FILES[2])}
        for name, change in changes.items():
            theirs = read_json(self.folder / name)
            if theirs != theirs | change:
                files[name] = json.dumps(theirs | change, indent=1) + "\n"
        return files

    def _render(self, turns, add_generation_prompt):
        """The chat template on [(role, content)], with the variables that transformers gives it."""
        try:
            return self.template.render(
                messages=[{"role": role, "content": content} for role, content in turns],
                tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                **self.named)
        except Exception as error:                               # whatever a stranger's text raises
            raise ValueError(f"{self.source}: the chat template failed: {error!r:.300}") from error

    def encode(self, text):
        """Text -> ids, without BOS or EOS; a special token's text is read as text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text, special tokens left out."""
        ids = [i for i in ids if i not in self.alias_ids]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def render(self, message):
        """The prompt as text: the chat template with one user message and the opening of the
        answer; without a template BOS and the message."""
        if self.template is None:
            return self.named.get("bos_token", "") + message
        return self._render([("user", message)], True)

    def prompt_ids(self, message):
        """Prompt ids of one user message. Special tokens come from the template alone.

        Each special token's text inside the message is swapped for a mark before the template is
        rendered. Then every special token in the rendered text is the template's.
        """
        if self.template is None:
            bos, ids = self.special_ids.get(self.named.get("bos_token")), self.encode(message)
            return ids if bos is None else [bos, *ids]
        names = list(self.alias)
        text = re.sub(self.special, lambda m: f"{self.mark}{names.index(m[0]):06}", message)
        text = re.sub(f"{self.mark}(\\d{{6}})|{self.special}",
                      lambda m: names[int(m[1])] if m[1] else self.alias[m[0]], self.render(text))
        return [self.alias_ids.get(i, i) for i in self.encode(text)]


def _compile(path, template, now):
    """The chat template, compiled as transformers does, in the sandbox that forbids access to
    Python's internals and changes to its inputs.

    It is read from `path` if that is a .jinja file; else it is `template`: one text, or several
    with names, of which "default" counts.
    """
    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    try:
        if path.suffix == ".jinja":
            template = path.read_text(encoding="utf-8")
        elif isinstance(template, list):                         # [{"name", "template"}]
            template = {t["name"]: t["template"] for t in template}
        if isinstance(template, dict):
            if "default" not in template:
                raise ValueError(f"none is named default, but {', '.join(map(str, template))}")
            template = template["default"]
        # `generation` blocks mark answers for training; here they are a scope like any other.
        template = re.sub(r"({%[-+]?\s*(?:end)?)generation(\s*[-+]?%})", r"\1with\2", template)
        return environment.from_string(template)
    except Exception as error:
        raise ValueError(f"{path}: its chat template cannot be read: {error!r:.300}") from None
