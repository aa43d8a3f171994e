"""GSM8K (arXiv 2110.14168): 7,473 training and 1,319 test questions of school mathematics.

They are answered in steps, "#### 18" at the end. `python data/gsm8k.py [DATA]` shows one. The rows
are the files that openai/grade-school-math publishes (MIT), fetched once, known by their SHA-256.
NANODISTILL_GSM8K_URL may name a mirror's folder; with HF_HUB_OFFLINE=1 nothing is fetched.

Own rows (`--data`): a folder with train.jsonl (train*.parquet) and, for an evaluation, test.jsonl
(test*.parquet); or one file of training rows. A row has `question` and, which train can do without,
`answer`: a number (18, "1,234", "$18", "3/4") or a text with "#### 18" at its end. A question of
both is not trained on.
"""

import hashlib
import os
import re
import sys
from collections import deque
from pathlib import Path

import httpx2
from huggingface_hub import constants


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.number import END, leading, plain, stated, written
from data.rows import find_files, read_rows, text_of
from data.task import Task, show
from nanodistill.files import write_atomic


URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
SHA256 = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
          "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
EXAMPLE = '{"question": "What is 2 + 3?", "answer": "5"}'

# Where an answer stands: after four hash marks; where they lead to no number, after what people
# say before one. A heading ("#### Step 2: money", "#### 1. The cost") leads to none by itself.
MARKS = re.compile("####")
SAID = re.compile(r"""\\boxed\b | (?<!\#)\#{4,6}[^\n\#:=\d]{0,40}?(?::|\bis\b)     # #### Total: 18
    | \banswer\b(?:\ to\ th(?:e|is)\ (?:question|problem))?[*_]{0,3}\s{0,3}
      (?:is\b|(?:would|should|must)\ be\b|[:=]|\n)""", re.IGNORECASE | re.VERBOSE)
HEADING = re.compile(r"(?:[^\W\d_]+\s+){0,3}\d{1,2} ?[.):] +\S|[^\W\d_][^\n=:]*:")
FILLER = re.compile(r"^(?:(?:about|approximately|around|roughly|exactly|only|just|thus|therefore"
                    r"|equal to|equals|a total of)\s+)+", re.IGNORECASE)
REACH, CUES = 300, 8                    # characters read after a cue; cues of a kind that are tried


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


def after(text, cue):
    """(is a number there, its text or None), for the match of a cue in `text`."""
    said = plain(text[cue.end():cue.end() + REACH])
    body = said.lstrip(" \n*_`:=#$\"'([|")
    below = "\n" in cue[0] + said[:len(said) - len(body)]
    if (below or cue[0] == "####") and HEADING.match(body):
        return False, None
    if below and body.startswith("- "):                 # of a list, or negative
        return True, None
    there, answer = stated(FILLER.sub("", body))
    whole = END.search(body) or len(text) <= cue.end() + REACH             # its end is in reach
    return there, answer if whole else None


class GSM8K(Task):
    """`data`: the path of own rows, or "" for what is published. `seed` changes nothing: the
    splits are given. `flawed`: keep rows whose answer holds no number."""
    name, published = "gsm8k", {"train": 7473, "test": 1319}
    # No number as an example: SmolLM2-135M copied the one that stood here into its answers.
    instruction = ("Solve the problem step by step. On the last line write four hash marks and "
                   "then the final answer, a number alone: #### <number>")

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
            if train and own:                           # the published splits share no question
                tested = {" ".join(q.split()) for q, _ in self.rows("test").values()}
                both = [id_ for id_, row in rows.items() if " ".join(row[0].split()) in tested]
                if both:
                    more = f" and {len(both) - 5} more" if len(both) > 5 else ""
                    print(f"{own}: {', '.join(both[:5])}{more} left out: test questions too")
                rows = {id_: row for id_, row in rows.items() if id_ not in set(both)}
            if train and not rows:
                raise ValueError(f"{self.source()}: no training question is left")
            self.loaded[split] = rows
        return self.loaded[split]

    def read(self, split, i, row):
        """For `read_rows`: ([question], (id, (question, gold or None)) or None, fault)."""
        question, answer, gold = text_of(row, "question"), row.get("answer"), None
        if type(answer) in (int, float):
            answer = str(answer)
        absent = answer is None or isinstance(answer, str) and not answer.strip()
        if isinstance(answer, str):
            gold = self.extract_answer(answer)
            # Only here is a text that is nothing but a number read as one: a model's text is not.
            value, rest = len(answer) < REACH and leading(plain(answer.strip())) or (None, "")
            if value is not None and not re.search(r"\w", rest):
                gold = written(value)
        id_, fault, keep = f"gsm8k-{split}-{i}", "", True
        if absent and split == "test":
            fault, keep = f"no answer to score {id_} by", False
        elif gold is None and not absent:
            fault, keep = f"no number in the answer of {id_}", self.flawed
        kept = (id_, (question, gold)) if keep else None
        return [" ".join(question.split())], kept, fault

    def extract_answer(self, text, question=""):
        """The number that `text` ends on, a reduced fraction's text ("18", "-5", "3/4"), or None.

        The last #### that leads to a number counts; where none does, the last \\boxed{}, "answer
        is", "Answer:" or "#### Total:" that does. A number that is not understood whole is no
        answer, and nothing before it is: see data/number.py. Never raises; linear in len(text).
        """
        for cue in MARKS, SAID:
            for found in reversed(deque(cue.finditer(text), maxlen=CUES)):
                there, answer = after(text, found)
                if answer:
                    return answer
                if there:
                    text = text[found.end():]           # only what comes behind it can still count
                    break
        return None


if __name__ == "__main__":
    show(GSM8K)
