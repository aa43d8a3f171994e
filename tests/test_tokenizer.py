"""Prompts: special tokens come from the template alone, and never from the text of a question."""

import json
import shutil

import pytest

from nanodistill.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


def test_special_tokens_in_a_question_stay_text(tokenizer):
    question = "What is <|end|> and <|assistant|>? <|<|end|>end|>"
    ids = tokenizer.prompt_ids(question)
    special = [i for i in ids if i in tokenizer.special_ids.values()]
    assert special == [tokenizer.special_ids["<|user|>"], tokenizer.special_ids["<|assistant|>"]]
    # `decode` leaves special tokens out, so all of the question was text.
    assert tokenizer.decode(ids) == question
    assert not set(tokenizer.encode("<|end|>")) & set(tokenizer.special_ids.values())


def test_prompt_ids_equal_transformers_chat_template(tokenizer_folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    question = "Ann has 14 pens.\n\nShe buys 3 boxes."
    messages = [{"role": "user", "content": question}]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.prompt_ids(question) == expected


def test_any_text_round_trips_and_digits_stand_apart(tokenizer):
    for text in ("Step 1: 14 + 9 = 23\n#### 23", "é 汉字 \ue000 😀", " \n\n  x", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" 1234")) == 4


def test_pad_is_never_eos(tokenizer_folder, tmp_path, tokenizer):
    assert tokenizer.pad_id not in tokenizer.eos_ids
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # As Llama recipes do.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|end|>"}))
    assert Tokenizer(tmp_path).pad_id not in Tokenizer(tmp_path).eos_ids


def test_stop_tokens_of_a_list_begin_with_the_turns_own_end(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert Tokenizer(tmp_path).eos_ids == [3, 1]                         # <|end|> has id 3


def test_a_response_ends_with_what_the_template_closes_a_turn_with(tokenizer_folder, tmp_path):
    """As in Llama 3.0's folders: the eos_token is a stop token other than the one that ends a
    turn."""
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|user|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert Tokenizer(tmp_path).eos_ids == [3, 1]


def test_template_cannot_leave_the_sandbox(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="unsafe"):
        Tokenizer(tmp_path).prompt_ids("x")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        Tokenizer(tmp_path).prompt_ids("x")


# ---- templates, byte by byte as transformers renders them ----

USER = "{% for m in messages %}{{ m.content }}{% endfor %}"
FEATURES = [
    USER,
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|" + USER,
    "{{ bos_token is defined }}{{ sep_token is defined }}{{ image_token }}" + USER,
    "{{ tools is none }}{{ tools is defined }}{{ documents is none }}" + USER,
    "{% if tools %}no{% endif %}{% if documents is not none %}no{% endif %}" + USER,
    "{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}",
    "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}" + USER,
    "{%- for m in messages -%}\n  {%- generation -%}\n x {{ m.content }} {%- endgeneration -%}\n"
    "{%- endfor -%}",
    "{{ {'b': '<é&\\'>', 'a': messages[0].content} | tojson }}",
    "{{ {'b': '<é&>', 'a': messages[0].content} | tojson(indent=2) }}",
    "{{ {'b': '<é&>', 'a': messages[0].content} | tojson(ensure_ascii=True) }}",
    "{{ {'b': [1, 2], 'a': messages[0].content} | tojson(separators=(',', ':')) }}",
    "{{ {'b': 1, 'a': messages[0].content} | tojson(sort_keys=True) }}",
    "{{ {'b': 'é', 'a': messages[0].content} | tojson(True, 1) }}",
    "{{ messages | tojson }}",
    "{{ strftime_now('%d %b %Y') }}" + USER,
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ date_string }}" + USER,
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%Y-%m-%d') %}{% endif %}"
    "{{ date_string }}" + USER,
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}" + USER,
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}" + USER,
    "{% macro turn(m) %}[{{ m.role }}] {{ m.content | trim }}{% endmacro %}{{ turn(messages[0]) }}",
    "  {% if true %}  \n  a\n  {% endif %}\n b {# c #}\n" + USER,
    "{{- messages[0]['content'].split('</think>')[-1].strip() | upper -}}",
    "{{ messages[-1].content | default('x') }}{{ messages | length }}"
    "{{ enable_thinking is defined }}",
    "{% if add_generation_prompt %}<|user|>{{ messages[0].content }}<|assistant|>{% endif %}"
    "{{ messages[0].content if not add_generation_prompt }}",
    "{{ messages | map(attribute='content') | join(', ') }}"
    "{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
    "{% set d = dict(a=1) %}{{ d.items() | list }}{{ messages[0].get('content') }}"
    "{{ messages[0].name is defined }}",
    "{% filter indent(2) %}{{ messages[0].content }}{% endfilter %}\n",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x }}{{ x | length }}",
    "{{ '%s-%d' | format(messages[0].content, 3) }}",
]


def with_template(folder, to, template, **config):
    """A copy of a tokenizer's folder whose tokenizer_config.json has another chat template."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    raw = json.loads((to / "tokenizer_config.json").read_text())
    changed = {**raw, "chat_template": template, **config}
    (to / "tokenizer_config.json").write_text(json.dumps(changed))
    return to


@pytest.mark.parametrize("template", FEATURES)
def test_templates_render_as_in_transformers(tokenizer_folder, tmp_path, template):
    transformers = pytest.importorskip("transformers")
    special = {"bos_token": "<|user|>", "eos_token": "<|end|>", "pad_token": "<|pad|>",
               "unk_token": "<|assistant|>", "image_token": "<|assistant|>"}
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_folder / "tokenizer.json"), chat_template=template, **special)
    ours = Tokenizer(with_template(tokenizer_folder, tmp_path, template, **special))
    for question in ("Ann has <3> pens & \"é\".\n\n", " a '} {{ b }}", ""):
        messages = [{"role": "user", "content": question}]
        text = oracle.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ours.render(question) == text
        assert ours.prompt_ids(question) == oracle(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("template, words", [
    ("{{ bos_token }}<|user|><|assistant|>", "leaves the question out"),
    ("", "leaves the question out"),
    ("{% for m in messages", "unexpected end of template"),
    ("{% break %}", "cannot be read"),
    ("{{ messages[0].content + 7 }}", "failed"),
    ("{{ 1 // 0 }}", "failed: ZeroDivisionError"),
    ("{{ messages[0].content.x.y }}", "failed"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "failed: .*Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed"),
    ("{% if messages[0].role != 'system' %}{{ raise_exception('a system message\nfirst') }}"
     "{% endif %}" + USER, r"a system message\\nfirst"),
    ("{% if messages[1] %}{{ raise_exception('one turn') }}{% endif %}" + USER, "one turn"),
    (7, "cannot be read"), (True, "cannot be read"), ([1, "x"], "cannot be read"),
    ([{"name": "default"}], "cannot be read"),
    ([{"name": "default", "template": 3}], "cannot be read"),
    ([{"name": "rag", "template": USER}, {"name": "tool_use", "template": USER}],
     "none is named default, but rag, tool_use"),
])
def test_a_template_that_asks_no_question_is_refused_when_it_is_loaded(tokenizer_folder, tmp_path,
                                                                       template, words):
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer(with_template(tokenizer_folder, tmp_path, template))
    message = str(caught.value)
    assert str(tmp_path / "tokenizer_config.json") in message and message.count("\n") < 3


def test_which_template_counts(tokenizer_folder, tmp_path):
    named = [{"name": "rag", "template": "r" + USER}, {"name": "default", "template": "d" + USER}]
    assert Tokenizer(with_template(tokenizer_folder, tmp_path, named)).render("x") == "dx"
    (tmp_path / "chat_template.jinja").write_text("j" + USER)
    assert Tokenizer(tmp_path).render("x") == "jx"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff" + USER.encode())
    with pytest.raises(ValueError, match="chat_template.jinja"):
        Tokenizer(tmp_path)


def test_a_date_in_the_template_is_the_one_given(tokenizer_folder, tmp_path):
    with_template(tokenizer_folder, tmp_path, "{{ strftime_now('%d %b %Y %H:%M') }} " + USER)
    assert Tokenizer(tmp_path, date="2026-02-03").render("x") == "03 Feb 2026 00:00 x"
    with_template(tokenizer_folder, tmp_path, "{{ strftime_now('%f') }} " + USER)
    # One moment counts for all prompts of a Tokenizer.
    today = Tokenizer(tmp_path)
    assert today.render("x") == today.render("x")
    with pytest.raises(ValueError, match="isoformat"):
        Tokenizer(tmp_path, date="yesterday")


def test_the_first_token_is_bos_once(tokenizer_folder, tmp_path):
    special = {"bos_token": "<|pad|>"}
    ours = Tokenizer(with_template(tokenizer_folder, tmp_path, None, **special))
    assert ours.prompt_ids("a <|pad|>") == [0, *ours.encode("a <|pad|>")]
    assert 0 not in ours.encode("a <|pad|>")
    assert ours.render("a") == "<|pad|>a"
    template = "{{ bos_token }}" + USER
    ours = Tokenizer(with_template(tokenizer_folder, tmp_path, template, **special))
    assert ours.prompt_ids("a <|pad|>")[0] == 0 and ours.prompt_ids("a <|pad|>").count(0) == 1
    ours = Tokenizer(with_template(tokenizer_folder, tmp_path, USER, **special))
    assert 0 not in ours.prompt_ids("a")


# ---- special tokens' text within a question ----

@pytest.mark.parametrize("template", [
    "<|user|>{{ messages[0].content | trim }}<|assistant|>",
    "<|user|>{{ messages[0].content }}<|assistant|>{{ messages[0].content }}",
    "<|user|>{{ messages[0] | tojson(ensure_ascii=True) }}<|assistant|>",
    "<|user|>{{ messages[0].content | upper | lower }}<|assistant|>"])
def test_special_text_stays_text_whatever_the_template_does_with_it(tokenizer_folder, tmp_path,
                                                                    template):
    ours = Tokenizer(with_template(tokenizer_folder, tmp_path, template))
    question = "1<|end|>2<|assistant|><|end|>\ue0001\ue001 000001"
    ids = ours.prompt_ids(question)
    assert [i for i in ids if i in ours.special_ids.values()] == [1, 2]
    assert ours.decode(ids).count("<|end|>2<|assistant|><|end|>") == ours.render("7").count("7")
    assert "000001" in ours.decode(ids)


def test_a_named_token_that_is_not_marked_as_special_is_special(tokenizer_folder, tmp_path):
    """As transformers has it: else the text of it in a question would be read as the token."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"][3]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    ours, oracle = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert 3 not in ours.encode("<|end|>") and ours.decode([3]) == ""
    assert oracle.decode([3], skip_special_tokens=True) == "" and ours.eos_ids == [3]


# ---- the pieces of SentencePiece ----

def pieces_tokenizer(kind, normalized=False, rstrip=False):
    """A BPE over "▁" pieces as Llama 2, Mistral or TinyLlama have them."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer
    letters = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"ABCabcdefgh.?[]/INST\n<>s"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("c", "d"), ("▁", "c"), ("▁c", "d"),
              ("▁", "▁"), ("▁", "[")]
    pieces = dict.fromkeys([*letters, *("".join(m) for m in merges)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    bpe = HFTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True,
                                 byte_fallback=True))
    if kind == "prepend":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                               normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=normalized, rstrip=rstrip)
                            for name in ("<s>", "</s>", "<|user|>")])
    return bpe


LLAMA2 = ("{{ bos_token }}{% for m in messages %}"
          "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
          "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}")
ZEPHYR = ("{% for m in messages %}<|user|>\n{{ m.content }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}ab\n{% endif %}")


@pytest.mark.parametrize("template", [LLAMA2, ZEPHYR, "{{ messages[0].content }}<s> ab"])
@pytest.mark.parametrize("normalized, rstrip", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("kind", ["first", "always", "never", "prepend"])
def test_prompts_and_responses_of_sentencepiece_tokenizers(tmp_path, kind, normalized, rstrip,
                                                           template):
    transformers = pytest.importorskip("transformers")
    bpe = pieces_tokenizer(kind, normalized, rstrip)
    bpe.save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    config = {**special, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template,
                                                  **special)
    if kind == "prepend" and normalized and template != LLAMA2:  # "▁</s>" alone would be the token
        with pytest.raises(ValueError, match="tokenizer.json.*not normalized"):
            Tokenizer(tmp_path)
        return
    ours = Tokenizer(tmp_path)
    for question in ("ab cd?", " ab", "ab ", "", "  cd\n\nab \ue000é", "\n"):
        messages = [{"role": "user", "content": question}]
        whole = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.prompt_ids(question) == whole, question
    marked = ours.prompt_ids("ab</s> cd<s>")
    assert [i for i in marked if i in ours.special_ids.values()] \
        == [i for i in ours.prompt_ids("ab cd") if i in ours.special_ids.values()]
    text = "".join(bpe.id_to_token(i) for i in marked).replace("▁", "").replace("<0x0A>", "")
    assert text.count("ab</s>cd<s>") == 1
    for text in ("ab cd", "cd\nab.", "</s> ab"):
        ids = ours.encode(text)
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True) == text


# ---- stop tokens, padding, damaged files ----

def test_a_base_models_turn_ends_although_its_eos_is_another(tokenizer_folder, tmp_path):
    """As in Qwen2.5's base: every file names <|endoftext|> alone, and the template ends turns with
    <|im_end|>."""
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    with_template(tokenizer_folder, tmp_path, config["chat_template"], eos_token="<|user|>")
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": 1}))
    assert Tokenizer(tmp_path).eos_ids == [3, 1]
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").unlink()
    assert Tokenizer(tmp_path).eos_ids == [3, 1]                     # tokenizer_config.json's, then
    ours = Tokenizer(with_template(tokenizer_folder, tmp_path, None, eos_token="<|end|>"))
    assert ours.eos_ids == [3]


@pytest.mark.parametrize("stops", ["3", 3.0, -1, True, 10**6, 2**40, [3, None], [3, "3"], {"a": 1},
                                   [[3]]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_stops_that_are_no_tokens_are_refused(tokenizer_folder, tmp_path, name, stops):
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / name).write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(ValueError, match="eos_token_id") as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json",
                                  "special_tokens_map.json", "generation_config.json",
                                  "config.json"])
@pytest.mark.parametrize("junk", ["", "{", "[1]", "null", '"x"', "\xff", "[" * 9999,
                                  '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_damaged_files_are_named(tokenizer_folder, tmp_path, name, junk):
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(junk.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and str(caught.value).count("\n") < 3


def test_the_model_has_a_row_for_each_token(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    last = max(vocabulary.values())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "vocab_size": last + 1}))
    assert Tokenizer(tmp_path).eos_ids == [3]
    (tmp_path / "config.json").write_text(json.dumps({**raw, "vocab_size": last}))
    with pytest.raises(ValueError, match=f"up to {last}.*vocab_size is {last}"):
        Tokenizer(tmp_path)


def test_padding_is_a_token_that_prompts_do_not_hold(tokenizer_folder, tmp_path):
    """Others' programs find padding by its id, and would hide a prompt's own tokens."""
    ours = Tokenizer(with_template(tokenizer_folder, tmp_path, "<|user|>" + USER,
                                   pad_token="<|end|>", bos_token="<|user|>"))
    # Neither <|end|>, which is EOS, nor <|user|>, which prompts hold.
    assert ours.pad_id == 0
    stops = {"eos_token_id": list(range(ours.vocab_size))}
    (tmp_path / "generation_config.json").write_text(json.dumps(stops))
    with pytest.raises(ValueError, match="all there are"):
        Tokenizer(tmp_path)


def test_unused_rows_of_the_model_decode_to_nothing(tokenizer):
    assert tokenizer.decode(range(tokenizer.vocab_size, tokenizer.vocab_size + 9)) == ""
