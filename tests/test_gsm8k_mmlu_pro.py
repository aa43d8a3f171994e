"""Real tasks: their rows. Hand-written ones; the whole data sets where shared/assets is at hand."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants

from data import gsm8k
from data.gsm8k import GSM8K
from data.mmlu_pro import MMLUPro, split_of


def rows(folder, name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_gsm8k_rows_without_a_number_are_reported_and_left_out(tmp_path, capsys):
    rows(tmp_path, "test.jsonl", [{"question": "a", "answer": "x\n#### 7"},
                                  {"question": "b", "answer": "x"}])
    assert GSM8K(data=str(tmp_path)).gold("test") == {"gsm8k-test-0": "7"}
    assert "gsm8k-test-1" in capsys.readouterr().out
    assert len(GSM8K(data=str(tmp_path), flawed=True).questions("test")) == 2
    assert "answer" not in GSM8K(data=str(tmp_path)).questions("test")[0]


def test_mmlu_pro_rows_that_contradict_themselves_are_reported_and_left_out(tmp_path, capsys):
    good = {"question_id": 1, "question": "Which?", "options": ["x", "y", "z"], "answer": "B",
            "answer_index": 1}
    rows(tmp_path, "test.jsonl", [good, {**good, "question_id": 2, "answer": "C"},
                                  {**good, "question_id": 3, "answer_index": 7, "answer": "H"},
                                  {**good, "question_id": 4, "options": ["y", "y", "z"]}])
    task = MMLUPro(data=str(tmp_path))
    assert {**task.gold("train"), **task.gold("test")} == {"mmlu_pro-1": "B"}
    assert "question_id 2, 3, 4 contradict" in capsys.readouterr().out
    question, = task.questions(split_of(1))
    assert question == {"id": "mmlu_pro-1", "question": "Which?\n\nA. x\nB. y\nC. z"}
    assert "The answer is (X)" in task.prompt(question["question"])


def test_the_split_of_mmlu_pro_stays_what_it_was():
    """Else figures from before and after do not compare. The ids by coreutils' sha256sum."""
    test = [i for i in range(1, 31) if split_of(i) == "test"]
    assert test == [2, 3, 4, 6, 10, 14, 19, 22, 25, 26, 29, 30]


def test_missing_rows_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* train\.jsonl or train\*\.parquet"):
        GSM8K(data=str(tmp_path / "nowhere")).questions("train")
    with pytest.raises(FileNotFoundError, match="nowhere"):         # not taken for an absent split
        GSM8K(data=str(tmp_path / "nowhere")).questions("test")
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl or train\*\.parquet"):
        GSM8K(data=str(tmp_path)).questions("train")
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl or test\*\.parquet"):
        MMLUPro(data=str(tmp_path)).questions("train")


def test_own_gsm8k_rows_need_no_test_split(tmp_path):
    rows(tmp_path, "train.jsonl", [{"question": "a", "answer": 7}, {"question": "b"}])
    for data in (tmp_path, tmp_path / "train.jsonl"):
        task = GSM8K(data=str(data))
        assert [q["id"] for q in task.questions("train")] == ["gsm8k-train-0", "gsm8k-train-1"]
        assert task.gold("train") == {"gsm8k-train-0": "7"}
        assert task.questions("test") == [] and task.gold("test") == {}
        assert task.source() == str(data)
    (tmp_path / "train.jsonl").unlink()
    assert len(task.questions("train")) == 2                        # the rows are read once


@pytest.mark.parametrize("answer, gold", [
    (18, "18"), (-18, "-18"), (18.5, "37/2"), (18.0, "18"), (0, "0"), ("18", "18"), (" 18\n", "18"),
    ("1,234", "1234"), ("$18", "18"), ("-$18.50", "-37/2"), ("3/4", "3/4"), ("x\n#### 18", "18"),
    ("1 250", "1250"), ("3 1/2", "7/2"), ("18 \u20ac", "18"), (1e22, "1" + "0" * 22),
    (1e-7, "1/10000000"), ("3, 4 and 5 make 12\n#### 12", "12"), ("6 \\boxed{18}", "18"),
    ("6 * 3\nThe answer is 18.", "18")])
def test_gsm8k_gold_may_be_a_bare_number(tmp_path, capsys, answer, gold):
    rows(tmp_path, "train.jsonl", [{"question": "a", "answer": answer}])
    assert GSM8K(data=str(tmp_path)).gold("train") == {"gsm8k-train-0": gold}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("answer", ["Paris", "18 apples", "1,2345", "3/0", True, [18], {"x": 1},
                                    float("nan"), float("inf"), "9" * 300, "#### none"])
def test_gsm8k_answers_without_a_number_are_left_out_of_training(tmp_path, capsys, answer):
    good = {"question": "a", "answer": 1}
    rows(tmp_path, "train.jsonl", [good, {"question": "b", "answer": answer}])
    assert [q["question"] for q in GSM8K(data=str(tmp_path)).questions("train")] == ["a"]
    fault = "line 2: no number in the answer of gsm8k-train-1"
    assert capsys.readouterr().out == f"{tmp_path}/train.jsonl: 1 of 2 rows left out: {fault}\n"
    task = GSM8K(data=str(tmp_path), flawed=True)
    assert len(task.questions("train")) == 2 and task.gold("train") == {"gsm8k-train-0": "1"}
    assert f"0 of 2 rows left out: {fault}, kept\n" in capsys.readouterr().out


@pytest.mark.parametrize("row", [{"question": "b"}, {"question": "b", "answer": None},
                                 {"question": "b", "answer": " \n"}])
def test_gsm8k_rows_without_an_answer_are_for_training(tmp_path, capsys, row):
    for split in ("train", "test"):
        other = {**row, "question": f"{split}?"}
        rows(tmp_path, f"{split}.jsonl", [{"question": f"a {split}", "answer": "1"}, other])
    for flawed in (False, True):
        task = GSM8K(data=str(tmp_path), flawed=flawed)
        assert len(task.questions("train")) == 2 and task.gold("train") == {"gsm8k-train-0": "1"}
        assert [q["id"] for q in task.questions("test")] == ["gsm8k-test-0"]
        assert task.gold("test") == {"gsm8k-test-0": "1"}
        assert capsys.readouterr().out == (f"{tmp_path}/test.jsonl: 1 of 2 rows left out: line 2: "
                                           "no answer to score gsm8k-test-1 by\n")


def test_gsm8k_splits_without_a_usable_row(tmp_path):
    rows(tmp_path, "train.jsonl", [{"question": "a", "answer": "Paris"}])
    with pytest.raises(ValueError, match="no training question is left"):
        GSM8K(data=str(tmp_path)).questions("train")
    rows(tmp_path, "test.jsonl", [{"question": "a"}])                # understood, but of no use
    assert GSM8K(data=str(tmp_path)).questions("test") == []


BAD = [(b"{", "bad JSON, Expecting property name"),
       (b'{"question": "\xff"}', "'utf-8' codec can't decode"),
       (b"[" * 100_000, "recursion"), (b"[1]", "not an object"), (b'"question"', "not an object"),
       (b"{}", "no question"), (b'{"question": null}', "no question"),
       (b'{"question": 7}', "question is not a text"), (b'{"question": " "}', "empty question"),
       (b'{"question": "\\ud800"}', "surrogates not allowed"),
       (b'{"question": "torn', "bad JSON, Unterminated string"),
       (b'{"question": "a\x00b"}', "bad JSON, Invalid control character"), (b"\0", "bad JSON"),
       (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", "4300 digits"),
       (b'{"question": NaN}', "question is not a text"),
       (b'{"question": "good "}', "a duplicate of line 1 of train.jsonl")]


@pytest.mark.parametrize("line, fault", BAD)
def test_gsm8k_rows_that_are_not_understood_are_named(tmp_path, capsys, line, fault):
    good = b'{"question": "good", "answer": 1}\n'
    (tmp_path / "train.jsonl").write_bytes(good + b"\n" + line + b'\n{"question": "last"}')
    questions = GSM8K(data=str(tmp_path)).questions("train")
    assert questions == [{"id": "gsm8k-train-0", "question": "good"},    # blank lines do not count
                         {"id": "gsm8k-train-2", "question": "last"}]    # rows left out do
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/train.jsonl: 1 of 3 rows left out: line 3: ")
    assert fault in out and out.count("\n") == 1
    if "duplicate" not in fault:
        (tmp_path / "train.jsonl").write_bytes(b"\n" + line + b"\n")
        looks = 'train.jsonl: line 2: .*One looks like this: {"question"'
        with pytest.raises(ValueError, match=looks) as error:
            GSM8K(data=str(tmp_path)).questions("train")
        assert fault in str(error.value) and "\n" not in str(error.value)


def test_faults_are_spelled_out_five_times(tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "a"}\n' + "{}\n" * 5)
    GSM8K(data=str(path)).questions("train")
    spelled = "; ".join(f"line {n}: no question" for n in range(2, 7))
    assert capsys.readouterr().out == f"{path}: 5 of 6 rows left out: {spelled}\n"
    path.write_text('{"question": "a"}\n' + "{}\n" * 8)
    GSM8K(data=str(path)).questions("train")
    assert capsys.readouterr().out == f"{path}: 8 of 9 rows left out: {spelled}; and 3 more\n"


def test_a_question_may_come_again_where_its_first_row_was_left_out(tmp_path):
    lines = [{"question": "a", "answer": answer} for answer in ("x", 1)]
    rows(tmp_path, "train.jsonl", lines)
    assert GSM8K(data=str(tmp_path)).gold("train") == {"gsm8k-train-1": "1"}


def test_a_file_without_rows_is_an_error(tmp_path):
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="test.jsonl: no rows"):
        GSM8K(data=str(tmp_path)).questions("test")


def test_bom_line_ends_and_a_last_line_without_one(tmp_path, capsys):
    # U+2028 ends a line for str.splitlines; in JSON it is a character like others.
    text = '\ufeff{"question": "a\u2028b"}\r\n\r\n{"question": "c"}\n{"question": "d"}'
    (tmp_path / "train.jsonl").write_bytes(text.encode())
    questions = GSM8K(data=str(tmp_path)).questions("train")
    assert [q["question"] for q in questions] == ["a\u2028b", "c", "d"]
    assert capsys.readouterr().out == ""


def test_only_a_line_feed_ends_a_line(tmp_path, capsys):
    # \r, \x0b, \x0c and \x85 end lines for splitlines, of bytes or of texts.
    text = '{"question":\r"a"}\n{"question": "b\x85c\u2029d"}\r\n{"question": "e\x0b"}\n{}'
    (tmp_path / "train.jsonl").write_bytes(text.encode())
    questions = GSM8K(data=str(tmp_path)).questions("train")
    assert [q["question"] for q in questions] == ["a", "b\x85c\u2029d"]
    out = capsys.readouterr().out                       # bare control characters are no JSON
    assert "line 3: bad JSON, Invalid control character" in out and "line 4: no question" in out


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_a_file_in_another_encoding_is_named(tmp_path, encoding):
    (tmp_path / "train.jsonl").write_bytes('\ufeff{"question": "a"}\n'.encode(encoding))
    with pytest.raises(ValueError, match="train.jsonl is UTF-16 or UTF-32: save it as UTF-8"):
        GSM8K(data=str(tmp_path)).questions("train")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, make):
    make(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="train.jsonl: not a file, but a folder, a pipe"):
        GSM8K(data=str(tmp_path)).questions("train")
    if make is os.mkfifo:
        with pytest.raises(ValueError, match="train.jsonl: not a file"):
            GSM8K(data=str(tmp_path / "train.jsonl")).questions("train")


def test_a_question_of_both_splits_is_not_trained_on(tmp_path, capsys):
    rows(tmp_path, "train.jsonl", [{"question": "a  b"}, {"question": "c"}])
    rows(tmp_path, "test.jsonl", [{"question": "a b", "answer": 1}])
    task = GSM8K(data=str(tmp_path))
    assert [q["question"] for q in task.questions("train")] == ["c"]
    assert len(task.questions("test")) == 1
    assert capsys.readouterr().out == f"{tmp_path}: gsm8k-train-0 left out: test questions too\n"
    rows(tmp_path, "train.jsonl", [{"question": "a b"}])
    with pytest.raises(ValueError, match="no training question is left"):
        GSM8K(data=str(tmp_path)).questions("train")


def test_a_long_question_is_read_whole(tmp_path):
    rows(tmp_path, "train.jsonl", [{"question": "a" * 2**20, "answer": 1}])
    assert len(GSM8K(data=str(tmp_path)).questions("train")[0]["question"]) == 2**20


def test_a_damaged_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="train.parquet can't be read as parquet: "):
        GSM8K(data=str(tmp_path)).questions("train")


def test_mmlu_pro_questions_that_stand_twice_are_named(tmp_path, capsys):
    good = {"question_id": 1, "question": "Which?", "options": ["x", "y"], "answer": "B",
            "answer_index": 1}
    bad = {**good, "question": "Who?", "answer": "A"}               # contradicts itself
    lines = [good, {**good, "question": " Which?  "}, {**good, "options": ["x", "z"]},
             {**bad, "answer_index": 1}, {**bad, "answer_index": 0}]
    rows(tmp_path, "own.jsonl", [{**line, "question_id": n} for n, line in enumerate(lines, 1)])
    task = MMLUPro(data=str(tmp_path / "own.jsonl"))
    assert {**task.gold("train"), **task.gold("test")} == {
        "mmlu_pro-1": "B", "mmlu_pro-3": "B", "mmlu_pro-5": "A"}    # 5: its first row is no use
    out = capsys.readouterr().out
    assert "1 of 5 rows left out: line 2: a duplicate of line 1 of own.jsonl" in out


def test_parquet_rows_are_numbered_over_all_files(tmp_path, capsys):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    for name, questions in (("train-0", ["a", None]), ("train-1", ["b", "a"])):
        table = pyarrow.table({"question": questions, "answer": ["1", "2"]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert GSM8K(data=str(tmp_path)).gold("train") == {"gsm8k-train-0": "1", "gsm8k-train-2": "1"}
    out, left = capsys.readouterr().out.splitlines(), "1 of 2 rows left out: row 2"
    assert out == [f"{tmp_path}/train-0.parquet: {left}: no question",
                   f"{tmp_path}/train-1.parquet: {left}: a duplicate of row 1 of train-0.parquet"]
    one = GSM8K(data=str(tmp_path / "train-1.parquet"))
    assert one.gold("train") == {"gsm8k-train-0": "1", "gsm8k-train-1": "2"}
    assert one.questions("test") == []


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(ImportError, match=r"train\.parquet.*pip install -e .*\[data\]"):
        GSM8K(data=str(tmp_path)).questions("train")


@pytest.mark.parametrize("change, fault", [
    ({"options": None}, "no options, a list"), ({"options": "xyz"}, "no options, a list"),
    ({"options": []}, "no options, a list"), ({"options": ["x", 7]}, "no options, a list"),
    ({"options": list("abcdefghijk")}, "a list of 1 to 10 texts"),
    ({"answer_index": None}, "no answer_index"), ({"answer_index": "1"}, "no answer_index"),
    ({"answer_index": True}, "no answer_index"), ({"answer": None}, "no answer"),
    ({"options": ["x", "\ud800"]}, "surrogates not allowed"),
    ({"question_id": "\udc00"}, "surrogates not allowed"),
    ({"answer": 1}, "answer is not a text"), ({"question": None}, "no question"),
    ({"question_id": None}, "no question_id"), ({"question_id": 1}, "a duplicate of line 1 of own"),
    ({"question_id": " "}, "no question_id")])
def test_mmlu_pro_rows_that_are_not_understood_are_named(tmp_path, capsys, change, fault):
    good = {"question_id": 1, "question": "Which?", "options": ["x", "y"], "answer": "B",
            "answer_index": 1}
    bad = {**good, "question_id": 2, **change}
    bad = {key: value for key, value in bad.items() if value is not None}
    last = {**good, "question": "Who?", "question_id": "three"}
    rows(tmp_path, "own.jsonl", [good, bad, last])
    task = MMLUPro(data=str(tmp_path / "own.jsonl"))
    assert {**task.gold("train"), **task.gold("test")} == {"mmlu_pro-1": "B", "mmlu_pro-three": "B"}
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/own.jsonl: 1 of 3 rows left out: line 2: ") and fault in out
    if "duplicate" not in fault:
        rows(tmp_path, "own.jsonl", [bad])
        task = MMLUPro(data=str(tmp_path / "own.jsonl"))
        for split in ("train", "test"):                             # a failure is not kept as {}
            with pytest.raises(ValueError, match=r"own.jsonl: line 1: .*answer_index"):
                task.questions(split)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server with two small files in place of the published ones, and an empty cache. Its `files`
    are {path: bytes}; `asked` is a list of (path, headers)."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            content = self.server.files.get(self.path)
            self.send_response(302 if self.path.startswith("/moved") else 200 if content else 404)
            self.send_header("Location", self.path.replace("/moved", "/data"))
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.files = [], {
        f"/data/{split}.jsonl": b'{"question": "%s?", "answer": "so\\n#### 4"}\n' % split.encode()
        for split in ("train", "test")}
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("NANODISTILL_GSM8K_URL", raising=False)
    monkeypatch.setattr(gsm8k, "URL", server.url + "/data")
    digests = {path.rpartition("/")[2]: hashlib.sha256(content).hexdigest()
               for path, content in server.files.items()}
    monkeypatch.setattr(gsm8k, "SHA256", digests)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.cache = tmp_path / "home" / "nanodistill" / "gsm8k"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_gsm8k_is_downloaded_once_and_needs_no_pyarrow(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for _ in range(2):
        task = GSM8K()
        assert task.questions("train") == [{"id": "gsm8k-train-0", "question": "train?"}]
        assert task.gold("train") == {"gsm8k-train-0": "4"}
    assert [path for path, _ in site.asked] == ["/data/train.jsonl"]
    assert GSM8K().gold("test") == {"gsm8k-test-0": "4"}
    assert [path for path, _ in site.asked] == ["/data/train.jsonl", "/data/test.jsonl"]
    assert sorted(path.name for path in site.cache.iterdir()) == ["test.jsonl", "train.jsonl"]
    assert GSM8K().source() == f"{site.url}/data/, kept in {site.cache}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)   # what is kept is read offline too
    assert GSM8K().gold("train") == {"gsm8k-train-0": "4"}


def test_gsm8k_from_a_mirror_that_redirects_and_gets_no_token(site, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NANODISTILL_GSM8K_URL", site.url + "/moved/")
    options, get = {}, httpx2.get
    monkeypatch.setattr(httpx2, "get", lambda url, **more: options.update(more) or get(url, **more))
    assert GSM8K().gold("train") == {"gsm8k-train-0": "4"}
    assert [path for path, _ in site.asked] == ["/moved/train.jsonl", "/data/train.jsonl"]
    assert not any("authorization" in sent or "secret" in str(sent) for _, sent in site.asked)
    assert options["timeout"] == 20
    assert GSM8K().source() == f"{site.url}/moved/, kept in {site.cache}"


def test_another_file_than_the_published_one_is_refused(site, monkeypatch):
    site.files["/data/train.jsonl"] += b"\n"
    found = hashlib.sha256(site.files["/data/train.jsonl"]).hexdigest()
    monkeypatch.setenv("NANODISTILL_GSM8K_URL", site.url + "/data")  # a mirror is trusted no more
    with pytest.raises(ValueError, match="data/train.jsonl is not the published") as error:
        GSM8K().questions("train")
    assert found in str(error.value) and gsm8k.SHA256["train.jsonl"] in str(error.value)
    assert not site.cache.exists() or not list(site.cache.iterdir())


def test_a_damaged_file_in_the_cache_is_fetched_anew(site, monkeypatch):
    GSM8K().questions("train")
    whole = (site.cache / "train.jsonl").read_bytes()
    (site.cache / "train.jsonl").write_bytes(whole[:-3])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="train.jsonl is damaged.*HF_HUB_OFFLINE is set"):
        GSM8K().questions("train")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert GSM8K().gold("train") == {"gsm8k-train-0": "4"}
    assert (site.cache / "train.jsonl").read_bytes() == whole and len(site.asked) == 2


@pytest.mark.parametrize("cause, said", [
    ("offline", "HF_HUB_OFFLINE is set"), ("gone", "404 Not Found"), ("refused", "refused"),
    ("spelling", "protocol")])
def test_gsm8k_that_cannot_be_fetched_ends_in_one_message(site, monkeypatch, cause, said):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", cause == "offline")
    if cause == "gone":
        site.files.clear()
    if cause == "refused":
        monkeypatch.setattr(gsm8k, "URL", "http://127.0.0.1:9")      # no one listens at "discard"
    if cause == "spelling":
        monkeypatch.setenv("NANODISTILL_GSM8K_URL", "no address")
    with pytest.raises(FileNotFoundError, match="is not in the cache") as error:
        GSM8K().questions("train")
    message = str(error.value)
    assert str(site.cache / "train.jsonl") in message and "--data FOLDER" in message
    assert said in message
    assert len(message.splitlines()) <= 3 and error.value.__cause__ is None
    assert error.value.__suppress_context__                         # no chain in a traceback
    assert len(site.asked) == (cause == "gone") and not site.cache.exists()


@pytest.mark.parametrize("script, row, shown", [
    ("gsm8k", {"question": "What?", "answer": "#### 1,000"},
     ["gsm8k: 1 questions in train, 0 questions in test", "gsm8k-train-0: What?",
      "prompt: What?\n\nSolve", "gold: 1000"]),
    ("mmlu_pro", {"question_id": 1, "question": "What?", "options": ["x", "y"], "answer": "B",
                  "answer_index": 1},
     ["1 questions in", "mmlu_pro-1: What?\n\nA. x\nB. y", "prompt: What?\n\nA. x\nB. y\n\nThink",
      "gold: B"])])
def test_a_task_as_a_script_shows_its_rows(tmp_path, script, row, shown):
    rows(tmp_path, "own.jsonl", [row])
    path = Path(gsm8k.__file__).with_name(f"{script}.py")

    def run(data):
        return subprocess.run([sys.executable, path, data], cwd=tmp_path, capture_output=True,
                              text=True)
    done = run("own.jsonl")
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in shown), done.stdout
    done = run("nowhere.jsonl")
    assert done.returncode == 1 and done.stderr.startswith("nowhere.jsonl: no such file")
    assert "Traceback" not in done.stderr


def test_the_digests_are_those_of_the_published_files(assets, monkeypatch, tmp_path, capsys):
    cache = tmp_path / "nanodistill" / "gsm8k"
    cache.mkdir(parents=True)
    for name in gsm8k.SHA256:
        (cache / name).write_bytes((assets / "gsm8k" / name).read_bytes())
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [len(GSM8K().questions(split)) for split in ("train", "test")] == [7473, 1319]
    assert capsys.readouterr().out == ""


def test_every_gsm8k_answer_reads_back(assets):
    task = GSM8K(data=str(assets / "gsm8k"))
    for split, size in (("train", 7473), ("test", 1319)):
        gold = task.gold(split)
        assert len(gold) == size
        assert not any("/" in a for a in gold.values())
        for form in ("#### {}", "So it is 1.\n#### ${}.00\nDone.", "####{} dollars", "#### **{}**",
                     "#### Step 2: sum\nThe answer is {}.", "so \\boxed{{{}}}", "#### Answer\n{}"):
            assert all(task.extract_answer(form.format(f"{int(a):,}")) == a for a in gold.values())


def test_every_mmlu_pro_answer_reads_back(assets, capsys):
    pytest.importorskip("pyarrow")
    task = MMLUPro(data=str(assets / "mmlu_pro"))
    assert {split: len(task.questions(split)) for split in task.published} == task.published
    assert "158 of 12032 rows left out: row 818: a duplicate of row 817" in capsys.readouterr().out
    for split in task.published:
        gold = task.gold(split)
        for q in task.questions(split):
            for form in ("so\nThe answer is ({}).", "{}", "({})", "**{}**", "{}.", "Answer: {}",
                         "The answer is {}", "\\boxed{{{}}}",
                         "The answer is ({}). That answer is so."):
                read = task.extract_answer(form.format(gold[q["id"]]), q["question"])
                assert read == gold[q["id"]], (q["id"], form)
    texts = [set(q["question"] for q in task.questions(split)) for split in task.published]
    assert not texts[0] & texts[1]


def test_mmlu_pro_worked_examples_read_as_their_answers(assets):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(assets / "mmlu_pro" / "validation-00000-of-00001.parquet")
    for row in table.to_pylist():
        lines = [f"{k}. {' '.join(o.split())}" for k, o in zip("ABCDEFGHIJ", row["options"])]
        question = "\n".join([row["question"], "", *lines])
        assert MMLUPro().extract_answer(row["cot_content"], question) == row["answer"]
