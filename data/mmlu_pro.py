"""MMLU-Pro (arXiv 2406.01574): 12,032 multiple-choice questions of 14 subjects with 3 to 10 options; the answer is a letter.

    python data/mmlu_pro.py [DATA]         how many questions there are, and one of them

Rows come from the hub (TIGER-Lab/MMLU-Pro, parquet: the [data] extra), or from `--data`: a folder
with test.jsonl or test*.parquet, or one such file. The data set has no training split, so we
declare one: a hash of the question id sends two questions in three to "train", the others to
"test". The split is ours and does not depend on a run's seed: figures from it do not compare with
figures on all 12,032.
The question's text holds the lettered options.
"""

import hashlib
import re
import sys
from pathlib import Path

from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.rows import ReadTask, find_files, read_rows, show, text_of

HUB = "TIGER-Lab/MMLU-Pro"
LETTERS = "ABCDEFGHIJ"
EXAMPLE = ('{"question_id": 1, "question": "Which?", "options": ["this", "that"], '
           '"answer": "B", "answer_index": 1}')
OPTION = re.compile(r"^([A-J])\. (.*)$", re.MULTILINE)
REACH = 1000                                                    # characters looked at after "answer is"
BEFORE = re.compile(r"^(?:[\s*_`$#>(\[{]|\\(?:boxed|text|textbf|mathrm)\{|\\\(|(?:option|choice|letter)\s)+", re.IGNORECASE)
ALONE = re.compile(r"([A-J])(?:[)\]}.,:;*_$`\"'\\!](?!\w)|\s*$)")           # C   C.   C)   C: the text
SPOKEN = re.compile(r"([B-HJ]|[AI](?=\s(?:because|since|as|and|which)\b))\s")  # C because; but not the article or the pronoun


def split_of(question_id):
    """ "train" (two in three) or "test", by a hash of the question id and this split's name."""
    return "test" if hashlib.sha256(f"nanodistill mmlu_pro 1 {question_id}".encode()).digest()[0] % 3 == 0 else "train"


def normal(text):
    """Text for comparing an answer with an option: case, white space and punctuation at the ends do not count."""
    return " ".join(text.casefold().split()).strip(" .,:;!*_`$\"'()")


class MMLUPro(ReadTask):
    """`data`: a folder or a file with the rows, or "" for the hub. `seed` changes nothing.
    `flawed`: keep rows that contradict themselves."""
    name, published = "mmlu_pro", {"train": 8075, "test": 3956}
    instruction = 'Think step by step. Then finish with "The answer is (X)", where X is the letter of the right option.'

    def __init__(self, seed=0, data="", flawed=False):
        self.data, self.flawed, self.loaded = data, flawed, None

    def source(self):
        """Where the rows come from, for messages."""
        hub = f"https://huggingface.co/datasets/{HUB}, kept in {constants.HF_HUB_CACHE}"
        return str(self.data) or hub

    def rows(self, split):
        """{id: (question with its options, gold letter)}; read once. A row whose letter and index
        disagree, or point outside of the options, or whose right option stands twice, is reported
        and, unless `flawed`, left out. Raises what `find_files` and `read_rows` raise."""
        if self.loaded is None:
            folder, loaded, bad = self.data, {"train": {}, "test": {}}, []
            if not folder:
                from huggingface_hub import snapshot_download
                files = ["data/test-*.parquet"]
                folder = snapshot_download(HUB, repo_type="dataset", allow_patterns=files)
                folder = Path(folder) / "data"
            rows = read_rows(find_files(folder, "test"), self.read, EXAMPLE)
            for id_, question, options, answer, index in rows:
                sound = (0 <= index < len(options) and LETTERS[index] == answer
                         and options.count(options[index]) == 1)
                if not sound:
                    bad.append(str(id_))
                if sound or self.flawed:
                    lines = [question, ""]
                    lines += [f"{k}. {' '.join(o.split())}" for k, o in zip(LETTERS, options)]
                    loaded[split_of(id_)][f"mmlu_pro-{id_}"] = "\n".join(lines), answer
            if bad:
                print(f"mmlu_pro: question_id {', '.join(bad)} contradict themselves"
                      f"{'' if self.flawed else ': left out'}")
            self.loaded = loaded
        return self.loaded[split]

    def read(self, i, row):
        """For `read_rows`: (key, (id, question, options, answer, index), "")."""
        question, answer = text_of(row, "question"), text_of(row, "answer")
        id_, options, index = (row.get(key) for key in ("question_id", "options", "answer_index"))
        if type(id_) not in (int, str) or not str(id_).strip():
            raise ValueError("no question_id, a whole number or a text")
        if type(options) is not list or not all(isinstance(option, str) for option in options) \
                or not 1 <= len(options) <= len(LETTERS):
            raise ValueError(f"no options, a list of 1 to {len(LETTERS)} texts")
        if type(index) is not int:
            raise ValueError("no answer_index, a whole number")
        return str(id_), (id_, question, options, answer, index), ""

    def extract_answer(self, text, question=""):
        """The letter that a response ends on, or None. Never raises; linear in len(text).

        Looked for after the last "answer is" (or "answer:"), else on the last line: a letter by itself ("(C)", "C.", "**C**", "C: the text"), or an
        option's own text. With the question at hand, a letter beyond its options is no answer.
        """
        options = dict(OPTION.findall(question.rpartition("\n\n")[2]))
        lowered = "".join(c.lower() if c.isascii() else c for c in text)      # as long as `text`, which str.lower() need not be
        place, cue = max((lowered.rfind(cue), cue) for cue in ("answer is", "answer:", "answer**:"))
        said = text[place + len(cue):][:REACH].lstrip(" :\n*") if place >= 0 else "\n".join(text[-REACH:].strip().splitlines()[-1:])
        said = said.splitlines()[0].strip() if said else ""
        bare = BEFORE.sub("", said)
        only = re.fullmatch(r"([A-J])[\s)\]}.,:;*_$`\"'\\!]*", bare)                # a capital by itself is a letter, even where an option is called "C"
        written = [k for k, option in options.items() if option in (said, said.removesuffix("."))]
        similar = [k for k, option in options.items() if normal(option) and normal(option) == normal(said)]
        if not only and len(written or similar) == 1:
            return (written or similar)[0]
        letter = only or ALONE.match(bare) or place >= 0 and (SPOKEN.match(bare) or ALONE.match(bare[:1].upper() + bare[1:]))
        if letter:
            return letter[1] if not options or letter[1] in options else None
        begun = [k for k, option in options.items() if place >= 0 and normal(option) and normal(said).startswith(normal(option))]
        return max(begun, key=lambda k: len(options[k])) if begun else None


if __name__ == "__main__":
    show(MMLUPro)
