"""One request to an OpenAI-compatible server: what is sent, what comes back, what it means.

Servers differ, and some err. What makes sense is understood; all else is an exception: Fault (it
may pass), Refused (this question), Stop (every question) or Forbidden (one of the last two).

The key in OPENAI_API_KEY goes only to the address asked (redirects are not followed), and no other
token goes anywhere.
"""

import asyncio
import json

import httpx2


FATAL = {401: "the server wants a key: set OPENAI_API_KEY",
         404: "there is no such address or model: look at --teacher-url (it usually ends in /v1) "
              "and --teacher-model"}
REFUSED = (400, 413, 422)      # one question: a content filter, a prompt that is too long, ...
PASSING = (408, 409, 425, 429)
LARGEST = 2**26                # bytes of an answer


class Stop(Exception):
    """The run can't go on."""


class Forbidden(Stop):
    """403: the key may not use this model; or the server refuses this question alone, as a content
    filter does. What it answered before tells which."""

    def __str__(self):
        return (f"the teacher's server answered {self.args[0]} (perhaps the key in OPENAI_API_KEY "
                "may not use this model)")


class Refused(Exception):
    """The server will not answer this question."""


class Fault(Exception):
    """It may pass. `of_server`: the question has no part in it."""

    def __init__(self, words, of_server=False, retry_after=None):
        super().__init__(words)
        self.of_server, self.retry_after = of_server, retry_after


def client(key):
    """A client that sends the key with each request: as a bearer token, or as it is where it names
    the other scheme, "Basic <base64 of user:password>". Raises Stop for what can't be a key."""
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise Stop("OPENAI_API_KEY holds characters that are in no key")
    sent = key if key[:6].lower() == "basic " else f"Bearer {key}"
    return httpx2.AsyncClient(
        headers={"Content-Type": "application/json"} | ({"Authorization": sent} if key else {}),
        # `exchange` bounds everything, but a machine that is off should be noticed sooner.
        timeout=httpx2.Timeout(None, connect=30.0), follow_redirects=False,
        limits=httpx2.Limits(max_connections=None))


async def exchange(client, method, url, path, content, seconds):
    """One request to `url` + `path` -> (httpx2.Response, body as bytes).

    Raises Fault, also where the answer is not whole within `seconds`; Stop for an address that is
    none.
    """
    async def whole():
        at = httpx2.URL(url)                                     # it may have a ?query
        at, body = at.copy_with(path=at.path.rstrip("/") + path), bytearray()
        async with client.stream(method, at, content=content) as answer:
            async for chunk in answer.aiter_bytes():
                body += chunk
                if len(body) > LARGEST:
                    raise Fault(f"an answer of more than {LARGEST >> 20} MiB")
        return answer, bytes(body)

    try:
        return await asyncio.wait_for(whole(), seconds)
    except asyncio.TimeoutError:
        raise Fault(f"no whole answer within {seconds:.3g} s") from None
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
        raise Stop(f"--teacher-url {url}: that is no address ({error})") from None
    except (httpx2.HTTPError, OSError) as error:
        unreachable = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
        raise Fault(str(error) or type(error).__name__, of_server=unreachable) from None


def parsed(body):
    """A body's JSON, or None."""
    try:
        return json.loads(body.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return None


def words(body):
    """The server's own words in an answer that is no completion, as one short line."""
    said = answer = parsed(body)
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    text = said if isinstance(said, str) else str(answer or body.decode(errors="replace"))
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text[:197] + "..." if len(text) > 200 else text or "nothing"


def check(status, headers, said):
    """Raises what a status other than success means: Refused, Fault, Stop or Forbidden."""
    if 200 <= status < 300:
        return
    if status in REFUSED:
        raise Refused(f"{status}: {said}")
    if status == 403:
        raise Forbidden(f"403: {said}")
    if status in PASSING or status >= 500:
        raise Fault(f"{status}: {said}", status != 500, headers.get("Retry-After"))
    if 300 <= status < 400:
        said = f"it sends on to {headers.get('Location', 'nowhere')}. If that is the right " \
            "place, give it as --teacher-url"
    raise Stop(f"the teacher's server answered {status}: {FATAL.get(status, said)}")


def clean(text):
    """Half a surrogate pair, which is in no UTF-8, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def flat(content):
    """The text of a message's content: a text, null or a list of parts. None for anything else."""
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else p for p in content]
        return "".join(p for p in parts if isinstance(p, str))
    if content is None:
        return ""
    return content if isinstance(content, str) else None


def read_choice(choice, reasoning):
    """(text, ended) of one choice, or None if it makes no sense.

    Where the server took thoughts out of the text, `reasoning` "keep" puts them before it in
    <think> tags, as models write them, so that a student learns them too. "drop" leaves them out,
    and takes those in the text out as well.
    """
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return None
    text, reason = flat(message.get("content")), choice.get("finish_reason")
    thoughts = next((t for t in (message.get("reasoning_content"), message.get("reasoning"))
                     if isinstance(t, str) and t.strip()), "")
    cut = reason in ("length", "content_filter")
    if text is None:
        return None
    if not text.strip() and isinstance(message.get("refusal"), str):
        text = message["refusal"]
    # A server that doesn't say why it gave nothing may have broken off.
    if not (text or thoughts or cut or reason in ("stop", "eos", "eos_token")):
        return None
    if reasoning == "drop":
        text = text.rpartition("</think>")[2].lstrip() if "</think>" in text else text
    elif thoughts and "<think>" not in text:
        unfinished = cut and not text                            # it was cut off while it thought
        text = f"<think>\n{thoughts.strip()}" + ("" if unfinished else f"\n</think>\n\n{text}")
    return clean(text), not cut


def read_answer(body, reasoning):
    """([(text, ended)] of each choice, tokens of all) of a chat completion. Raises as `check`."""
    answer = parsed(body)
    answer = answer if isinstance(answer, dict) else {}
    choices, error = answer.get("choices"), answer.get("error")
    samples = [read_choice(c, reasoning) for c in choices] if isinstance(choices, list) else []
    samples = [s for s in samples if s]
    if not samples and isinstance(error, dict) and error.get("code") in range(400, 600):
        check(error["code"], {}, words(body))                    # an error that says 200 outside
    if not samples:
        raise Fault(f"an answer without a choice that has a text: {words(body)}")
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    return samples, max(0, min(tokens, 2**20)) if isinstance(tokens, int) else 0
