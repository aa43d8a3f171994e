"""Do the tests notice? Breaks one line at a time and runs the tests that should fail.

    python tests/mutations.py --list                       the table, and which entries are stale
    python tests/mutations.py --only kl-sign --only no-eos
    python tests/mutations.py --jobs 4                     all of it: a long run

Each entry of the table is made in a copy of the tree. Its old text must stand there exactly once;
where it does not, the entry is stale, nothing is run and the exit status is 2. A mutation is killed
where a test fails (or takes longer than LIMIT). It is 1 where one survives that has no reason here.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900                                              # seconds of the tests of one mutation
# `tests`: names without "test_" and ".py". `reason`: why a survivor is no fault of the tests.
Mutation = namedtuple("Mutation", "name file old new tests reason", defaults=("",))

SFT, RM, RL, EVAL = "train_sft.py", "train_rm.py", "train_rl.py", "eval.py"
BATCHES, CPU, FILES, FIT, GENERATE, LORA, LOSSES, MODEL, PPO, PRESETS, PROCESS, RESPONSES, \
    REWARD, RUN, SAMPLING, SETTINGS, STATS, TOKENIZER, VOTE, WEIGHTS = (
        f"nanodistill/{name}.py" for name in (
            "batches", "cpu", "files", "fit", "generate", "lora", "losses", "model", "ppo",
            "presets", "process", "responses", "reward", "run", "sampling", "settings", "stats",
            "tokenizer", "vote", "weights"))
GRADING = "data/grading.py"

TABLE = [Mutation(*entry) for entry in [
    # SFT.
    ("no-eos", SFT, " + [tokenizer.eos_ids[0]]", "", "meaning"),
    ("sft-on-all-responses", SFT, " if label}", "}", "meaning"),
    ("sft-ends-without-evaluation", SFT, " or step == steps", "", "meaning"),
    ("sft-saves-the-untrained", SFT, "weights.save(model, ",
     "weights.save(weights.load(source, CausalLM), ", "meaning"),
    ("sft-trains-on-held-out", SFT, "held_out if run.held_out(",
     "held_out if False and run.held_out(", "meaning"),
    ("sft-sign", SFT, "loss.backward()", "(-loss).backward()", "meaning"),
    ("sft-no-step", SFT,
     "optim.clipped_step(model, [optimizer], config.max_grad_norm)", "torch.zeros(())", "meaning"),
    ("sft-mean-over-responses", SFT, "summed_loss(model, some, tokens)\n        loss.b",
     "summed_loss(model, some, len(rows))\n        loss.b", "meaning"),
    ("sft-same-order-each-pass", SFT, 'f"{config.seed} {step // batches}"', 'f"{config.seed}"',
     "meaning"),
    ("sft-rate-does-not-fall", SFT, "last=0.1", "last=1.0", "meaning"),
    ("sft-responses-twice", SFT, "in sorted(good):", "in [*good, *good]:", "meaning"),
    # Reward model.
    ("rm-inverted-labels", RM, "task.equal(r[\"answer\"]", "not task.equal(r[\"answer\"]",
     "meaning"),
    ("eos-where-cut-off", "data/__init__.py", "[tokenizer.eos_ids[0]] * ended",
     "[tokenizer.eos_ids[0]]", "meaning"),
    ("stop-token-as-it-came", "data/__init__.py", "tokens[:len(tokens) - ended]", "tokens",
     "stages"),
    ("rm-keeps-the-last", RM, 'if figures["student"]["auc"] < best:', "if False:", "meaning"),
    ("rm-best-of-the-teachers", RM, 'if figures["student"]["auc"] > best:',
     'if figures["teacher"]["auc"] > best:', "meaning"),
    ("rm-trains-on-held-out", RM, "split = held_out if", "split = held_out if False and",
     "meaning"),
    ("rm-leaves-out-the-student", RM, "if config.rm_data in (source,",
     'if source == "teacher" and config.rm_data in (source,', "meaning"),
    ("rm-token-loss-on-prompts", RM, "len(e.ids) - e.prompt_length + 1 if", "len(e.ids) if",
     "meaning"),
    ("rm-token-loss-unweighted", RM, "(scores, token_loss / max(tokens, 1))",
     "(scores, 1 / max(tokens, 1))", "meaning"),
    ("rm-bt-turned", RM, ".unbind(1)", ".flip(1).unbind(1)", "meaning"),
    ("rm-sign", RM, "loss.backward()", "(-loss).backward()", "meaning"),
    ("rm-temperature", RM, "[1.0] * config.samples", "[0.7] * config.samples", "meaning"),
    ("rm-samples-the-base", RM, 'weights.load(folder / "sft", device=device, dtype=dtype)',
     "weights.load(hub.resolve(config.student, 'student'), device=device, dtype=dtype)",
     "meaning"),
    # PPO.
    ("policy-loss-sign", RL, "policy_loss.backward()", "(-policy_loss).backward()", "meaning"),
    ("kl-sign", RL, "response_mask, kl_coef)", "response_mask, -kl_coef)", "meaning"),
    ("penalty-on-the-ended", RL, "* ~ended", "* ended", "meaning"),
    ("value-model-never-steps", RL, "if not (kl_exceeded and model is policy)]",
     "if model is policy and not kl_exceeded]", "meaning"),
    ("ppo-scores-a-token-early", RL, "[scored_rows[b] for b in mb]",
     "[scored_rows[b][:-1] for b in mb]", "meaning"),
    ("ppo-scores-any-stop-token", RL, "[scored_rows[b] for b in mb]",
     "[rows[b] for b in mb]", "stages"),
    ("kl-limit-ignored", RL, "<= config.kl_limit", "<= 1e12", "meaning"),
    ("step-past-the-kl-limit", RL, "if not (kl_exceeded and model is policy)]", "]", "meaning"),
    ("reference-is-the-policy", RL, "responses.logprobs(reference,", "responses.logprobs(policy,",
     "meaning"),
    ("scored-at-temperature-1", RESPONSES, "batch.targets, temperature,", "batch.targets, 1.0,",
     "meaning"),
    ("sampled-at-temperature-1", RL, "temperature=config.temperature", "temperature=1.0",
     "meaning"),
    ("ppo-rate-does-not-fall", RL, "last=0.0", "last=1.0", "meaning"),
    ("whitens-the-penalty-too", RL, "shaped = shaped - config.no_eos_penalty * ~ended",
     "shaped = ppo.whiten(shaped - config.no_eos_penalty * ~ended, torch.ones_like(ended))",
     "meaning"),
    ("never-whitens-scores", RL, " if config.whiten_scores else", " if False else", "meaning"),
    ("always-whitens-advantages", RL, "if config.whiten_advantages:", "if True:", "meaning"),
    ("ppo-trains-on-held-out", RL, ' and not run.held_out(q["id"])', "", "meaning"),
    ("same-noise-each-step", RL, "seed=rng.getrandbits(63)", "seed=1", "meaning"),
    ("gamma-and-lambda-swapped", RL, "config.gamma,", "config.lam,", "meaning"),
    ("values-not-squashed", RESPONSES, "grid(squash(", "grid((", "meaning"),
    ("value-model-from-the-policy", RL, '("rm" if config.value_from == "reward" else "sft")',
     '"sft"', "meaning"),
    ("minibatches-in-order", RESPONSES, "rng.shuffle(order)", "pass", "responses"),
    ("grpo-is-rloo", RL, "config.samples, config.algorithm, shaped)",
     'config.samples, "rloo", shaped)',
     "algorithms"),
    ("grpo-divides-all", RL, "config.algorithm, shaped)", "config.algorithm, rewards.sum(1))",
     "algorithms"),
    ("rm-where-none-scores", RL, '["rm"] * (config.reward == "model")', '["rm"]', "algorithms"),
    ("reference-is-never-the-teacher", RL, 'teacher or folder / "sft"', 'folder / "sft"',
     "algorithms"),
    ("self-needs-a-vote", RL, ' or config.reward in ("self", "function")', "", "algorithms"),
    ("vote-is-any-answer", REWARD, "answer is not None and answer == votes[id_]",
     "answer is not None", "algorithms"),
    ("self-of-the-first-group", REWARD, "answers[start:start + n]", "answers[:n]", "algorithms"),
    ("a-score-for-all", REWARD, "if len(found) != len(ids):", "if False:", "algorithms"),
    ("reference-of-other-words", "data/ready.py", '("vocabulary", theirs == own)',
     '("vocabulary", True)', "algorithms"),
    ("reference-of-another-template", "data/ready.py", "prompt == same", "True", "algorithms"),
    ("rm-is-always-missing", "data/ready.py", '(s != "rm" or scored)', "True", "algorithms"),
    ("plan-with-a-value-model", FIT, "response)][:1 + valued]}", "response)]}", "fit"),
    ("needless-flags-pass", SETTINGS, "if getattr(config, other) != value]", "if False]",
     "settings"),
    ("fixed-kl-adapts", RL, 'config.kl_control == "adaptive"', "False", "meaning"),
    # Evaluation.
    ("eval-not-greedy", EVAL, "(questions, 1, 0.0)", "(questions, 1, 1.0)", "meaning"),
    ("eval-pair-turned", EVAL, "paired(right[a], right[b])", "paired(right[b], right[a])",
     "meaning"),
    ("eval-answer-of-cut-off", GRADING, " if s.ended else None", "", "meaning"),
    ("eval-pass-is-all", EVAL, "sum(map(any, hits))", "sum(map(all, hits))", "meaning"),
    ("eval-train-questions-for-rl", EVAL, "if run.held_out(q[", "if not run.held_out(q[",
     "meaning"),
    ("wilson", STATS, "(middle + half)", "(middle + 2 * half)", "stats"),
    ("mcnemar-one-sided", STATS, "2 * tail", "tail", "stats"),
    # The teacher.
    ("teacher-answer-of-cut-off", "data/teacher.py", " if ended else None", "", "meaning"),
    ("teacher-one-temperature", "data/teacher.py", "temperatures[j % len(temperatures)]",
     "temperatures[0]", "meaning"),
    ("teacher-no-least-agreement", "data/teacher.py", "vote.majority(answers, min_agreement)",
     "vote.majority(answers)", "meaning"),
    ("teacher-asks-again", "data/teacher.py", 'if q["id"] not in rows', "if True", "stages"),
    # The library: vote, reward, PPO.
    ("vote-tie-goes-first", VOTE, "len(first) == 1 and", "first and", "vote meaning"),
    ("returns-of-whitened", RL, "response_mask, shift_mean=bool(value_model))",
     "response_mask); returns = advantages + old_values", "method"),
    ("retokenised", RL, "+ s.tokens for id_", "+ tokenizer.encode(tokenizer.decode(s.tokens)) + "
     "[tokenizer.eos_ids[0]] * s.ended for id_", "method"),
    ("votes-together-by-number", VOTE, "whole // len(group)", "1", "vote meaning"),
    ("rm-judged-by-the-teachers-vote", EVAL, "    if second:\n        votes =",
     "    if False:\n        votes =", "meaning"),
    ("rm-second-vote-of-the-student", RM, "vote.together(said[row[\"id\"]],", "vote.together([],",
     "meaning"),
    ("self-tie-counts-whole", VOTE, "1 / len(first) if a in first", "1.0 if a in first", "vote"),
    ("vote-share-of-answered", VOTE, "answers.count(first[0]) / len(answers)",
     "answers.count(first[0]) / sum(a is not None for a in answers)", "vote"),
    ("score-a-token-early", REWARD, "packed.last", "packed.last - 1", "meaning"),
    ("scores-out-of-order", REWARD, "return [scores[i] for i in range(len(rows))]",
     "return list(scores.values())", "reward"),
    ("bt-sign", REWARD, "F.logsigmoid(good - bad)", "F.logsigmoid(bad - good)", "reward"),
    ("within-counts-lone-responses", STATS, "if len(rows) > 1]", "]", "stats"),
    ("within-each-question-alike", STATS, "sum(n * auc(*group) for", "sum(auc(*group) for",
     "stats"),
    ("auc-without-ties", STATS, "(counts - 1) / 2", "(counts - 1)", "stats"),
    ("whiten-keeps-the-mean", PPO, "white if shift_mean", "white + mean if shift_mean", "ppo"),
    ("score-at-the-first-token", PPO, "last = mask.sum(dim=1) - 1", "last = mask.sum(dim=1) * 0",
     "ppo"),
    ("gae-without-lambda", PPO, "gamma * lam * following", "gamma * following", "ppo"),
    ("gae-past-the-end", PPO, "rewards.masked_fill(~mask, 0), values", "rewards, values", "ppo"),
    ("rloo-less-the-mean-of-all", PPO, "centred * samples / (samples - 1)", "centred", "ppo"),
    ("grpo-without-deviation", PPO, "better / (scores.std(dim=1, keepdim=True) + 1e-4)", "better",
     "ppo"),
    ("grpo-divides-the-kl", PPO, "centred - better + better / (", "centred / (", "ppo"),
    ("groups-across-questions", PPO, "sum(dim=1).view(-1, samples)",
     "sum(dim=1).view(samples, -1).T", "ppo"),
    ("group-past-the-end", PPO, "rewards.masked_fill(~mask, 0).sum(dim=1)", "rewards.sum(dim=1)",
     "ppo"),
    ("clip-one-side", PPO, "clamp(1 - clip, 1 + clip)", "clamp(max=1 + clip)", "ppo"),
    ("clip-the-better", PPO, "losses = torch.maximum(", "losses = torch.minimum(", "ppo"),
    ("value-clip-ignored", PPO, "clamp(-clip, clip)", "clamp(-9e9, 9e9)", "ppo"),
    ("nan-past-the-end", PPO, "(logprobs - old_logprobs).masked_fill(~mask, 0)",
     "(logprobs - old_logprobs) * mask", "ppo"),
    ("empty-responses", PPO, "mask[:, 0].all() and", "", "ppo"),
    ("adapt-kl-turned", PPO, "kl / target - 1", "1 - kl / target", "ppo"),
    # Losses.
    ("ignored-targets-count", LOSSES, "keep = targets != ignore_index",
     "keep = targets != ignore_index - 1", "losses"),
    ("ignored-logprobs-count", LOSSES, "ignored = t == ignore_index",
     "ignored = t == ignore_index - 1", "losses"),
    ("meta-runs-all-chunks", LOSSES, "starts[:2]", "starts", "losses"),
    ("entropy-sign", LOSSES, "normalizer - _weigh(", "normalizer + _weigh(", "losses"),
    ("temperature-inverted", LOSSES, "inverse(temperature)",
     "torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device)", "losses"),
    ("chunk-over-chunk", LOSSES, "hidden, beta=min(start, 1))", "hidden, beta=0)", "losses"),
    ("distillation-not-centred", LOSSES, "teacher - mean[:, None]", "teacher", "losses"),
    # Model.
    ("rope-not-negated", MODEL, "(-angles, angles)", "(angles, angles)", "model"),
    ("attention-not-causal", MODEL, "is_causal=True", "is_causal=False", "model"),
    ("cache-sees-the-future", BATCHES, "<= positions[:, None]", "<= positions[:, None] + 1",
     "model generate"),
    ("compiled-for-each-length", MODEL, "part, dynamic=True,", "part, dynamic=False,", "model"),
    ("compiled-passes-round-apart", MODEL, ', options={"emulate_precision_casts": True}', "",
     "model"),
    ("sampling-is-compiled", MODEL, " or torch.is_inference_mode_enabled()", "", "model"),
    ("gate-and-up-swapped", MODEL, "F.silu(gate) * up", "F.silu(up) * gate", "model"),
    ("packed-positions-run-on", BATCHES, "ranges([0] * len(rows), lengths)",
     "torch.arange(sum(lengths))", "model"),
    ("blocks-see-their-future", CPU, ".triu(1 + start)", ".triu(2 + start)", "model"),
    ("queries-bias-is-all", CPU, "[layer.bias.detach() for layer in layers]",
     "[layers[0].bias.detach()] + [layer.bias.detach() * 0 for layer in layers[1:]]", "generate"),
    ("llama3-scaling-turned", MODEL, "(1 - keep) * frequencies", "keep * frequencies", "model"),
    # Sampling.
    ("temperature-multiplies", SAMPLING, "1 / temperature.masked_fill(greedy, 1.0)",
     "temperature.masked_fill(greedy, 1.0)", "generate"),
    ("one-stream-for-all", GENERATE, "stream_of(seed, ids[i], j)", "stream_of(seed, ids[i], 0)",
     "generate"),
    ("same-number-each-token", SAMPLING, "GOLDEN * (count + 1)", "GOLDEN", "generate"),
    ("sample-without-its-eos", GENERATE, "Sample(tokens[k][:n],",
     "Sample(tokens[k][:n - stopped[k]],", "generate"),
    ("cut-off-counts-as-ended", GENERATE, "[:n], stopped[k])", "[:n], True)", "generate"),
    # LoRA.
    ("lora-unscaled", LORA, "self.scale = alpha / rank", "self.scale = alpha", "lora"),
    ("lora-trunk-learns", LORA, "    model.requires_grad_(False)\n", "    pass\n", "lora"),
    ("lora-begins-with-a-jump", LORA, "nn.init.zeros_(self.lora_B.weight)", "pass", "lora"),
    ("lora-trunk-held-twice", LORA,
     "copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})", "copy.deepcopy(module)",
     "lora"),
    ("lora-checkpoint-of-all", RUN, "lora.trained(part) if isinstance",
     "dict(part.named_parameters()) if isinstance", "lora"),
    ("lora-plan-of-four-trunks", FIT, "if rank and stage in LEARN:", "if False:", "fit"),
    # Tokenizer, weights.
    ("special-text-becomes-special", TOKENIZER, "encode_special_tokens = True",
     "encode_special_tokens = False", "tokenizer"),
    ("pad-may-be-eos", TOKENIZER, "if i is not None and i not in self.eos_ids",
     "if i is not None", "tokenizer"),
    ("template-out-of-its-sandbox", TOKENIZER, "environment = ImmutableSandboxedEnvironment(",
     "from jinja2 import Environment\n    environment = Environment(", "tokenizer"),
    ("unused-keys-pass", WEIGHTS, "for path in sorted(set(files.values())):",
     "problems = problems[:0]\n    for path in sorted(set(files.values())):", "weights"),
    ("shard-out-of-its-folder", WEIGHTS, "if Path(name).name != name or", "if", "weights"),
    ("incomplete-is-complete", WEIGHTS, 'return (folder / "config.json").exists() and bool(',
     "return True or bool(", "weights ready"),
    ("mlp-bias-ignored", WEIGHTS, '"mlp_bias": (False,)', '"mlp_bias": (False, True)', "weights"),
    # Run, settings, presets, planner.
    ("held-out-share", RUN, "< share * 2**32", "< 0.25 * share * 2**32", "run"),
    ("torn-line-is-an-error", FILES, "if n == len(lines):", "if False:", "run_folder"),
    ("torn-line-stays", FILES, "self.file.truncate(len(whole + end))", "pass", "run"),
    ("lock-is-not-taken", PROCESS, "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
     "run_folder"),
    ("stage-outlives-its-parent", PROCESS, "target=end_after, args=(os.read",
     "target=len, args=(os.read", "run_folder"),
    ("signal-reaches-a-stage-twice", PROCESS, "start_new_session=True", "start_new_session=False",
     "run_folder", "by luck: two signals within a millisecond reach Python as one"),
    ("dropped-ssh-loses-all", PROCESS, "signal.SIGTERM, signal.SIGHUP)", "signal.SIGTERM)",
     "run_folder"),
    ("digest-of-the-name", FILES, "hashlib.file_digest(file, \"sha256\").hexdigest()", "str(path)",
     "run_folder"),
    ("stale-is-taken", RUN, "if files.digest(folder / i) not in (\"\", was)", "if False",
     "run_folder"),
    ("flipped-bit-is-loaded", RUN, "and archive.testzip():", "and False:", "run_folder"),
    ("nan-goes-on", RUN, "if self.values else []", "if False else []", "run_folder"),
    ("nan-weights-are-saved", RUN, "[parallel.own(p) for m in models", "[p for m in []",
     "stages"),
    ("deleted-runs-metrics", RUN, "            steps = {}\n", "            pass\n", "run_folder"),
    ("samples-of-other-weights", GRADING, "files.read_jsonl(file)[:1] != [origin]:",
     "not file.exists():", "stages"),
    ("first-of-two-steps-counts", RUN, 'steps.setdefault(row["step"], {}).update(row)',
     "steps.setdefault(row['step'], row)", "run"),
    ("checkpoint-of-other-settings", RUN, 'if f.metadata["result"] and before',
     "if False and before", "run stages"),
    ("full-memory-is-fatal", RUN, "size //= 2", "size = size", "stages"),
    ("other-settings-go-on", SETTINGS,
     "and bare(saved[s][f.name]) != bare(getattr(config, f.name))]", "and False]", "settings"),
    ("given-loses-to-saved", SETTINGS, "if (s, name) in given:",
     "if (s, name) in given and name not in before:", "settings"),
    ("least-is-not-checked", SETTINGS, "value < limit", "False", "settings"),
    ("seed-not-in-the-folders-name", SETTINGS, 'given.get("seed", 1) != 1', "False", "settings"),
    ("rate-of-another-size", PRESETS, "row[column]", "row[column - 1]", "settings"),
    ("repository-of-another-model", PRESETS, "Llama-3.2-1B-Instruct", "Llama-3.2-1B", "settings"),
    ("plan-without-gradients", FIT, '"gradients": 4 * learned', '"gradients": 0', "fit"),
    ("plan-without-moments", FIT, '"optimizer": 8 * learned', '"optimizer": 4 * learned', "fit"),
    ("no-spare-memory", FIT, "return int(free * (1 - SPARE))", "return int(free)", "fit",
     "not tested: how much is left unplanned is a choice"),
    # Data.
    ("answer-before-the-marks", "data/arithmetic.py", 'rpartition("####")[2]',
     'partition("####")[0]', "arithmetic meaning"),
    ("splits-overlap", "data/arithmetic.py", "split_of(problem.question) == split", "True",
     "meaning"),
    ("none-equals-none", "data/task.py", "answer is not None and answer == other",
     "answer == other", "arithmetic"),
    ("true-accuracy-without-the-question", "data/task.py", "text, questions[id_])", 'text, "")',
     "arithmetic"),
    ("gsm8k-first-marks", "data/gsm8k.py", "in reversed(deque(cue.finditer(text), maxlen=CUES))",
     "in cue.finditer(text)", "answers gsm8k_mmlu_pro"),
    ("gsm8k-any-digest", "data/gsm8k.py", "if digest != SHA256[name]:", "if False:",
     "gsm8k_mmlu_pro"),
    ("gsm8k-commas", "data/number.py", 'run[0].replace(".", "").replace(",", ".")',
     'run[0].replace(",", "")', "answers gsm8k_mmlu_pro"),
    ("mmlu-pro-split", "data/mmlu_pro.py", "digest[0] % 3 == 0", "digest[0] % 3 == 1",
     "gsm8k_mmlu_pro"),
    ("mmlu-pro-keeps-the-flawed", "data/mmlu_pro.py", "if sound or self.flawed:", "if True:",
     "gsm8k_mmlu_pro"),
    ("rows-twice", "data/rows.py", "for key in keys if key in first]", "for key in keys if False]",
     "gsm8k_mmlu_pro"),
    ("rows-blank-text", "data/rows.py", "if not value.strip():", "if False:", "gsm8k_mmlu_pro"),
    ("server-gets-the-key-of-nobody", "data/chat.py",
     '({"Authorization": sent} if key else {})', '{"Authorization": sent}', "server"),
    ("server-cut-off-is-ended", "data/chat.py", "clean(text), not cut", "clean(text), True",
     "server"),
    ("server-refusal-ends-the-run", "data/chat.py", "if status in REFUSED:", "if False:", "server"),
    ("server-fault-ends-the-run", "data/chat.py", "if status in PASSING or status >= 500:",
     "if status >= 500:", "server"),
    ("server-one-seed", "data/server.py", 'f"{seed} {job.id_} {j}"', 'f"{seed}"', "server"),
    ("server-keeps-nothing-until-the-end", "data/server.py",
     'append({"id": id_, "j": j, "temperature": temperatures[j], **response})', "pass", "server"),
    ("disk-not-checked", "data/ready.py", "if size > free:", "if False:", "ready"),
    ("gradients-of-one-process", "nanodistill/parallel.py", "if p.grad is not None and not sharded",
     "if False and not sharded", "parallel"),
    ("split-norms-are-rounded", "nanodistill/parallel.py",
     "{p for p in model.parameters() if p.dim() == 1}", "set()", "parallel"),
    ("devices-not-checked", "data/ready.py", "{s: attempt(fit.pick_device,", "{s: attempt(str,",
     "ready"),
    ("hours-without-decoding", "data/dry_run.py", "products + decode) / 3600", "products) / 3600",
     "fit", "not tested: the hours are an estimate, and no test adds them up"),
    ("tiny-gets-instructions", "data/__init__.py", 'if "tiny" in (config.student, config.teacher):',
     "if False:", "settings stages"),
]]


def stale(mutation):
    """What is wrong with an entry, or ""."""
    path = ROOT / mutation.file
    count = path.read_text(encoding="utf-8").count(mutation.old) if path.exists() else 0
    missing = [name for name in mutation.tests.split()
               if not (ROOT / "tests" / f"test_{name}.py").exists()]
    if missing:
        return f"no tests/test_{missing[0]}.py"
    return "" if count == 1 else f"its old text stands {count} times in {mutation.file}"


def run_tests(names, mutation=None):
    """(exit status of pytest, None where it took too long; the first failure's name)."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        tree = Path(place) / "tree"
        ignored = shutil.ignore_patterns(".git", "out", "__pycache__", ".hypothesis", ".venv")
        shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
        if mutation:
            path = tree / mutation.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider",
                   *(f"tests/test_{name}.py" for name in names)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": place,
                   "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
        process = subprocess.Popen(command, cwd=tree, env={**os.environ, **threads}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            said, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None, "(too long)"
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py\S*)", said, re.MULTILINE)
    return process.returncode, failed[1] if failed else said[-300:].strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="may be given again")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutations at once")
    parser.add_argument("--list", action="store_true", help="run nothing")
    asked = parser.parse_args()
    names = [mutation.name for mutation in TABLE]
    if len(set(names)) < len(names) or set(asked.only or ()) - set(names):
        sys.exit(f"names that stand twice or nowhere: "
                 f"{[n for n in names if names.count(n) > 1] or set(asked.only) - set(names)}")
    chosen = [mutation for mutation in TABLE if mutation.name in (asked.only or names)]
    faults = {mutation.name: fault for mutation in chosen if (fault := stale(mutation))}
    if asked.list:
        for m in chosen:
            print(f"{m.name:30} {m.file:26} {m.tests:20} {m.reason and 'survives: ' + m.reason}")
    for name, fault in faults.items():
        print(f"stale: {name}: {fault}")
    if faults:
        sys.exit(2)
    if asked.list:
        return

    # Where the tests fail by themselves they say nothing of a mutation.
    status, said = run_tests(sorted({name for m in chosen for name in m.tests.split()}))
    if status:
        sys.exit(f"the tests fail as they are: {said}")
    survived, killed = [], 0
    with ThreadPoolExecutor(max(asked.jobs, 1)) as pool:
        done = pool.map(lambda m: (m, *run_tests(m.tests.split(), m)), chosen)
        for m, status, said in done:
            if status not in (0, 1, 2, None):                # pytest's own failure
                sys.exit(f"{m.name}: pytest ends with {status}: {said}")
            if status == 0:
                survived.append(m)
                verdict, why = "survived", f"({m.reason})" if m.reason else ""
            else:
                killed += 1
                verdict, why = "killed", said
                if m.reason:
                    why += " (its reason is stale: it is killed now)"
            print(f"{verdict:8}  {m.name:30} {why}", flush=True)
    unknown = [m.name for m in survived if not m.reason]
    without = f"; without: {', '.join(unknown)}" if unknown else ""
    print(f"{len(chosen)} mutations: {killed} killed, {len(survived)} survived, of which "
          f"{len(survived) - len(unknown)} with a reason{without}")
    sys.exit(1 if unknown else 0)


if __name__ == "__main__":
    main()
