"""The dial: what `--student SIZE` means. Two tables; nothing else decides by size.

SIZES says where a size's weights are, their shape, and who teaches it. SETTINGS gives each size
its learning rates, prompts, samples and steps. What stands in neither is the same for all sizes:
the default in the stage's own Config. A folder or a hub name as `--student` takes the column
"other".
"""

from dataclasses import dataclass

from nanodistill.model import Config


@dataclass(frozen=True)
class Size:
    """One model of the dial. `shape` is its config.json on the hub: planning needs no download."""
    repository: str
    shape: Config
    teacher: str = ""              # the size that teaches it; "": none does, a server must
    gated: bool = False            # the hub gives it only to those who have accepted its licence
    as_student: bool = True


def llama3(*shape, factor, **rest):
    """Llama 3.1 and 3.2 differ in shape and in how far they stretch the rotary angles."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return Config(*shape, rope_theta=500000.0, rope_scaling=scaling,
                  max_position_embeddings=131072, **rest)


# Config(vocabulary, hidden, intermediate, layers, query heads, key-value heads, head_dim, ...)
SIZES = {
    "135m": Size("HuggingFaceTB/SmolLM2-135M-Instruct",
                 Config(49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5,
                        max_position_embeddings=8192, tie_word_embeddings=True),
                 teacher="1.7b"),
    "0.5b": Size("Qwen/Qwen2.5-0.5B-Instruct",
                 Config(151936, 896, 4864, 24, 14, 2, 64, rms_norm_eps=1e-6, rope_theta=1e6,
                        max_position_embeddings=32768, tie_word_embeddings=True,
                        model_type="qwen2"),
                 teacher="7b"),
    "1b": Size("meta-llama/Llama-3.2-1B-Instruct",
               llama3(128256, 2048, 8192, 16, 32, 8, 64, factor=32.0, tie_word_embeddings=True),
               teacher="8b", gated=True),
    "3b": Size("meta-llama/Llama-3.2-3B-Instruct",
               llama3(128256, 3072, 8192, 28, 24, 8, 128, factor=32.0, tie_word_embeddings=True),
               teacher="8b", gated=True),
    "8b": Size("meta-llama/Llama-3.1-8B-Instruct",
               llama3(128256, 4096, 14336, 32, 32, 8, 128, factor=8.0), gated=True),
    # Teachers only.
    "1.7b": Size("HuggingFaceTB/SmolLM2-1.7B-Instruct",
                 Config(49152, 2048, 8192, 24, 32, 32, 64, rope_theta=130000.0,
                        max_position_embeddings=8192, tie_word_embeddings=True),
                 as_student=False),
    "7b": Size("Qwen/Qwen2.5-7B-Instruct",
               Config(152064, 3584, 18944, 28, 28, 4, 128, rms_norm_eps=1e-6, rope_theta=1e6,
                      max_position_embeddings=32768, model_type="qwen2"),
               as_student=False),
}
STUDENTS = ("tiny", *(name for name, size in SIZES.items() if size.as_student))

# Tried: the column "tiny", on its own task; docs/log.md has what else was tried there. On that task
# 135m was tried too: SFT at 2e-4; PPO at 3e-5 did harm, and at 5e-6 none. The other columns have
# not been tried; they are what is usual in the field. PPO: 1e-6 for the
# policy and 1e-5 for the value model are in verl's GSM8K example (deepseek-llm-7b-chat,
# examples/split_placement/run_deepseek7b_llm.sh), 1e-6 and 5e-6 in MindSpeed-RL's
# (configs/ppo_qwen25_32b_A3.yaml). SFT and the reward model: rates between those, higher for the
# smaller models, which is ours. 10 teacher samples and 30 student samples are the paper's
# (arXiv 2502.19557); the rest is ours. Votes of both sides are tiny's alone: there the student is
# better than its teacher (docs/results.md), elsewhere it was not tried.
COLUMNS = ("tiny", "135m", "0.5b", "1b", "3b", "8b", "other")
SETTINGS = {
    "max_new_tokens":          (56,    512,   512,   512,   512,   512,   512),
    "teacher.min_agreement":   (0.4,   0.3,   0.3,   0.3,   0.3,   0.3,   0.3),
    "sft.epochs":              (3.0,   3.0,   3.0,   3.0,   2.0,   2.0,   3.0),
    "sft.learning_rate":       (5e-4,  1e-4,  2e-5,  1e-5,  1e-5,  5e-6,  1e-5),
    "rm.samples":              (4,     30,    30,    30,    30,    30,    30),
    "rm.rm_votes":             ("both", *["teacher"] * 6),
    "rm.batch_size":           (128,   64,    64,    64,    64,    64,    64),
    "rm.optimizer":            ("muon", *["adamw"] * 6),
    "rm.learning_rate":        (3e-3,  5e-5,  2e-5,  1e-5,  5e-6,  3e-6,  1e-5),
    "rl.steps":                (60,    200,   200,   200,   200,   200,   200),
    "rl.prompts":              (512,   128,   128,   128,   128,   128,   128),
    "rl.samples":              (1,     2,     2,     2,     2,     2,     2),
    "rl.ppo_epochs":           (1,     2,     2,     2,     2,     2,     2),
    "rl.learning_rate":        (2e-4,  5e-6,  1e-6,  1e-6,  1e-6,  1e-6,  1e-6),
    "rl.value_learning_rate":  (6e-4,  1e-5,  1e-5,  5e-6,  5e-6,  5e-6,  5e-6),
    "rl.score":                ("probability", *["logit"] * 6),
    "rl.whiten_scores":        (False, *[True] * 6),
    "rl.no_eos_penalty":       (1.0,   2.0,   2.0,   2.0,   2.0,   2.0,   2.0),
}


# With LoRA: ten times the rates, as "LoRA Without Regret" (Thinking Machines, 2025) finds; its rank
# where none is given, which is ours; and AdamW, for Muon's updates are made for whole matrices. The
# tiny reward model's rate stays: Muon's was ten times AdamW's, and 3e-3 was tried with rank 32.
RANK, RATE, MUON = 32, 10, ("rm.learning_rate", "muon")


def settings(student, lora=0):
    """{"max_new_tokens" or "stage.field": value} of the column that `--student` means."""
    column = COLUMNS.index(student if student in COLUMNS else "other")
    values = {name: row[column] for name, row in SETTINGS.items()}
    if lora:
        values |= {name: float(f"{RATE * rate:.3g}") for name, rate in values.items()
                   if name.endswith("_rate") and (name, values["rm.optimizer"]) != MUON}
        values["rm.optimizer"] = "adamw"
    return values
