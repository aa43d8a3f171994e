"""Is a run healthy? What its numbers say, in words, for report.html.

`health` gives a verdict and a sentence for each check. `LIMITS` has what they judge by.
"""

import math


# {what: (good up to here, bad beyond it)}; where less is worse, the first number is the larger. The
# tiny run, healthy, ends at 0.26 nats per response, 0.013 per token of 20; hacked on purpose it had
# 4.8 after 5 steps, 0.24 per token (docs/log.md).
LIMITS = {
    "ratio": (1e-3, 1e-2),         # off 1: rounding leaves 1e-6 in fp32, some 1e-3 in bf16
    "kl": (0.05, 0.15),            # nats per token
    "ended": (0.95, 0.8),          # what is cut off has no answer and no end to score
    "length": (1.5, 3),            # factor up or down since the first steps
    "entropy": (3, 10),            # likewise: a collapse explores no more, a rise is drift
    "alike": (0.8, 0.95),          # share of questions whose responses all have the same score
    "within_auc": (0.6, 0.5),      # 0.5 is chance
    "vote": (0.75, 0.5),           # right by gold; the tiny run has 0.88
    "agreement": (0.6, 0.45),      # where there is no gold; a vote below 0.4 is dropped anyway
    "auc": (0.75, 0.6)}            # against the vote; the tiny run has 0.82 to 0.92, chance 0.5
NAMES = ("Score and truth", "RL against SFT", "First ratio", "KL", "Ended", "Length", "Entropy",
         "Within a question", "Teacher's vote", "Reward model")
WORST_LAST = "good", "look", "bad"


def judge(what, value):
    """A value against its LIMITS -> "good", "look" or "bad"; nan is bad."""
    good, bad = LIMITS[what]
    if good > bad:
        good, bad, value = -good, -bad, -value
    return "good" if value <= good else "look" if value <= bad else "bad"


def ends(steps):
    """({measurement: mean of the first steps}, the same of the last, how many steps that is): 5, or
    a quarter of all."""
    k = max(1, min(5, len(steps) // 4))
    first, last = ({key: sum(s[key] for s in rows) / k for key in rows[0]
                    if all(type(s.get(key)) in (int, float) for s in rows)}
                   for rows in (steps[:k], steps[-k:]))
    return first, last, k


def truth(steps, pair, batch):
    """Does the score rise while what it stands for falls? By gold: a diagnostic."""
    first, last, k = ends(steps)
    rises, told = last["score"] > first["score"], (
        f"the score {'rose' if last['score'] > first['score'] else 'went'} from "
        f"{first['score']:.2f} to {last['score']:.2f}")
    worse, better = pair is not None and pair["high"] < 0, pair is not None and pair["low"] > 0
    learned = False                                              # more right answers in training
    if "true_accuracy" in first and "true_accuracy" in last:
        was, now = first["true_accuracy"], last["true_accuracy"]
        # Two standard errors of a difference of two shares; questions differ from step to step.
        noise = max(0.02, 2 * math.sqrt(2 * was * (1 - was) / (k * batch)))
        told += (f" while true accuracy {'fell' if now < was else 'went'} from {was:.1%} to "
                 f"{now:.1%}")
        worse, learned = worse or was - now > noise, now - was > noise
    elif pair is None:
        return "look", f"In training {told}; no gold answer tells whether that is better."
    if pair is not None:
        told += f"; on the test questions RL is {100 * pair['difference']:+.1f} points from SFT"
    if worse:
        hacked = rises and not learned
        return "bad", f"{'Reward hacking' if hacked else 'Worse'}: in training {told}."
    if better or learned:
        return "good" if rises else "look", f"In training {told}."
    return "look", f"In training {told}; that may be chance."


def of_steps(steps):
    """Checks of RL's measurements: {name: (verdict, sentence)} of those that are there."""
    (first, last, _), found = ends(steps), {}
    if "first_ratio" in last:
        ratio = max((s["first_ratio"] for s in steps), key=lambda r: abs(r - 1))
        found["First ratio"] = judge("ratio", abs(ratio - 1)), (
            f"A step's first minibatch has a ratio of {ratio:.6f} at worst; 1 says that what is "
            "scored is what was sampled.")
    if {"kl", "length"} <= last.keys():
        each = last["kl"] / last["length"]
        found["KL"] = judge("kl", each), (
            f"The student ends {last['kl']:.2f} nats per response from the reference, {each:.3f} "
            f"per token; healthy is up to {LIMITS['kl'][0]}.")
    if "ended" in last:
        found["Ended"] = judge("ended", last["ended"]), (
            f"{last['ended']:.1%} of the last responses ended by themselves; the others were cut "
            "off.")
    for key, unit in (("length", "tokens"), ("entropy", "nats per token")):
        if key in last:
            low, high = sorted(max(ends[key], 1e-9) for ends in (first, last))
            found[key.capitalize()] = judge(key, high / low), (
                f"It went from {first[key]:.3g} to {last[key]:.3g} {unit}; a factor of up to "
                f"{LIMITS[key][0]} is usual.")
    if "alike" in last:
        found["Within a question"] = within(last, "questions of the last steps")
    return found


def within(figures, which):
    """Do the scores tell the responses to one question apart? See stats.within."""
    told, verdict = "", judge("alike", figures["alike"])
    if "within_auc" in figures:
        told = f"; a right one is above a wrong one in {figures['within_auc']:.0%} of the pairs"
        verdict = max(verdict, judge("within_auc", figures["within_auc"]), key=WORST_LAST.index)
    return verdict, (f"For {figures['alike']:.0%} of the {which} all responses score "
                     f"alike, so that nothing tells them apart{told}.")


def of_report(report):
    """Checks of report.json: {name: (verdict, sentence)} of those that are there."""
    pair, v, found = report["pairs"].get("rl-sft"), report.get("votes"), {}
    rm = report.get("reward_model", {})
    if pair:
        found["RL against SFT"] = (
            "good" if pair["low"] > 0 else "bad" if pair["high"] < 0 else "look",
            f"{100 * pair['difference']:+.1f} points on the test questions, greedy; 95% interval "
            f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}.")
    if v:
        verdict, gold = ((judge("vote", v["accuracy"]), f"{v['accuracy']:.1%} of them are right")
                         if "accuracy" in v else (judge("agreement", v["agreement"]),
                                                  "there is no gold answer to compare with"))
        found["Teacher's vote"] = verdict, (
            f"{v['kept']:.1%} of the training questions have one, {v['agreement']:.1%} of the "
            f"samples agree with it; {gold}.")
    for name in ("rl", "sft"):
        if name in rm.get("auc", {}) and "Reward model" not in found:
            found["Reward model"] = judge("auc", rm["auc"][name]), (
                f"AUC {rm['auc'][name]:.3f} against the vote, on {name}'s responses to held-out "
                "questions; chance is 0.5.")
        figures = rm.get("within", {}).get(name, {}).get("reward_model")
        if figures and "Within a question" not in found:
            found["Within a question"] = within(figures, "held-out questions")
    return found


def health(report, steps, config):
    """[(name, "good", "look", "bad" or "absent", a sentence)], the run as a whole first.

    Args:
        report: report.json. steps: RL's measurements, a dict per step. config: RL's settings.
    """
    found = of_report(report) | (of_steps(steps) if steps else {})
    if steps:
        batch = config.get("prompts", 100) * config.get("samples", 1)
        found["Score and truth"] = truth(steps, report["pairs"].get("rl-sft"), batch)
    absent = "absent", "This run has no numbers for it."
    rows = [(name, *found.get(name, absent)) for name in NAMES]
    bad, look = ([row for row in rows if row[1] == kind] for kind in ("bad", "look"))
    if rows[0] in bad:
        kl = f" {found['KL'][1]}" if found.get("KL", ("good",))[0] != "good" else ""
        whole = "bad", f"{rows[0][2]}{kl} A lower --learning-rate or a higher --kl-coef holds it."
    elif bad or look:
        names = ", ".join(name.lower() for name, *_ in bad or look)
        whole = (bad or look)[0][1], f"{'Not healthy' if bad else 'Worth a look'}: {names}."
    else:
        whole = "good", "Healthy in all that this run has numbers for."
    return [("The run", *whole), *rows]


def bands(steps):
    """{measurement: (low, high)} of what LIMITS calls good, for curves."""
    good = {what: limits[0] for what, limits in LIMITS.items()}
    found = {"first_ratio": (1 - good["ratio"], 1 + good["ratio"]),
             **dict.fromkeys(("ended", "answered"), (good["ended"], 1)),
             **dict.fromkeys(("auc_student", "auc_teacher"), (good["auc"], 1)),
             "alike": (0, good["alike"]), "within_auc": (good["within_auc"], 1)}
    first = ends(steps)[0] if steps else {}
    if "length" in first:
        found["kl"] = 0, good["kl"] * first["length"]
    return found | {key: (first[key] / good[key], first[key] * good[key])
                    for key in ("length", "entropy") if key in first}
