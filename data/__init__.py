"""What the stages consume: the tasks and the teacher's samples."""

from data.arithmetic import Arithmetic
from data.gsm8k import GSM8K
from data.mmlu_pro import MMLUPro

TASKS = {"arithmetic": Arithmetic, "gsm8k": GSM8K, "mmlu_pro": MMLUPro}
