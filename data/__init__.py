"""What the stages consume: the tasks and the teacher's samples."""

from data.arithmetic import Arithmetic
from data.gsm8k import GSM8K
from data.mmlu_pro import MMLUPro

TASKS = {"arithmetic": Arithmetic, "gsm8k": GSM8K, "mmlu_pro": MMLUPro}


def task_of(config):
    """The task of a stage's settings."""
    task = TASKS[config.task](config.seed, config.data, getattr(config, "flawed", False))
    if "tiny" in (config.student, config.teacher):
        task.instruction = ""                                    # they know no instructions
    return task
