"""A tiny real model made by others (optional: where shared/assets is at hand)."""

from nanodistill.generate import generate
from nanodistill.tokenizer import Tokenizer
from nanodistill.weights import load


def test_stories260k_reproduces_its_reference_text(assets):
    folder = assets / "stories260K" / "hf"
    model, tokenizer = load(folder), Tokenizer(folder)
    reference = (assets / "stories260K" / "reference.txt").read_text().strip()
    prompt = tokenizer.prompt_ids("")
    assert prompt == [1]
    _, _, sample = next(generate(model, [prompt], temperature=0.0, max_new_tokens=256,
                                 eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id))
    assert tokenizer.decode(sample.tokens).strip() == reference
