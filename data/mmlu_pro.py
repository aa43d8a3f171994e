"""MMLU-Pro (arXiv 2406.01574): 12,032 questions of 14 subjects, each with 3 to 10 options.

    python data/mmlu_pro.py [DATA]         how many questions there are, and one of them

Rows come from the hub (TIGER-Lab/MMLU-Pro, parquet: the [data] extra), or from `--data`: a folder
with test.jsonl or test*.parquet, or one such file. The data set has no training split, so we
declare one: a hash of the question id sends two questions in three to "train", the others to
"test". The split is ours and does not depend on a run's seed: figures from it do not compare with
figures on all 12,032.
The question's text holds the lettered options; the answer is a letter. A question that stands there
twice, with the same options, is left out the second time: the copy might be in the other split.
"""

import hashlib
import re
import sys
from collections import deque
from pathlib import Path

from huggingface_hub import constants


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.rows import find_files, read_rows, text_of
from data.task import Task, show


HUB = "TIGER-Lab/MMLU-Pro"
LETTERS = "ABCDEFGHIJ"
EXAMPLE = ('{"question_id": 1, "question": "Which?", "options": ["this", "that"], '
           '"answer": "B", "answer_index": 1}')
OPTION = re.compile(r"^([A-J])\. (.*)$", re.MULTILINE)

# Where an answer stands, else it is the last line; characters read there; cues that are tried.
CUE = re.compile(r"answer is\b|answer:|answer\*\*:|\\boxed\s?(?=\{)", re.IGNORECASE | re.ASCII)
REACH, CUES = 1000, 8
BEFORE = re.compile(r"(?:[\s:*_`$#>(\[{]|\\(?:boxed|text|textbf|mathrm|mathbf)\s?\{|\\\("
                    r"|(?:option|choice|letter)\s)+", re.IGNORECASE)
CLOSE = r"[\s)\]}.,:;*_$`\"'\\!?]*"
ALONE = re.compile(rf"([A-J]){CLOSE}")                                      # C   C.   (C)   **C**
ENDED = re.compile(r"([A-J])(?:[)\]}.,:;*_$`\"'\\!](?!\w)|\s*$)")            # C, C) C: the text
SPOKEN = re.compile(r"([B-HJ]|[AI](?=\s(?:because|since|as|and|which)\b))\s")       # no article
# (C) or (D), C and D: two answers are none. "C and A is wrong" goes on, and is one.
TWO = re.compile(rf"[A-J]{CLOSE}(?:and|or|/|&|,)[\s*_$(\[]*[A-J](?!\w){CLOSE}(?:$|(?:and|or)\b)")
# What may follow an option's text. A word or a number would make it another text.
AFTER = re.compile(r"[\s)\]}*_$`\"'\\]*(?:$|[.;:!?](?!\S)|[(]|,?\s(?:because|since|as|so|which)\b)")


def split_of(question_id):
    """ "train" (two in three) or "test", by a hash of the question id and this split's name."""
    digest = hashlib.sha256(f"nanodistill mmlu_pro 1 {question_id}".encode()).digest()
    return "test" if digest[0] % 3 == 0 else "train"


def normal(text):
    """Text for comparing an answer with an option: without case, and what stands at the ends."""
    return " ".join(text.casefold().split()).strip(" .,:;!*_`$\"'()")


def read_letter(said, options, cued):
    """The letter that the first line of `said` begins with, or the letter of the option whose text
    it is, or None. `cued`: it stands behind a cue, where looser spellings are meant so too."""
    said = (said.lstrip(" :\n*").splitlines() or [""])[0].strip()
    bare = BEFORE.sub("", said, count=1) if BEFORE.match(said) else said
    # 1. A capital and nothing else: a letter, even where an option's text is "C".
    if letter := ALONE.fullmatch(bare):
        return letter[1]
    # 2. The whole text of one option, to the letter or nearly.
    same = [k for k, option in options.items() if option in (said, said.removesuffix("."))]
    near = [k for k, option in options.items() if normal(option) and normal(option) == normal(said)]
    if len(same or near) == 1:
        return (same or near)[0]
    # 3. A capital that something ends; behind a cue also "C because" and "(c)".
    letter = ENDED.match(bare)
    if cued:
        letter = letter or SPOKEN.match(bare) or ENDED.match(bare[:1].upper() + bare[1:])
    if letter:
        return None if TWO.match(bare[:1].upper() + bare[1:]) else letter[1]
    # 4. Behind a cue, an option's text that something ends; the longest, as one may begin another.
    begun = {}
    for k, option in options.items():
        for text in (normal(said), normal(bare)) if cued and normal(option) else ():
            size = len(normal(option))
            if text.startswith(normal(option)) and AFTER.match(text, size):
                begun.setdefault((size, said.startswith(option)), set()).add(k)
    best = begun[max(begun)] if begun else ()
    return best.pop() if len(best) == 1 else None


class MMLUPro(Task):
    """`data`: a folder or a file with the rows, or "" for the hub. `seed` changes nothing.
    `flawed`: keep rows that contradict themselves."""
    name, published = "mmlu_pro", {"train": 7964, "test": 3909}
    instruction = ('Think step by step. Then finish with "The answer is (X)", where X is the '
                   'letter of the right option.')

    def source(self):
        """Where the rows come from, for messages."""
        hub = f"https://huggingface.co/datasets/{HUB}, kept in {constants.HF_HUB_CACHE}"
        return str(self.data) or hub

    def rows(self, split):
        """{id: (question with its options, gold letter)}; read once. A row whose letter and index
        disagree, or point outside of the options, or whose right option stands twice, is reported
        and, unless `flawed`, left out. Raises what `find_files` and `read_rows` raise."""
        if not self.loaded:
            folder, loaded, bad = self.data, {"train": {}, "test": {}}, []
            if not folder:
                from huggingface_hub import snapshot_download
                files = ["data/test-*.parquet"]
                folder = snapshot_download(HUB, repo_type="dataset", allow_patterns=files)
                folder = Path(folder) / "data"
            rows = read_rows(find_files(folder, "test"), self.read, EXAMPLE)
            for id_, question, options, answer, sound in rows:
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
        """For `read_rows`: ([id, question], (id, question, options, answer, sound), "")."""
        question, answer = text_of(row, "question"), text_of(row, "answer")
        id_, options, index = (row.get(key) for key in ("question_id", "options", "answer_index"))
        if type(id_) not in (int, str) or not str(id_).strip():
            raise ValueError("no question_id, a whole number or a text")
        if type(options) is not list or not all(isinstance(option, str) for option in options) \
                or not 1 <= len(options) <= len(LETTERS):
            raise ValueError(f"no options, a list of 1 to {len(LETTERS)} texts")
        if type(index) is not int:
            raise ValueError("no answer_index, a whole number")
        "".join([str(id_), *options]).encode()          # half a surrogate pair is a ValueError
        asked = " ".join(question.split()), *(" ".join(option.split()) for option in options)
        sound = (0 <= index < len(options) and LETTERS[index] == answer
                 and options.count(options[index]) == 1)
        keys = [str(id_), asked] if sound else [str(id_)]   # a sound copy of a bad row is welcome
        return keys, (id_, question, options, answer, sound), ""

    def extract_answer(self, text, question=""):
        """The letter that a response ends on, or None. Never raises; linear in len(text).

        The last "answer is", "answer:" or \\boxed{} that leads to a letter or an option's text
        counts; where none does, the last line. With the question at hand, a letter beyond its
        options is no answer. How a letter is read: `read_letter`.
        """
        options = dict(OPTION.findall(question.rpartition("\n\n")[2]))
        places = [text[cue.end():cue.end() + REACH]
                  for cue in deque(CUE.finditer(text), maxlen=CUES)]
        for said in reversed(places):
            if letter := read_letter(said, options, cued=True):
                return letter if letter in (options or LETTERS) else None
        last = "".join(text[-REACH:].strip().splitlines()[-1:])
        letter = read_letter(last, options, cued=False)
        return letter if letter in (options or tuple(LETTERS)) else None


if __name__ == "__main__":
    show(MMLUPro)
