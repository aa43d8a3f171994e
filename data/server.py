"""Samples of a model behind an OpenAI-compatible server (vLLM, llama.cpp, ...), through huggingface_hub's InferenceClient.

Many requests are under way at once. One asks for all samples of a question at one temperature where the server gives several, else for one at
a time. A request that meets 429, 5xx, a timeout or a cut connection is tried again, later and later, or when the server's Retry-After says;
401, 403 and 404 end the run with what to do.
"""

import json
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime

import httpx2
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled

from nanodistill import run

FATAL = {401: "the server wants a key: set OPENAI_API_KEY", 403: "the key in OPENAI_API_KEY may not use this model",
         404: "there is no such address or model: look at --teacher-url (it usually ends in /v1) and --teacher-model"}


def problems(url, model, key, timeout=10.0):
    """What is wrong with the server's address or model, as a list of messages; [] if it answers.

    Asks for its list of models, which is free; a server without one (404, 405, 501) is taken as it is.
    """
    if constants.HF_HUB_OFFLINE:                                 # huggingface_hub keeps every address to itself then
        return ["HF_HUB_OFFLINE is set, which forbids asking the teacher's server too: unset it"]
    try:
        answer = httpx2.get(url.rstrip("/") + "/models", timeout=timeout, follow_redirects=True,
                            headers={"Authorization": f"Bearer {key}"} if key else {})
        names = [entry["id"] for entry in answer.json()["data"]] if answer.is_success else []
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return [f"--teacher-url {url}: nobody answers there ({error or type(error).__name__})"]
    except (ValueError, KeyError, TypeError):
        return [f"--teacher-url {url}: what answers there is no OpenAI-compatible server (its "
                "address usually ends in /v1)"]
    if answer.status_code in (401, 403):
        return [f"--teacher-url {url} answered {answer.status_code}: {FATAL[answer.status_code]}"]
    if names and model not in names:
        return [f"--teacher-model {model}: the server at {url} has {', '.join(map(str, names[:5]))}"]
    return []


class Stopped(Exception):
    """The run is ending; a request that has not begun, or waits to be tried again, is given up."""


def wait_before(attempt, retry_after, rng):
    """Seconds before the next try: the server's Retry-After (seconds or a date), else about 1, 2, 4, ... and at most 60."""
    if retry_after:
        try:
            return max(0.0, float(retry_after) if retry_after.strip().replace(".", "", 1).isdigit() else parsedate_to_datetime(retry_after).timestamp() - time.time())
        except ValueError:
            pass
    return min(2.0**attempt, 60.0) * rng.uniform(0.75, 1.25)


def ask(client, request, tries, stopping):
    """One chat completion, tried again while the fault may pass. Returns [(text, ended, tokens)], one a choice."""
    rng = random.Random()
    for attempt in range(tries):
        retry_after = None
        try:
            answer = client.chat_completion(**request)
            spent = answer.usage.completion_tokens if answer.usage else 0
            return [(choice.message.content or "", choice.finish_reason in ("stop", "eos_token"), spent / len(answer.choices)) for choice in answer.choices]
        except HfHubHTTPError as error:
            code = error.response.status_code
            if code in FATAL:
                raise SystemExit(f"the teacher's server answered {code}: {FATAL[code]}") from error
            if code != 429 and code < 500:
                raise
            fault, retry_after = error, error.response.headers.get("Retry-After")
        except OfflineModeIsEnabled as error:                    # huggingface_hub keeps every address to itself then, a local one too
            raise SystemExit("HF_HUB_OFFLINE is set, which forbids asking the teacher's server too: unset it for this stage") from error
        except (InferenceTimeoutError, httpx2.TransportError, json.JSONDecodeError) as error:
            fault = error
        if attempt + 1 < tries and stopping.wait(wait_before(attempt, retry_after, rng)):
            raise Stopped
    raise SystemExit(f"the teacher's server failed {tries} times in a row, last with: {fault}. What it gave is on disk; the same command goes on.")


def generate(url, model, key, prompts, temperatures, max_new_tokens, journal, concurrency=32, timeout=600.0, tries=8, seed=0):
    """Yield (question id, sample index, text, ended, tokens) for a sample of each prompt at each of `temperatures`, as they come.

    Args:
        url: of the API, such as http://host:8000/v1. key: sent as bearer token; may be empty.
        prompts: {question id: user message}; the server applies its own chat template.
        journal: path of a JSONL file that gets each sample as it comes. Those of an earlier run are yielded first, and not asked for again.
        concurrency: requests under way at once.
    Raises:
        SystemExit: with what to do, when the server refuses or does not recover.
    """
    have = {(row["id"], row["j"]): row for row in run.read_jsonl(journal)
            if row["id"] in prompts and row["j"] < len(temperatures) and row["temperature"] == temperatures[row["j"]]}
    for (id_, j), row in have.items():
        yield id_, j, row["text"], row["ended"], 0
    append = run.Appender(journal)
    # Without a key of its own the client would send the user's Hugging Face token, which is nobody's but the hub's.
    client = InferenceClient(base_url=url, api_key=key or "EMPTY", timeout=timeout)
    stopping, one_at_a_time = threading.Event(), threading.Event()

    def work(id_, places):
        """Samples of a prompt for the sample indices `places`, all of one temperature."""
        samples = []
        while len(samples) < len(places):
            if stopping.is_set():
                raise Stopped
            n = 1 if one_at_a_time.is_set() else len(places) - len(samples)
            request = dict(model=model, messages=[{"role": "user", "content": prompts[id_]}], max_tokens=max_new_tokens,
                           temperature=temperatures[places[0]], n=n, seed=random.Random(f"{seed} {id_} {places[len(samples)]}").getrandbits(31))
            try:
                given = ask(client, request, tries, stopping)
            except SystemExit:
                stopping.set()                                   # here and not in the main thread, before this worker takes its next request
                raise
            except HfHubHTTPError:
                if n == 1:
                    stopping.set()
                    raise
                one_at_a_time.set()                              # a server that refuses n > 1
                continue
            if len(given) < n:
                one_at_a_time.set()                              # a server that leaves n out of account
            samples += given[:n]
        return id_, places, samples

    jobs = {}                                                     # {(question id, temperature): sample indices}
    for id_ in prompts:
        for j, temperature in enumerate(temperatures):
            if (id_, j) not in have:
                jobs.setdefault((id_, temperature), []).append(j)
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for future in as_completed([pool.submit(work, id_, places) for (id_, _), places in jobs.items()]):
                try:
                    id_, places, samples = future.result()
                except Stopped:                                  # another request has failed for good; its error is still to come
                    continue
                for j, (text, ended, tokens) in zip(places, samples):
                    append({"id": id_, "j": j, "temperature": temperatures[j], "text": text, "ended": ended})
                for j, (text, ended, tokens) in zip(places, samples):
                    yield id_, j, text, ended, tokens
        except HfHubHTTPError as error:
            sys.exit(f"the teacher's server refused a request: {error}")
        finally:
            stopping.set()
            pool.shutdown(cancel_futures=True)
