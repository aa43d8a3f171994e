"""Tasks and the teacher's samples: what the stages consume."""

from data.arithmetic import Arithmetic

TASKS = {"arithmetic": Arithmetic}
