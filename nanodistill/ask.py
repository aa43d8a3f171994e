"""Questions to one model, answered as its tokens come.

    python -m nanodistill.generate out/arithmetic-tiny/rl "Ann has 7 pens. She loses 2. ..."
    python -m nanodistill.generate out/arithmetic-tiny/rl --samples 4 --temperature 1 < asked.txt

The question goes into the model's chat template as it is given. The stages put their task's
instruction behind it: none for tiny; `python data/gsm8k.py` prints that of GSM8K. Several samples
are printed when all are there, with an empty line between them; --samples 1 token by token.
"""

import argparse
import signal
import sys
from pathlib import Path

from nanodistill import fit, generate, process, settings, weights
from nanodistill.tokenizer import Tokenizer


MOST = 512                      # new tokens, where none are asked for and the model has positions


def arguments(argv=None):
    """The command line's values."""
    parser = settings.Parser(prog="python -m nanodistill.generate", description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model: an HF folder, such as a run's rl/")
    parser.add_argument("question", nargs="?", default="-",
                        help="not given, or -: standard input's lines, each a question")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--samples", type=int, default=1,
                        help="answers to each question; a single one is printed as it comes")
    parser.add_argument("--seed", type=int, default=1, help="of the samples (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, help="an answer is cut off here; not given: "
                        f"where the model's positions end, at most {MOST}")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
                        help="auto: cuda if there is one, else mps (untested), else cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"),
                        help="of weights and arithmetic; auto: bf16 on CUDA, else fp32")
    return parser.parse_args(argv)


def questions(text):
    """What is asked: the argument, or the lines of standard input that are not blank."""
    if text != "-":
        yield text
        return
    if sys.stdin.isatty():
        print("a question per line; Ctrl-D ends", file=sys.stderr)
    yield from (line.strip() for line in sys.stdin if line.strip())


def pieces(tokens, decode):
    """The text of tokens that come one by one, in pieces. A character may take several tokens:
    until its last one has come, `decode` ends in U+FFFD."""
    so_far, printed, text = [], "", ""
    for token in tokens:
        so_far.append(token)
        text = decode(so_far)
        stable = text.rstrip("\ufffd")
        if stable.startswith(printed):
            yield stable[len(printed):]
            printed = stable
    yield text[len(printed):]


def main(argv=None):
    args, asked = arguments(argv), 0
    sys.stdout.reconfigure(errors="replace")
    try:
        device = fit.pick_device(args.device)
        model, tokenizer = open_model(args.folder, device, fit.pick_dtype(args.dtype, device))
        for i, question in enumerate(questions(args.question)):
            asked += 1
            answer(model, tokenizer, question, str(i), args)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    if not asked:
        sys.exit("no question came on standard input")


def open_model(folder, device, dtype):
    """-> (model, tokenizer). Raises ValueError, OSError: it can't be."""
    if not (folder / "config.json").exists():
        inside = [str(path.parent) for path in sorted(folder.glob("*/config.json"))]
        raise ValueError(f"{folder} holds no model: there is no config.json"
                         + f"; these have one: {', '.join(inside)}" * bool(inside))
    model = weights.load(folder, device=device, dtype=dtype)
    # Compiling takes longer than a few answers.
    model.model.compiled = False
    return model, Tokenizer(folder)


def answer(model, tokenizer, question, id_, args):
    """Print the answers to one question. Its samples follow from the seed and `id_`."""
    if not question.strip():
        raise ValueError("the question is empty")
    # Of bytes that are no text this raises a ValueError; the tokenizer, a TypeError.
    question.encode()
    prompt = tokenizer.prompt_ids(question)
    room = model.config.max_position_embeddings - len(prompt)
    limit = min(room, MOST) if args.max_new_tokens is None else args.max_new_tokens
    if room < max(limit, 1):
        raise ValueError(f"the question is too long: with the template it has {len(prompt)} "
                         f"tokens, the model has {len(prompt) + room} positions, and the answer "
                         f"needs {max(limit, 1)}")
    how = dict(eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, max_new_tokens=limit,
               temperature=args.temperature, seed=args.seed)
    if args.samples == 1:
        tokens = []

        def kept():
            for token in generate.stream(model, prompt, id_=id_, **how):
                tokens.append(token)
                yield token
        for piece in pieces(kept(), tokenizer.decode):
            print(piece, end="", flush=True)
        print()
        ended = [tokens[-1] in tokenizer.eos_ids]
    else:
        done = {j: sample for _, j, sample in generate.generate(
            model, [prompt], n=args.samples, ids=[id_], **how)}
        print("\n\n".join(tokenizer.decode(done[j].tokens) for j in sorted(done)))
        ended = [sample.ended for sample in done.values()]
    if not all(ended):
        print(f"({len(ended) - sum(ended)} cut off after {limit} tokens)", file=sys.stderr)


if __name__ == "__main__":
    # A reader that is gone, as `| head` is, ends this quietly.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    process.guard(main)
