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


def prompts_of(task, tokenizer, questions, most=None):
    """{id: prompt ids} of [{"id", "question"}]; says which have above `most` tokens, left out."""
    prompts = {q["id"]: tokenizer.prompt_ids(task.prompt(q["question"])) for q in questions}
    long = [id_ for id_, ids in prompts.items() if most is not None and len(ids) > most]
    if long:
        print(f"{len(long)} of {len(prompts)} questions are left out: their prompts have above "
              f"{most} tokens, so that no response would fit the model's positions: "
              f"{', '.join(long[:5])}{', ...' * (len(long) > 5)}")
    return {id_: ids for id_, ids in prompts.items() if id_ not in set(long)}


def response_ids(tokenizer, response, own=True):
    """Token ids of a response in teacher.jsonl, student.jsonl or an evaluation's samples.

    Those that were sampled, where they are kept and are the tokenizer's `own`; else the text's. A
    response that ended ends in the first stop token, whichever it was that came.
    """
    tokens, ended = response.get("tokens") if own else None, response["ended"]
    ids = tokenizer.encode(response["text"]) if tokens is None else tokens[:len(tokens) - ended]
    return ids + [tokenizer.eos_ids[0]] * ended
