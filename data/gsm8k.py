"""GSM8K (arXiv 2110.14168): 7,473 training and 1,319 test questions of school mathematics.

They are answered in steps, "#### 18" at the end. `python data/gsm8k.py [DATA]` shows one. The rows
are the files that openai/grade-school-math publishes (MIT), fetched once, known by their SHA-256.
NANODISTILL_GSM8K_URL may name a mirror's folder; with HF_HUB_OFFLINE=1 nothing is fetched.

Own rows (`--data`): a folder with train.jsonl (train*.parquet) and, for an evaluation, test.jsonl
(test*.parquet); or one file of training rows. A row has `question` and, which train can do without,
`answer`: a number (18, "1,234", "$18", "3/4") or a text with "#### 18" at its end.
"""

import hashlib
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import httpx2
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.rows import ReadTask, find_files, read_rows, show, text_of
from nanodistill.weights import write_atomic

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
SHA256 = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
          "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
EXAMPLE = '{"question": "What is 2 + 3?", "answer": "5"}'

# A number as people write it: 1,234 or 18.50 or .5 or 3/4, a sign and a dollar before it.
NUMBER = re.compile(r"([-\u2212]?)\s?\$?\s?([-\u2212]?)([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))(\.[0-9]+)?(?:\s?/\s?([0-9]+))?")
REACH = 200                                                     # characters looked at after the hash marks


def places(name=""):
    """(address, Path in the cache) of a published file, or of the folder with both."""
    return (f"{(os.environ.get('NANODISTILL_GSM8K_URL') or URL).rstrip('/')}/{name}",
            Path(constants.HF_HOME) / "nanodistill" / "gsm8k" / name)


def fetch(name):
    """The Path of a published file in the cache; fetched where it is not there, or damaged.

    FileNotFoundError: it can't be. ValueError: its digest is another; then nothing is kept.
    """
    url, path = places(name)
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[name]:
        return path
    try:
        if constants.is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        print(f"gsm8k: fetching {url}")
        answer = httpx2.get(url, timeout=20, follow_redirects=True)          # no token goes along
        content = answer.raise_for_status().content
    except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"gsm8k: {path} is {'damaged' if path.exists() else 'not in the cache'}, and {url} was "
            f"not fetched: {why}.\n"
            "`--data FOLDER` with train.jsonl and test.jsonl in it does as well.") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise ValueError(f"gsm8k: {url} is not the published {name}, and was not kept.\n"
                         f"SHA-256 wanted: {SHA256[name]}\nSHA-256 got: {digest}")
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{name}.{os.getpid()}")       # processes that fetch at once do not meet
    write_atomic(own, content)
    return own.replace(path)


class GSM8K(ReadTask):
    """`data`: the path of own rows, or "" for what is published. `seed` changes nothing: the
    splits are given. `flawed`: keep rows whose answer holds no number."""
    name, published = "gsm8k", {"train": 7473, "test": 1319}
    # No number as an example: SmolLM2-135M copied the one that stood here into its answers.
    instruction = ("Solve the problem step by step. On the last line write four hash marks and "
                   "then the final answer, a number alone: #### <number>")

    def __init__(self, seed=0, data="", flawed=False):
        self.data, self.flawed, self.loaded = data, flawed, {}

    def source(self):
        """Where the rows come from, for messages."""
        return str(self.data) or "{}, kept in {}".format(*places())

    def rows(self, split):
        """{id: (question, gold or None)}; read once. Own rows need no test split.

        Raises what `fetch`, `find_files` and `read_rows` raise; ValueError: no row to train on.
        """
        if split not in self.loaded:
            train, own = split == "train", self.data
            files = find_files(own, split, required=train) if own else [fetch(f"{split}.jsonl")]
            if not train and own and Path(own).is_file():
                files = []                              # one file: its rows are for training
            rows = dict(read_rows(files, lambda i, row: self.read(split, i, row), EXAMPLE))
            if train and not rows:
                raise ValueError(f"{self.source()}: no training question is left")
            self.loaded[split] = rows
        return self.loaded[split]

    def read(self, split, i, row):
        """For `read_rows`: (question, (id, (question, gold or None)) or None, fault)."""
        question, answer, gold = text_of(row, "question"), row.get("answer"), None
        if type(answer) in (int, float):
            answer = str(answer)
        absent = answer is None or isinstance(answer, str) and not answer.strip()
        if isinstance(answer, str):
            # Only here is a text that is nothing but a number read as one: a model's text is not.
            bare = " ".join(answer.split())
            alone = len(bare) < REACH and NUMBER.fullmatch(bare)
            gold = self.extract_answer(f"#### {bare}" if alone else answer)
        id_, fault, keep = f"gsm8k-{split}-{i}", "", True
        if absent and split == "test":
            fault, keep = f"no answer to score {id_} by", False
        elif gold is None and not absent:
            fault, keep = f"no number in the answer of {id_}", self.flawed
        return question.strip(), (id_, (question, gold)) if keep else None, fault

    def extract_answer(self, text, question=""):
        """The number after the last ####, as a reduced fraction's text ("18", "-5", "3/4"), or None. Never raises; linear in len(text).

        Where an equation stands there, its right side counts; units, a currency and whatever follows the number do not. Without any ####, as small
        models often leave it, what follows the last "answer is" counts.
        """
        _, marks, rest = text.rpartition("####" if "####" in text else "answer is")
        lines = rest[:REACH].strip().lstrip(":*").strip().splitlines() if marks else []
        found = NUMBER.search(lines[0].rpartition("=")[2]) if lines else None
        if not found:
            return None
        whole, part, below = found[3].replace(",", "") or "0", found[4] or "", found[5] or "1"
        if int(below) == 0:
            return None
        value = Fraction(whole + part) / int(below)
        return str(-value if found[1] or found[2] else value)


if __name__ == "__main__":
    show(GSM8K)
