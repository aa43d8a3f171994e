"""Sampling from a CausalLM: a KV cache of fixed shape, slots refilled as sequences end, one prefill for all samples of a prompt.

The engine keeps `slots` sequences in flight. A slot whose sequence has ended (EOS, or the length limit) is handed to the next one in
the queue while the others go on, so a long response does not hold up a batch of short ones. A prompt is run through the model
once; its keys and values are then copied to every slot that samples from it.

The sampled distribution is softmax(logits / temperature) over the whole vocabulary, with no top-k or top-p, and the log-probabilities
returned are of that distribution: what PPO needs for its ratio to start at 1.
"""

from dataclasses import dataclass

import torch
from nanodistill.model import KVCache


@dataclass
class Sample:
    """One response: `tokens` with the EOS if it `ended`, and `logprobs`, one a token, at the sampling temperature."""
    tokens: list
    logprobs: list
    ended: bool


def choose(logits, temperature, generator):
    """Sample one token a row. logits (B, V) fp32, temperature (B,), 0 = greedy -> tokens (B,), their logprobs (B,).

    Greedy rows report logprobs at temperature 1. Sampling is by exponential races (argmax of p / Exp(1) is a draw from p), which needs
    no copy to the host.
    """
    greedy = temperature == 0
    logprobs = torch.log_softmax(logits / temperature.masked_fill(greedy, 1.0)[:, None], dim=-1)
    races = torch.empty_like(logprobs).exponential_(generator=generator).log_()
    tokens = (logprobs - races.masked_fill_(greedy[:, None], 0.0)).argmax(dim=-1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


@torch.inference_mode()
def generate(model, prompts, *, eos_ids, pad_id, max_new_tokens, n=1, temperature=1.0, slots=256, generator=None):
    """Yield (prompt index, sample index, Sample) for n samples of each prompt, each as soon as it ends.

    Args:
        prompts: list of lists of token ids, none empty.
        temperature: one number, or n of them, one for each sample of a prompt. 0 is greedy.
        slots: sequences in flight; the KV cache holds slots * (longest prompt + max_new_tokens) positions.
        generator: torch.Generator on the model's device. The samples depend on its state, and on `slots`, alone.
    Raises:
        ValueError: a sequence could outgrow the model's positions.
    """
    temperatures = [temperature] * n if isinstance(temperature, (int, float)) else list(temperature)
    assert len(temperatures) == n, f"{n} samples of a prompt need {n} temperatures, got {len(temperatures)}"
    queue = [(i, j) for i in range(len(prompts)) for j in range(n)]
    if not queue:
        return
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.config.max_position_embeddings:
        raise ValueError(f"prompts of up to {longest} tokens and {max_new_tokens} new ones exceed the model's "
                         f"{model.config.max_position_embeddings} positions")
    device, dtype = model.head.device, model.model.dtype or model.head.dtype
    B = min(slots, len(queue))
    cache = KVCache(model.config, B, -(-(longest + max_new_tokens) // 32) * 32, device, dtype)
    eos = torch.tensor(eos_ids, device=device)
    heat = torch.zeros(B, device=device)                          # temperature of each slot
    last = torch.full((B,), pad_id, device=device)                # the token to feed next
    position = torch.zeros(B, dtype=torch.long, device=device)    # where it stands
    count = torch.zeros(B, dtype=torch.long, device=device)       # tokens sampled so far
    done = torch.ones(B, dtype=torch.bool, device=device)
    tokens = torch.full((B, max_new_tokens), pad_id, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)

    def record(rows, new, new_logprobs):
        """Append one token to each of `rows`; a row that was already done stays as it is."""
        going, at = ~done[rows], count[rows].clamp(max=max_new_tokens - 1)
        tokens[rows, at] = torch.where(going, new, tokens[rows, at])
        logprobs[rows, at] = torch.where(going, new_logprobs, logprobs[rows, at])
        count[rows] += going
        last[rows] = torch.where(going, new, last[rows])
        done[rows] |= torch.isin(new, eos) | (count[rows] >= max_new_tokens)

    def fill(rows, jobs):
        """Start `jobs` in the slots `rows`: one prefill over their distinct prompts, then the first token of each."""
        chosen = sorted({i for i, _ in jobs})
        lengths = torch.tensor([len(prompts[i]) for i in chosen], device=device)
        width = int(lengths.max())
        ids = torch.tensor([prompts[i] + [pad_id] * (width - len(prompts[i])) for i in chosen], device=device)
        fresh = KVCache(model.config, len(chosen), width, device, dtype)
        hidden = model.model(ids, fresh, torch.arange(width, device=device).expand(len(chosen), width))
        logits = model.lm_head(hidden[torch.arange(len(chosen), device=device), lengths - 1]).float()  # (prompts, V)
        source = torch.tensor([chosen.index(i) for i, _ in jobs], device=device)
        rows = torch.tensor(rows, device=device)
        cache.copy_rows(fresh, source, rows)
        heat[rows] = torch.tensor([float(temperatures[j]) for _, j in jobs], device=device)
        count[rows], done[rows], position[rows] = 0, False, lengths[source] - 1
        record(rows, *choose(logits[source], heat[rows], generator))

    everyone = torch.arange(B, device=device)
    owner = [None] * B                                            # (prompt index, sample index) in each slot
    steps, reach = 0, [0] * B                                     # reach[b] + steps: an upper bound of position[b], known without a sync
    check_every = 8 if device.type == "cuda" else 1               # looking at `done` waits for the device
    while True:
        if steps % check_every == 0:
            ended_rows = [b for b, is_done in enumerate(done.tolist()) if is_done and owner[b] is not None]
            if ended_rows:
                lengths, rows = count[ended_rows].tolist(), torch.tensor(ended_rows, device=device)
                ended = torch.isin(last[rows], eos).tolist()
                row_tokens, row_logprobs = tokens[rows].tolist(), logprobs[rows].tolist()
                position[rows] = 0                                # an idle slot writes where nothing reads, and within `used`
                for b, length, stop, t, l in zip(ended_rows, lengths, ended, row_tokens, row_logprobs):
                    (i, j), owner[b] = owner[b], None
                    yield i, j, Sample(t[:length], l[:length], stop)
            free = [b for b in range(B) if owner[b] is None]
            if not queue and len(free) == B:
                return
            if queue and free and (len(free) >= B // 8 or len(free) >= len(queue)):  # an eighth at a time: prefills are worth batching
                jobs, queue = queue[:len(free)], queue[len(free):]
                for b, job in zip(free, jobs):
                    owner[b], reach[b] = job, len(prompts[job[0]]) - steps
                fill(free[:len(jobs)], jobs)
        position += ~done
        steps += 1
        used = max((reach[b] for b in range(B) if owner[b] is not None), default=0) + steps
        hidden = model.model(last[:, None], cache.trimmed(used), position[:, None])
        record(everyone, *choose(model.lm_head(hidden[:, 0]).float(), heat, generator))
