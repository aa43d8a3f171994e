"""Makes the two models of this folder, the embedded default: `teacher`, and `student`, from which
SFT starts.

    python data/tiny/make.py --role tokenizer
    python data/tiny/make.py --role teacher
    python data/tiny/make.py --role student

Both are pre-trained from random weights on worked answers by people who hold misconceptions: of the
sums and differences (a op b, the order of a and b counting) every fourth has a wrong result, which
they write down with a probability of its own between 0.6 and 0.8. (Products are known: they can be
worked in few orders, so that no vote would mend them.) So each model answers as real ones do: right
on many paths, wrong on others, and wrong in the same way each time a path meets a fact that it has
learned wrongly. Samples take different paths, and their vote is right more often than any one. The
student is smaller and has read less.

The questions come from the training split of the task, from a stream of their own: no test question
is seen. Writes the HF folders beside this file, and make.log.
"""

import argparse
import functools
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer
from tqdm import tqdm


# The repository, when run from a checkout without an install.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.arithmetic import draw_problem, exact, split_of, work
from nanodistill.files import write_atomic
from nanodistill.model import CausalLM, Config, init_weights
from nanodistill.tokenizer import Tokenizer
from nanodistill.weights import save


HERE = Path(__file__).resolve().parent
# The share of the sums and differences that have a wrong result in the corpus; and how often it is
# written instead of the true one, uniform.
MISCONCEIVED = 0.25
BELIEF = (0.6, 0.8)
# The student sees the same corpus, is smaller and stops earlier.
SHAPES = {"teacher": dict(layers=4, hidden=128, steps=2400),
          "student": dict(layers=3, hidden=128, steps=2000)}
BATCH, PEAK_LR, WARMUP = 64, 5e-3, 100
TEMPLATE = ("{% for message in messages %}"
            "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
            "{% else %}<|assistant|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@functools.cache
def misconception(a, op, b):
    """(wrong result, probability that it is written) of a fact; (None, 0.0) of one that everyone
    knows."""
    rng, true = random.Random(f"misconception {a} {op} {b}"), exact(a, op, b)
    if op == "*" or true < 0 or rng.random() >= MISCONCEIVED:
        return None, 0.0
    near = [w for w in (true - 10, true - 2, true - 1, true + 1, true + 2, true + 10) if w >= 0]
    return rng.choice(near), rng.uniform(*BELIEF)


def example(rng):
    """(question, worked answer) of the corpus, from the training split."""
    def believed(a, op, b):
        wrong, probability = misconception(a, op, b)
        return wrong if rng.random() < probability else exact(a, op, b)

    while split_of((problem := draw_problem(rng)).question) != "train":
        pass
    return problem.question, work(problem, rng, believed)


def make_tokenizer(folder, rng):
    """A byte-level BPE whose pieces are words, digits one by one, and "Step 1:" as one token. It
    encodes any text."""
    tokenizer = HFTokenizer(models.BPE())
    pieces = Regex(r"\n?Step \d:|\n?####| ?\p{L}+| ?\d| ?[^\s\p{L}\d]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False, min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((text for _ in range(10000) for text in example(rng)), trainer)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    ids = {name: tokenizer.token_to_id(name) for name in special}
    write_atomic(folder / "tokenizer_config.json", json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|end|>",
        "pad_token": "<|pad|>", "clean_up_tokenization_spaces": False, "model_max_length": 256,
        "chat_template": TEMPLATE}, indent=1) + "\n")
    stops = {"eos_token_id": ids["<|end|>"], "pad_token_id": ids["<|pad|>"]}
    write_atomic(folder / "generation_config.json", json.dumps(stops, indent=1) + "\n")
    write_atomic(folder / "config.json", json.dumps(stops) + "\n")  # save() carries these two over
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")


def batch(rng, tokenizer):
    """Ids and targets (BATCH, T) of fresh examples; targets outside of the responses are -100."""
    rows = []
    for _ in range(BATCH):
        question, answer = example(rng)
        prompt = tokenizer.prompt_ids(question)
        response = tokenizer.encode(answer) + [tokenizer.eos_ids[0]]
        rows.append((prompt + response, [-100] * len(prompt) + response))
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [tokenizer.pad_id] * (length - len(r)) for r, _ in rows])
    targets = torch.tensor([t + [-100] * (length - len(t)) for _, t in rows])
    return ids[:, :-1], targets[:, 1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=["tokenizer", "teacher", "student"], required=True)
    parser.add_argument("--out", type=Path, default=HERE, help="where the folders go")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(f"pre-training {args.role} {args.seed}")
    if args.role == "tokenizer":
        for role in SHAPES:
            (args.out / role).mkdir(parents=True, exist_ok=True)
        make_tokenizer(args.out / "teacher", random.Random(args.seed))
        make_tokenizer(args.out / "student", random.Random(args.seed))
        return

    folder, shape = args.out / args.role, SHAPES[args.role]
    tokenizer = Tokenizer(folder)
    config = Config(vocab_size=-(-tokenizer.vocab_size // 64) * 64, hidden_size=shape["hidden"],
                    intermediate_size=3 * shape["hidden"], num_hidden_layers=shape["layers"],
                    num_attention_heads=4, num_key_value_heads=2, head_dim=shape["hidden"] // 4,
                    max_position_embeddings=256, tie_word_embeddings=True)
    model = init_weights(CausalLM(config))
    # Muon on the matrices: loss 0.30 after 350 steps, where AdamW alone had 0.68 (docs/log.md).
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    start, losses = time.time(), []
    log = open(folder / "make.log", "w")
    bar = tqdm(range(shape["steps"]), desc=args.role, mininterval=5)
    for step in bar:
        fall = 0.5 + 0.5 * math.cos(math.pi * step / shape["steps"])
        for group in optimizers[0].param_groups + optimizers[1].param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP, fall)
        ids, targets = batch(rng, tokenizer)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / 50
            bar.set_postfix(loss=f"{mean:.4f}")
            print(f"{args.role} seed {args.seed} step {step + 1} loss {mean:.4f} "
                  f"{time.time() - start:.0f} s", file=log, flush=True)
    save(model, folder, folder, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
