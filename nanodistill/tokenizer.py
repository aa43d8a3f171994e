"""Text to token ids and back: an HF folder's tokenizer.json, its chat template and its stop tokens.

What a model is asked comes from data, and data may contain the text of a special token ("<|eot_id|>"). Such text stays text:
only the chat template's own special tokens become special. Templates come from outside too and are rendered in Jinja's sandbox.
"""

import json
import re
from datetime import datetime
from pathlib import Path

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _token_text(entry):
    """A special token in tokenizer_config.json is a string, or a dict with its "content", or null."""
    return entry["content"] if isinstance(entry, dict) else entry


class Tokenizer:
    """The tokenizer of an HF folder.

    `eos_ids` list[int]: what ends a response, first the one that training appends. From generation_config.json, else config.json.
    `pad_id` int: fills the batch on the right; never one of `eos_ids`, so that ending a response is learned and scored.
    Raises FileNotFoundError if the folder has no tokenizer.json, ValueError if no stop token is named anywhere.
    """

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "tokenizer.json").exists():
            raise FileNotFoundError(f"{folder}: no tokenizer.json. Convert the model's tokenizer with transformers' save_pretrained first.")
        self.tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True              # from here on `encode` reads "<|eot_id|>" as text
        config = _read_json(folder / "tokenizer_config.json")
        self.bos, self.eos = _token_text(config.get("bos_token")), _token_text(config.get("eos_token"))
        added = self.tokenizer.get_added_tokens_decoder()        # {id: AddedToken}
        self.special_ids = {token.content: i for i, token in added.items() if token.special}

        stops = _read_json(folder / "generation_config.json").get("eos_token_id")
        if stops is None:
            stops = _read_json(folder / "config.json").get("eos_token_id")
        if stops is None:
            stops = self.special_ids.get(self.eos)
        if stops is None:
            raise ValueError(f"{folder}: no eos_token_id in generation_config.json or config.json: nothing would end a response.")
        self.eos_ids = list(stops) if isinstance(stops, list) else [stops]
        template = folder / "chat_template.jinja"
        template = template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
        if isinstance(template, list):                           # several named templates: [{"name", "template"}]
            template = {t["name"]: t["template"] for t in template}["default"]
        self.template = _compile(template) if template else None
        own = self._end_of_turn()
        if own in self.eos_ids:
            self.eos_ids = [own] + [i for i in self.eos_ids if i != own]

        pad = self.special_ids.get(_token_text(config.get("pad_token")))
        candidates = [pad, self.special_ids.get(self.bos), *range(len(self.eos_ids) + 1)]
        self.pad_id = next(i for i in candidates if i is not None and i not in self.eos_ids)

    @property
    def vocab_size(self):
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def _end_of_turn(self):
        """Id of the special token that the template closes an answer with; tokenizer_config's eos_token without a template."""
        if self.template is not None:
            _, _, after = self._render([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "\ue000"}], False).partition("\ue000")
            found = re.search("|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True))) or "$^", after)
            if found:
                return self.special_ids[found[0]]
        return self.special_ids.get(self.eos)

    def _render(self, messages, add_generation_prompt):
        try:
            return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt, bos_token=self.bos or "", eos_token=self.eos or "")
        except TemplateError as error:
            raise ValueError(f"the chat template failed: {error}") from error

    def encode(self, text):
        """Text -> ids, without BOS or EOS; a special token's text is read as text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def render(self, message):
        """The prompt as text: the chat template with one user message and the opening of the answer; BOS + message without one."""
        if self.template is None:
            return (self.bos or "") + message
        return self._render([{"role": "user", "content": message}], True)

    def prompt_ids(self, message):
        """Prompt ids of one user message. Special tokens come from the template alone.

        Each special token's text inside the message is swapped for a marker before the template is rendered. Then every special
        token in the rendered text is the template's, and the text between two of them, markers swapped back, is encoded as text.
        """
        names = sorted(self.special_ids, key=len, reverse=True)
        if not names:
            return self.encode(self.render(message))
        special = re.compile("|".join(map(re.escape, names)))
        held = []

        def hold(match):
            held.append(match[0])
            return f"\ue000{len(held) - 1}\ue001"                # private-use characters, which no template touches

        def release(text):
            return re.sub("\ue000(\\d+)\ue001", lambda m: held[int(m[1])], text)

        if "\ue000" in message or "\ue001" in message:
            message = message.replace("\ue000", "\ufffd").replace("\ue001", "\ufffd")
        rendered, ids, start = self.render(special.sub(hold, message)), [], 0
        for match in special.finditer(rendered):
            ids += self.encode(release(rendered[start:match.start()])) + [self.special_ids[match[0]]]
            start = match.end()
        return ids + self.encode(release(rendered[start:]))


def _compile(template):
    """A Jinja template as transformers renders them, in the sandbox that forbids attribute tricks and changes to its inputs."""
    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
