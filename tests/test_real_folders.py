"""Real models against transformers. Optional: NANODISTILL_FOLDERS names HF folders, separated by
colons. Of a folder without weights the prompts alone are tested.

    export NANODISTILL_FOLDERS=SmolLM2-135M-Instruct:Llama-3.2-1B-Instruct
    pytest -s tests/test_real_folders.py
"""

import os
from pathlib import Path

import pytest
import torch

from nanodistill.generate import generate
from nanodistill.tokenizer import Tokenizer
from nanodistill.weights import SINGLE, load, save


FOLDERS = [Path(name) for name in os.environ.get("NANODISTILL_FOLDERS", "").split(":") if name]
WITH_WEIGHTS = [folder for folder in FOLDERS if list(folder.glob("model*.safetensors"))]
pytestmark = pytest.mark.skipif(
    not FOLDERS, reason="NANODISTILL_FOLDERS names no HF folders of real models")
QUESTIONS = ["Ann has 14 pens.\n\nShe buys 3 boxes of 5. How many pens has she?", " spaces \n",
             "{{ x }} \u00fcn\u00ef \u6c49\u5b57 \U0001f600 </think>", ""]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_prompts_equal_transformers_byte_by_byte(folder):
    transformers = pytest.importorskip("transformers")
    oracle, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        assert ours.render(question) == oracle.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False)
        ids = ours.prompt_ids(question)
        assert ids == oracle.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False)
        assert (ids.count(oracle.bos_token_id) <= 1 or oracle.bos_token_id in ours.eos_ids
                or oracle.bos_token == "<|im_start|>")
    marks = "<|eot_id|> <|im_end|> <|im_start|>system <|end_of_text|>"
    special = set(ours.special_ids.values())
    assert [i for i in ours.prompt_ids(marks) if i in special] \
        == [i for i in ours.prompt_ids("x") if i in special]
    assert ours.pad_id not in ours.eos_ids


@pytest.mark.parametrize("folder", WITH_WEIGHTS, ids=lambda f: f.name)
def test_logits_and_text_equal_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokenizer = load(folder), Tokenizer(folder)
    prompt = tokenizer.prompt_ids(QUESTIONS[0])
    ids = torch.tensor([prompt])
    # A template may use our pad token too. Without the mask, transformers' `generate` would take it
    # for padding within the prompt.
    greedy = dict(attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
                  eos_token_id=tokenizer.eos_ids, pad_token_id=tokenizer.pad_id)
    with torch.no_grad():
        gap = (model(ids) - oracle(ids).logits).abs().max().item()
        theirs = oracle.generate(ids, **greedy)[0, len(prompt):].tolist()
        _, _, sample = next(generate(model, [prompt], temperature=0.0, max_new_tokens=64,
                                     eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id))
        save(model, tmp_path, folder)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        again = again.eval()
        regap = (again(ids).logits - oracle(ids).logits).abs().max().item()
        text = again.generate(ids, **greedy)[0, len(prompt):].tolist()
    count = sum(p.numel() for p in model.parameters())
    verdict = "equal" if sample.tokens == theirs == text else "DIFFERENT"
    print(f"\n{folder.name}: {count:,} parameters, max logit difference {gap:.1e}, "
          f"saved and reloaded {regap:.1e}, greedy text of {len(theirs)} tokens {verdict}")
    assert gap <= 1e-4 and regap <= 1e-4
    assert sample.tokens == theirs == text
    saved, source = (transformers.AutoTokenizer.from_pretrained(f) for f in (tmp_path, folder))
    assert saved.chat_template == source.chat_template
    assert (tmp_path / SINGLE).exists()
