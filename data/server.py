"""Samples of a model behind an OpenAI-compatible server (vLLM, llama.cpp, a paid one, ...).

Many requests are under way at once, in one thread. Each asks for all samples of a question at one
temperature; for one sample, if the server gives one per request. A sample is written to the journal
as soon as it arrives. What goes wrong is dealt with in three ways:

    it may pass     429, 5xx, a cut connection, no whole answer in time, an answer that makes no
                    sense: tried again, later and later, or when the server's Retry-After says.
                    After `patience` seconds in which the server gave nothing at all, the run ends.
    one question    refused (400, 413, 422; or 403, by a server that has answered others), or its
                    answer failed TRIES times while other questions got theirs: its sample counts
                    as unanswered and says why.
    the run         a wrong key, address or model, a request that no question gets an answer to:
                    ends it with what to do.

However the run ends, answers under way have a moment to arrive, and the same command goes on.
"""

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import deque
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from data import chat
from data.chat import Fault, Forbidden, Refused, Stop
from nanodistill import files


TRIES = 8
MANY, IN_A_ROW = 5, 25         # questions lost at the start, or later in a row, that end the run
GRACE = 0.7                    # seconds that answers on the wire get when the run ends


def problems(url, model, key, timeout=10.0):
    """What is wrong with the server's address or model, as a list of messages; [] if it answers.

    Asks for its list of models, which is free. A server may have none (404, 405, 501).
    """
    async def models():
        async with chat.client(key) as c:
            return await chat.exchange(c, "GET", url, "/models", None, timeout)

    try:
        answer, body = asyncio.run(models())
        if answer.status_code in (401, 403) or answer.is_redirect:
            chat.check(answer.status_code, answer.headers, chat.words(body))
    except Fault as fault:
        return [f"--teacher-url {url}: nobody answers there ({fault})"]
    except Stop as stop:
        return [f"--teacher-url {url}: {stop}"]
    if not answer.is_success:
        return []
    try:
        names = [entry["id"] for entry in chat.parsed(body)["data"]]
    except (KeyError, TypeError):
        return [f"--teacher-url {url}: what answers there is no OpenAI-compatible server (its "
                "address usually ends in /v1)"]
    if names and model not in names:
        return [f"--teacher-model {model}: the server at {url} has "
                + ", ".join(map(str, names[:5]))]
    return []


def wait_before(attempt, retry_after, rng):
    """Seconds before the next try: the server's Retry-After (seconds or a date), if that is at
    least one; else about 1, 2, 4, ... and at most 60."""
    try:
        if (retry_after or "").strip().replace(".", "", 1).isdigit():
            asked = float(retry_after)
        else:
            asked = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        asked = 0.0
    return asked if asked >= 1 else min(2.0**min(attempt, 6), 60.0) * rng.uniform(0.75, 1.25)


@dataclass(eq=False)
class Job:
    """Samples of one question at one temperature: the indices still to come, the last fault."""
    id_: str
    indices: list
    fault: Fault | None = None


class Sampling:
    """What is still to be asked, what is under way, and what its answers say of the server.

    `await ask(job, n)` -> ([(text, ended)], tokens), one request for n samples of a job.
    `keep(id_, j, response, tokens)` takes a sample that is settled.
    `answered`: has the server ever answered such a request?
    """

    def __init__(self, jobs, ask, keep, patience, answered):
        self.queue, self.under_way, self.ask, self.keep = deque(jobs), [], ask, keep
        self.patience, self.answered = patience, answered
        self.given, self.last, self.told = 0, time.monotonic(), False
        self.refused, self.held = set(), []        # questions given up in a row, their samples
        self.one_at_a_time, self.stopping = False, asyncio.Event()

    async def work(self):
        """Job after job, until there is none."""
        try:
            while self.queue and not self.stopping.is_set():
                self.under_way.append(self.queue.popleft())
                job = self.under_way[-1]
                await self.finish(job)
                self.under_way.remove(job)
        except BaseException:
            self.stopping.set()                    # before another worker takes its next job
            raise

    async def finish(self, job):
        """Ask until each sample of the job is kept or given up."""
        alone, failures, given, rng = False, 0, self.given, random.Random()
        while job.indices and not self.stopping.is_set():
            n = 1 if alone or self.one_at_a_time else len(job.indices)
            try:
                samples, tokens = await self.ask(job, n)
            except (Refused, Forbidden) as refused:
                # A server that has answered before takes the key: it refuses this question.
                if isinstance(refused, Forbidden) and not self.answered:
                    raise
                if n == 1:
                    self.give_up(job, refused.args[0], not isinstance(refused, Forbidden))
                alone = True                       # is it the question, or n?
            except Fault as fault:
                job.fault, failures = fault, failures + 1
                if failures >= TRIES and not fault.of_server and self.given > given:
                    self.give_up(job, f"failed {failures} times, last: {fault}")
                    failures, given = 0, self.given
                    continue
                seconds = wait_before(failures - 1, fault.retry_after, rng)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), min(seconds, self.patience))
            else:
                # The server refuses n and accepts 1, or ignores n.
                self.one_at_a_time |= alone or len(samples) < n
                self.given, self.last, self.told = self.given + 1, time.monotonic(), False
                self.answered, job.fault, failures, given = True, None, 0, self.given
                self.refused.clear()
                self.settle()
                for text, ended in samples[:n]:
                    if job.indices:
                        self.keep(job.id_, job.indices.pop(0), {"text": text, "ended": ended},
                                  tokens // len(samples))

    def settle(self):
        """Keep the samples given up: the server does answer, so the fault is in their questions."""
        while self.held:
            self.keep(*self.held.pop(0), 0)

    def give_up(self, job, why, certain=True):
        """The job's next sample fails. Raises Stop where the server seems to be at fault."""
        self.last = time.monotonic()
        self.refused.add(job.id_)
        failed = {"text": "", "ended": False, "failed": why}
        self.held.append((job.id_, job.indices.pop(0), failed))
        if len(self.refused) >= (IN_A_ROW if self.answered else MANY):
            self.blame()
        # That an earlier start was answered does not say that key and model are still good; and
        # whether a 403 was the question's or is the key's, the server's next answer shows.
        if self.given and certain:
            self.settle()

    def blame(self):
        row = " in a row" if self.answered else ""
        raise Stop(f"the teacher's server answered none of {len(self.refused)} questions{row}, "
                   f"last: {self.held[-1][2]['failed']}")

    def watch(self):
        """Has the server given nothing for too long? Raises Stop; or, where only a few questions
        are left and may be to blame for that, gives them up and returns True."""
        silent, faults = time.monotonic() - self.last, [j.fault for j in self.under_way if j.fault]
        last = faults[-1] if faults else f"no answer to {len(self.under_way)} requests"
        minutes = f"{self.patience / 60:.3g} minutes"
        if silent > 30 and faults and not self.told:
            self.told = True
            print(f"\nthe teacher's server: {last}. Trying on, for {minutes}", file=sys.stderr)
        if silent <= self.patience:
            return False
        few = len({job.id_ for job in self.under_way}) < MANY and not self.queue
        if not (few and self.answered) or any(fault.of_server for fault in faults):
            raise Stop(f"the teacher's server has given nothing for {minutes} (--patience), last: "
                       f"{last}")
        for job in self.under_way:
            while job.indices:
                self.give_up(job, f"nothing for {minutes}, last: {job.fault or last}")
        return True


# What `generate` writes into its journal.
ROW = {"id": str, "j": int, "temperature": (int, float), "text": str, "ended": bool}


def check_row(path, i, row, shape, part=""):
    """Raises SystemExit that names file and line where row i, or a part of it, is not a dict with
    values of the types in `shape`, {key: type}."""
    for key, type_ in shape.items():
        if not isinstance(row, dict) or not isinstance(row.get(key), type_):
            # Blank lines are no rows for read_jsonl, but they count as lines.
            lines = enumerate(Path(path).read_bytes().split(b"\n"), 1)
            number = [n for n, line in lines if line.strip()][i]
            sys.exit(f"{path}, line {number},{part} is no row of this program's making ({key!r} is "
                     "missing or of a wrong type). Mend that line or delete it.")


def read_journal(journal, prompts, temperatures):
    """{(question id, sample index): row} of the samples that an earlier run has left."""
    have = {}
    for i, row in enumerate(files.read_jsonl(journal)):
        check_row(journal, i, row, ROW)
        if row["id"] in prompts and row["j"] in range(len(temperatures)) \
                and row["temperature"] == temperatures[row["j"]]:
            have[row["id"], row["j"]] = {**row, "text": chat.clean(row["text"])}
    return have


def generate(url, model, key, prompts, temperatures, max_new_tokens, journal, concurrency=32,
             patience=600.0, seed=0, extra=None, reasoning="keep", retry_failed=False,
             answered=False, timeout=None):
    """Yield (question id, sample index, response, tokens) for one sample of each prompt at each of
    `temperatures`, as they come; and None every now and then while nothing comes.

    A response is {"text", "ended"}. Where the server gave none, text is "", ended False, and
    "failed" says why. len(tokens) is the number of its tokens.

    Args:
        url: of the API, such as http://host:8000/v1.
        key: sent with each request, see `chat.client`; may be empty.
        prompts: {question id: user message}; the server applies its own chat template.
        journal: path of a JSONL file to which each sample is appended as it comes. Those of an
            earlier run are yielded first, and not asked for again.
        concurrency: requests under way at once.
        patience: seconds after which a server that gives nothing is given up.
        extra: merged into each request; a None removes what is there.
        reasoning: "keep" or "drop", see `chat.read_choice`.
        retry_failed: ask again for samples that failed in an earlier run.
        answered: is it known that the server answers such requests?
        timeout: seconds for one request; None: `patience`.
    Raises:
        SystemExit: with what to do, when the server refuses or does not recover.
    """
    have = {key: row for key, row in read_journal(journal, prompts, temperatures).items()
            if not (retry_failed and "failed" in row)}
    for (id_, j), row in have.items():
        yield id_, j, {k: row[k] for k in ("text", "ended", "failed") if k in row}, ()
        answered |= "failed" not in row
    jobs = {}                                                    # {(question id, temperature): Job}
    for id_ in prompts:
        for j, temperature in enumerate(temperatures):
            if (id_, j) not in have:
                jobs.setdefault((id_, temperature), Job(id_, [])).indices.append(j)
    append, arrived = files.Appender(journal), deque()

    def keep(id_, j, response, tokens):
        append({"id": id_, "j": j, "temperature": temperatures[j], **response})
        arrived.append((id_, j, response, range(tokens)))

    async def ask(job, n):
        j = job.indices[0]
        # One seed for all would give the same sample again and again.
        wanted = {"model": model, "messages": [{"role": "user", "content": prompts[job.id_]}],
                  "max_tokens": max_new_tokens, "temperature": temperatures[j], "n": n,
                  "seed": random.Random(f"{seed} {job.id_} {j}").getrandbits(31), **(extra or {})}
        content = json.dumps({k: v for k, v in wanted.items() if v is not None}).encode()
        answer, body = await chat.exchange(connection, "POST", url, "/chat/completions", content,
                                           timeout or patience)
        chat.check(answer.status_code, answer.headers, chat.words(body))
        return chat.read_answer(body, reasoning)

    sampling = Sampling(jobs.values(), ask, keep, patience, answered)
    loop, workers = asyncio.new_event_loop(), []
    loop.set_exception_handler(lambda *_: None)                  # the first error is the one told

    def wait(seconds):
        return loop.run_until_complete(asyncio.wait(workers, timeout=seconds))[0]

    try:
        connection = chat.client(key)
        workers = [loop.create_task(sampling.work()) for _ in range(min(concurrency, len(jobs)))]
        while any(not worker.done() for worker in workers) and not sampling.watch():
            done = wait(0.1)
            while arrived:
                yield arrived.popleft()
            for worker in done:
                worker.result()                                  # raises what it raised
            yield None
        doubtful = {id_ for id_, _, row in sampling.held if row["failed"].startswith("403")}
        if sampling.held and not sampling.answered or len(doubtful) >= MANY:
            sampling.blame()                                     # there was nothing but refusals
        sampling.settle()
        while arrived:
            yield arrived.popleft()
    except Stop as stop:
        raise SystemExit(f"{stop}. What it gave is on disk; the same command goes on.") from None
    finally:
        sampling.stopping.set()
        try:
            if workers:                                          # what is on the wire may yet come
                wait(GRACE)
        finally:
            for worker in workers:
                worker.cancel()
            if workers:
                wait(0.2)
                loop.run_until_complete(connection.aclose())
            loop.close()
            append.file.close()
