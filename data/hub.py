"""The folder that --student or --teacher means, fetched from Hugging Face's hub where need be.

Whatever goes wrong on the way ends in a message of at most three lines: what is wrong, the way out,
and what needs no access. A user's token goes to the hub and to nobody else.
"""

import errno
import fcntl
import hashlib
import json
import queue
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path

from nanodistill import lora
from nanodistill.files import digest
from nanodistill.presets import SIZES, STUDENTS
from nanodistill.tokenizer import FILES as TOKENIZER_FILES
from nanodistill.weights import (
    INDEX,
    SINGLE,
    complete,
    load,
    load_adapter,
    load_adapter_config,
    write,
)


WEIGHTS = "model*.safetensors"                                   # of the files on the hub
ADAPTER_CONFIG = "adapter_config.json"
TINY = Path(__file__).parent / "tiny"                            # folders "teacher" and "student"


def resolve(name, role, revision="", weights=True):
    """The folder that a `--student` or `--teacher` value means.

    Args:
        name: "tiny", a preset, a folder with a config.json, a hub name ("org/model"), or a folder
            with an adapter in PEFT's format, which is merged into its base.
        role: the flag without its dashes: "student", "teacher" or "models".
        revision: branch, tag or commit on the hub; "" = its main branch.
        weights: False fetches config.json and the tokenizer's files alone. That is a cheap check
            of access: it fails where the weights cannot be fetched either.

    What is fetched is kept in the hub's cache (HF_HOME; HF_HUB_OFFLINE=1 reads that alone). If the
    hub fails and the cache has a whole copy, that is used, and a line says so.
    Raises SystemExit with at most three lines: what is wrong, the way out, what needs no access.
    """
    flag = f"--{role} {name}"
    if name == "tiny":
        if role not in ("student", "teacher"):
            sys.exit(f"{flag}: there are two tiny models: name {TINY / 'teacher'} "
                     f"or {TINY / 'student'}.")
        return TINY / role
    if (Path(name) / "config.json").exists():
        return Path(name)
    if (Path(name) / ADAPTER_CONFIG).exists():
        return _merged(Path(name), role, weights)
    repository = _repository(name)
    if not repository:
        presets = STUDENTS if role == "student" else ("tiny", *SIZES)
        sys.exit(f"{flag}: not a preset ({', '.join(presets)}), not a folder with a config.json, "
                 "and not a hub name (organisation/model).")
    from huggingface_hub import snapshot_download
    asked = False
    try:
        _ask(repository, revision)
        asked = True
        folder = Path(snapshot_download(repository, revision=revision or None,
                                        allow_patterns=_patterns(weights)))
        missing = _missing(folder, weights)
        if missing:
            sys.exit(f"{flag}: {repository} has no {missing[0]} on the hub. This reads safetensors "
                     "and tokenizer.json alone.\nSave it with transformers' save_pretrained, and "
                     f"name that folder: --{role} FOLDER.")
        return folder
    except Exception as error:
        folder, missing = _cached(repository, revision)
        what, way = _explain(error, asked, role, name, repository, revision, missing)
        if folder and not missing:
            if not _offline():                                   # which is what was asked for
                print(f"{what} Taken from the cache: {folder}", flush=True)
            return folder
        free = [f"--student {size}" for size in STUDENTS if size in SIZES and not SIZES[size].gated]
        sys.exit(f"{what}\n{way}\nWithout access: {' or '.join(free)}; "
                 "without network too: --student tiny.")


def _merged(folder, role, weights):
    """The base of an adapter's folder with the adapter merged into it: a folder beside the hub's
    cache, made once. Without `weights`: the base's."""
    from huggingface_hub import constants
    try:
        _, _, base, revision = load_adapter_config(folder)
    except (ValueError, OSError) as error:
        sys.exit(f"--{role} {folder}: {error}")
    base = resolve(base, role, revision, weights)
    if not weights:
        return base
    parts = [digest(path) for path in (folder, folder / ADAPTER_CONFIG, base)]
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    merged = Path(constants.HF_HOME) / "nanodistill" / f"{folder.resolve().name}-{key}"
    merged.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{merged}.lock", "w") as lock:
        # Of several processes one makes it, and the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete(merged):
            print(f"--{role} {folder}: an adapter, merged into {base}: {merged}", flush=True)
            try:
                model = load_adapter(folder, load(base).requires_grad_(False))
            except (ValueError, OSError) as error:
                sys.exit(f"--{role} {folder}: {error}")
            write(model, dict(lora.merged(model)), merged, base, base)
    return merged


def bytes_to_fetch(name, revision=""):
    """Bytes of the weights that `resolve(name, ...)` would download: 0 for what is in the cache, a
    folder or "tiny", and where the hub cannot be asked."""
    local = name == "tiny" or (Path(name) / "config.json").exists()
    if not local and (Path(name) / ADAPTER_CONFIG).exists():
        return bytes_to_fetch(*load_adapter_config(Path(name))[2:])
    repository = "" if local else _repository(name)
    if not repository:
        return 0
    from huggingface_hub import constants, try_to_load_from_cache
    try:
        info = _ask(repository, revision)
    except Exception:
        return 0
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "blobs"
    total = 0
    for file in info.siblings or ():
        if fnmatch(file.rfilename, WEIGHTS):
            here = try_to_load_from_cache(repository, file.rfilename, revision=info.sha)
            same = file.lfs and (blobs / file.lfs.sha256).exists()       # of an earlier commit
            total += 0 if isinstance(here, str) or same else file.size or 0
    return total


def _repository(name):
    """The hub's name of a preset, or of "organisation/model"; "" if it is neither."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    if name in SIZES:
        return SIZES[name].repository
    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    return name if name.count("/") == 1 and not Path(name).exists() else ""


def _patterns(weights):
    return [*TOKENIZER_FILES, "config.json", *([WEIGHTS, INDEX] if weights else [])]


def _offline():
    from huggingface_hub import constants
    return constants.is_offline_mode()


_silent = set()                                                  # endpoints that did not answer


def _ask(repository, revision):
    """The hub's ModelInfo of a repository: its commit, its files and their sizes.

    Raises within seconds, whatever the network does: what huggingface_hub raises, or TimeoutError.
    It asks for a file too, since anybody may list a gated repository. A socket's own limit is not
    enough: a name server, and then each of a host's addresses, may take that long. A hub that did
    not answer in time is not asked again by this process.
    """
    import httpx2
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
    limit, answers = constants.HF_HUB_ETAG_TIMEOUT, queue.SimpleQueue()
    if constants.ENDPOINT in _silent:
        raise TimeoutError(f"no answer within {limit} seconds")

    def ask():
        try:
            info = HfApi().model_info(repository, revision=revision or None,
                                      files_metadata=True, timeout=limit)
            url = hf_hub_url(repository, "config.json", revision=info.sha)
            get_hf_file_metadata(url, timeout=limit)
            answers.put(info)
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=limit + 2)                  # a socket's own error says more
    except queue.Empty:
        answer = TimeoutError(f"no answer within {limit} seconds")
    if isinstance(answer, (TimeoutError, httpx2.TimeoutException)):
        _silent.add(constants.ENDPOINT)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _missing(folder, weights=True):
    """Names of the files that a snapshot lacks and `load` or the tokenizer needs."""
    names = ["config.json", "tokenizer.json"]
    if weights and (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names += sorted(set(index["weight_map"].values()))
    elif weights:
        names.append(SINGLE)
    return [name for name in names if not (folder / name).exists()]


def _cached(repository, revision):
    """(folder in the cache or None, names of what it lacks to be whole)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError
    try:
        folder = snapshot_download(repository, revision=revision or None,
                                   allow_patterns=_patterns(True), local_files_only=True)
        return Path(folder), _missing(Path(folder))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path), _missing(Path(error.snapshot_path)) or ["a file"]
    except Exception:
        return None, []


def _explain(error, asked, role, name, repository, revision, missing):
    """(what is wrong, the way out), one line each. `asked`: the hub had answered before."""
    from huggingface_hub import constants, errors, get_token
    page, flag = f"https://huggingface.co/{repository}", f"--{role} {name}"
    log_in = "hf auth login (or set HF_TOKEN)"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", 0)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, errors.OfflineModeIsEnabled):
        lacks = f"{repository} is not in the cache ({constants.HF_HUB_CACHE})"
        if missing:
            lacks = f"the copy of {repository} in the cache lacks {', '.join(missing[:3])}"
        return (f"{flag}: HF_HUB_OFFLINE is set, and {lacks}.",
                "Unset it, and the same command downloads what is missing.")
    if isinstance(error, errors.GatedRepoError):
        token = "your token does not open it" if get_token() else "no token is set"
        return (f"{flag}: {repository} is gated, and {token}.",
                f"Ask for access at {page} and wait for the mail that grants it; then {log_in}.")
    if isinstance(error, errors.RevisionNotFoundError):
        which = "--teacher-revision" if role == "teacher" else "--revision"
        return (f"{which} {revision}: {repository} has no such branch, tag or commit.",
                f"Those it has: {page}/commits. Without the flag its main branch is taken.")
    if isinstance(error, errors.EntryNotFoundError) and status:
        return (f"{flag}: {repository} has no config.json on the hub.",
                "Name a model in the form that transformers loads.")
    if status == 401 and get_token():
        return f"{flag}: the hub does not take your token.", f"Log in again: {log_in}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"{flag}: the hub has no model {repository}, or it is private.",
                f"Look for it at {page}; for a private one, {log_in}.")
    if status:
        busy = status == 429 or status >= 500
        way = "Wait a little and give the same command again" if busy else f"See {page}"
        reason = getattr(error, "server_message", "") or error.response.reason_phrase
        return f"{flag}: the hub answers {status}: {reason}.", f"{way}; or {log_in}."
    full = "No space left" in reason                             # so says hf_xet, without a number
    if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES,
                                                 errno.EPERM, errno.EROFS):
        return (f"{flag}: the cache {constants.HF_HUB_CACHE} takes no more: {reason}.",
                "Free space there, or set HF_HOME to another folder. What came whole is kept.")
    if asked:
        return (f"{flag}: the download of {repository} broke off: {reason}.",
                "The same command goes on from there: what came whole is kept.")
    part = f", and the copy in the cache lacks {', '.join(missing[:3])}" if missing else ""
    return (f"{flag}: the hub ({constants.ENDPOINT}) cannot be reached{part}: {reason}.",
            "Check the network and its proxy (HTTPS_PROXY), or name a folder that has the model: "
            f"--{role} FOLDER.")
