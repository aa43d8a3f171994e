"""GSM8K (arXiv 2110.14168): 7,473 training and 1,319 test questions of school mathematics, answered in steps, "#### 18" at the end.

Rows come from the hub (openai/gsm8k, parquet: the [data] extra) or from a folder with train.jsonl and test.jsonl (`--data`).
"""

import re
from fractions import Fraction

from data.rows import ReadTask, read_rows

# A number as people write it: 1,234 or 18.50 or .5 or 3/4, a sign and a dollar before it.
NUMBER = re.compile(r"([-\u2212]?)\s?\$?\s?([-\u2212]?)([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))(\.[0-9]+)?(?:\s?/\s?([0-9]+))?")
REACH = 200                                                     # characters looked at after the hash marks


class GSM8K(ReadTask):
    """`data`: a folder with the rows, or "" for the hub. `seed` changes nothing: the splits are given. `flawed`: keep rows that contradict themselves."""
    name = "gsm8k"
    # No number as an example: SmolLM2-135M copied the one that stood here into its answers.
    instruction = "Solve the problem step by step. On the last line write four hash marks and then the final answer, a number alone: #### <number>"

    def __init__(self, seed=0, data="", flawed=False):
        self.data, self.flawed, self.loaded = data, flawed, {}

    def rows(self, split):
        """{id: (question, gold)}; read once. A row whose answer ends in no number is reported and, unless `flawed`, left out."""
        if split not in self.loaded:
            rows = {f"gsm8k-{split}-{i}": (row["question"], self.extract_answer(row["answer"]))
                    for i, row in enumerate(read_rows(self.data, "openai/gsm8k", f"main/{split}-*.parquet", split))}
            bad = [id_ for id_, (_, answer) in rows.items() if answer is None]
            if bad:
                print(f"gsm8k: no number after #### in {', '.join(bad)}{'' if self.flawed else ': left out'}")
            self.loaded[split] = rows if self.flawed else {id_: row for id_, row in rows.items() if id_ not in bad}
        return self.loaded[split]

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
