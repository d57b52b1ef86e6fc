"""mvp_eval.py: parity with the official code, the toy set, a misbehaving server, users' files."""

import functools
import io
import itertools
import json
import random
import re
import shutil
import signal
import struct
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import helpers
from helpers import close, run_several, start, wait_for_rows
from PIL import Image
from stand_in import StandIn, solve_request
from test_runs import full_disk, here, refused

import mvp_eval
from mvp_eval import SUBSETS, Config

GOLDEN = helpers.GOLDEN / "mvp_eval"
MVP = SimpleNamespace(module=mvp_eval)
call = functools.partial(here, MVP)


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def golden_questions():
    return mvp_eval.read_annotations(GOLDEN / "annotations", "mini")


def lines_of(path):
    """Return the objects of a jsonl file; blank and torn lines are skipped."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


def rows_of(table):
    """Return the pairs of a text table, `this -> that` a line."""
    return [line.rsplit(" -> ", 1) for line in table.strip().splitlines()]


def groups_of(system="model", out="run"):
    """Return what the report of a run says of a system: {group: its results}."""
    return json.loads(Path(out, "report.json").read_text())["systems"][system]


def macro_of(system="model", out="run"):
    return groups_of(system, out)["macro"]


# ------------------------------------------------------------------ parity with the official code


def test_prompts_and_answers_of_annotations():
    questions = {(q.subset, q.video_id): q for q in golden_questions()}
    for case in golden("prompts.json"):
        q = questions[case["subset"], case["video_id"]]
        prompt = mvp_eval.make_prompt(q)
        assert prompt == case["prompt"] and prompt.startswith(case["prompt_without_kwargs"])
        assert list(q.candidates) == case["candidates"]
        assert (q.answer_idx, q.answer) == (case["answer_idx"], case["target"])
        assert not q.video_path.startswith("/")


def test_both_parsers_on_recorded_replies():
    for case in golden("answers.json"):
        assert mvp_eval.parse_official(case["reply"]) == case["official"], case
        assert mvp_eval.parse_strict(case["reply"], case["candidates"]) == case["strict"], case


def test_strict_parser_on_other_replies():
    options = ("Yes, all is normal", "No, something is odd")
    strict = {
        "<thinking>A</thinking> (B)": 1,
        "<answer>A</answer> <answer>B</answer>": 1,
        "Best choice - (a)": 0,
        "Reasons...\nB": 1,
        "[B] it is": 1,
        "yes all is normal": 0,
        "answering B": None,
        None: None,
    }
    assert {reply: mvp_eval.parse_strict(reply, options) for reply in strict} == strict
    # replies of nothing but blanks, as degenerate models give them, stall neither parser
    assert mvp_eval.parse_official("answer" + " " * 200_000) is None
    assert mvp_eval.parse_strict("answer is" + "\n \n" * 50_000 + "b", options) == 1


COLUMNS = {  # of the golden file, and what ours are called
    "n_pairs": "pairs",
    "n_unparsed": "unparsed",
    "pair_accuracy": "{}pair",
    "single_accuracy": "{}single",
}


def test_accuracies_intervals_and_submissions():
    questions = golden_questions()
    rows = lines_of(GOLDEN / "predictions.jsonl")
    for row, q in zip(rows, questions, strict=True):
        row["candidates"] = q.candidates
    guesses = mvp_eval.parse_rows(rows)
    found = mvp_eval.score(questions, guesses, 0)
    found["group"] = found["macro"]
    expected = golden("aggregate.json")
    assert expected["bootstrap"]["order"] == list(SUBSETS)
    for parser, kind in enumerate(("official", "strict")):
        prefix = "strict_" * parser
        for q, row, guess in zip(questions, rows, guesses[:, :, parser].flat, strict=True):
            assert (None if guess < 0 else guess) == row[f"{kind}_idx"]
            assert (guess == q.answer_idx) == row[f"{kind}_rating"]
        part = expected.get(kind, expected)
        for name, values in {**part["sources"], **part["tasks"], "group": part["group"]}.items():
            ours = found[name.removeprefix("mvp_mini_")]
            for key, value in values.items():
                close(ours[COLUMNS[key].format(prefix)], value, atol=1e-9)
        for name, interval in expected["bootstrap"][kind].items():
            close(found[name][f"{prefix}pair_ci"], interval, atol=1e-9)
    mvp_eval.write_submissions(Path("s"), questions, guesses[:, :, 0].ravel(), "mini")
    for file in (GOLDEN / "submissions").iterdir():
        assert lines_of(Path("s", file.name)) == lines_of(file)


def test_request_bodies():
    case = golden("payloads.json")
    [question] = [q for q in golden_questions() if q.video_id == case["video_id"]]
    prompt = mvp_eval.make_prompt(question)
    images = [f"<FRAME {i}>" for i in range(case["n_frames"])]
    assert mvp_eval.make_payload(Config(), "some-model", prompt, images) == case["default"]
    config = Config(extra='{"top_k": 1, "seed": null}', frame_labels=True)
    body = mvp_eval.make_payload(config, "m", prompt, images[:2])
    assert body.keys() == {"model", "messages", "top_k", "temperature", "max_tokens"}
    texts = [part.get("text") for part in body["messages"][0]["content"]]
    assert texts == ["Frame 1:", None, "Frame 2:", None, prompt]


# ----------------------------------------------------------------------------------------- frames


KEYS = r"T(\d+)_fps(.+)_n(\d+)/(uniform|segments|center|qwen2vl)"


def test_frame_indices():
    for key, expected in np.load(GOLDEN / "frame_indices.npz").items():
        match = re.fullmatch(KEYS, key)
        if match:
            total, rate, n, rule = match.groups()
            found = mvp_eval.frame_indices(rule, int(total), float(Fraction(rate)), int(n))
            np.testing.assert_array_equal(found, expected, strict=True)
    with pytest.raises(ValueError):
        mvp_eval.frame_indices("qwen2vl", 1, 24.0, 16)


def test_decoding_gives_the_frames_that_were_asked_for():
    for name, clip in golden("clips/clips.json").items():
        for n, expected in clip["expect"].items():
            images, indices = mvp_eval.decode(GOLDEN / "clips" / name, "uniform", int(n), 20)
            assert indices == expected and max(images[0].size) == 20
            for image, i in zip(images, indices, strict=True):
                grey = clip["gray_first"] + clip["gray_step"] * i
                assert abs(np.asarray(image, float) - grey).max() <= 2
    for path in (GOLDEN / "clips" / "truncated.mp4", __file__, "none.mp4"):
        with pytest.raises(mvp_eval.VIDEO_ERRORS):
            mvp_eval.decode(path, "center", 1)


def test_turned_and_damaged_videos():
    """Phones turn frames by metadata; a damaged packet costs its frames only."""
    frames = np.zeros((20, 32, 48, 3), np.uint8)
    frames[:, :, :24] = 255  # white on the left
    path = Path("a.mp4")
    mvp_eval.write_video(path, frames)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    one = 1 << 16
    clockwise = [0, one, 0, -one, 0, 0, 0, 0, one << 14]
    struct.pack_into(">9i", data, matrix, *clockwise)
    packet = data.index(b"moov") - 300
    data[packet : packet + 100] = b"?" * 100
    path.write_bytes(data)
    images, _ = mvp_eval.decode(path, "uniform", 100)
    assert 15 <= len(images) < 20
    assert images[0].size == (32, 48)  # not enlarged
    pixels = np.asarray(images[0])
    assert pixels[:20].min() > 200 and pixels[28:].max() < 50


# ----------------------------------------------------------------------------------- the toy pairs


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Return a folder of 16 toy pairs that share no clip: no two questions are one request."""
    folder = tmp_path_factory.mktemp("toy")
    mvp_eval.write_toy(folder, 2, 0)
    for path in folder.glob("*/mini.jsonl"):
        lines = [line for line in path.read_text().split("\n") if re.search("_p[03]_", line)]
        path.write_text("\n".join(lines))
    return folder


def test_toy_pairs_are_minimal_and_no_shortcut_works(monkeypatch, capsys):
    """The default run: each baseline as the paper argues, a coin within four sigma, the files."""
    monkeypatch.setenv("DATA", "data")
    call("--scenes 2 --seed 3 --out run")
    for name in ("first", "longest", "frame"):
        for values in groups_of(name).values():
            assert (values["pair"], values["single"]) == (0.0, 50.0), name
    assert macro_of("oracle")["pair"] == 100.0 and abs(macro_of("random")["pair"] - 25) < 31
    printed = capsys.readouterr().out
    assert "human (full)" in printed and "64 questions = 32 pairs" in printed
    assert "frame, macro" in Path("run/report.md").read_text()
    assert Image.open("run/picture.png").size[0] == 1000
    toy = Path("data/mvp_toy_2_3")
    questions = mvp_eval.read_annotations(toy, "mini")
    frames = []
    for q in questions:
        frames += mvp_eval.decode(toy / "videos" / q.video_path, "center", 1)[0]
    assert frames[::2] == frames[1::2], "the centre frames tell"
    assert sum(q.candidates == mvp_eval.CANDIDATES for q in questions) == 32


def test_functions(toy, capsys):
    """One that looks is perfect. Right on one row of each pair: 0 % of pairs, 50 % of rows."""
    Path("plug_in.py").write_text(
        "import threading\n"
        "from stand_in import solve\n"
        "def answer(frames, prompt, row):\n"
        "    assert 'answer' not in row and len(row['candidates']) == 2\n"
        "    assert threading.current_thread() is threading.main_thread()\n"
        "    return solve(frames, prompt) if len(frames) == 16 else 'Answer: A'\n"
        "def half(frames, prompt, row):\n"
        "    right = 'AB'.index(solve(frames, prompt)[-1])\n"
        "    return right if row['video_id'].endswith('_1') else 1 - right\n"
        "def strange(frames, prompt, row):\n"
        "    return 2 if 'height' in row['video_id'] else 'B'\n"
    )
    flags = f"--data {toy} --fn plug_in:"
    call(f"{flags}answer --baseline blind,frame --out run")
    assert macro_of()["pair"] == 100.0
    assert macro_of("blind")["pair"] == macro_of("frame")["pair"] == 0.0
    call(f"{flags}half --out half")
    for values in groups_of("model", "half").values():
        assert (values["pair"], values["single"]) == (0.0, 50.0)
    # what is neither a text nor 0 or 1 is an error, never an answer
    printed = refused(capsys, MVP, f"{flags}strange --out strange", code=1)
    assert "8 questions have no answer" in printed
    assert "0 or 1" in Path("strange/answers.rank0.jsonl").read_text()


# ------------------------------------------------------------------------------------- an endpoint

KEY = "sk-a-key-that-nobody-may-see"
OVERLOADED = (503, "overloaded", {"Retry-After": "0"})
HANG = (200, '{"choices": [{"mess', {"Content-Length": "99"})
HALF = (*HANG[:2], {**HANG[2], "Connection": "close"})


@pytest.fixture
def ask(toy, monkeypatch, capsys):
    """ask(reply, *flags): run against a server of its own; (the server, what was printed)."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)  # retries follow at once

    def ask(reply, *flags, code=None, listing=None):
        with StandIn(reply, listing) as server:
            data = f"--data {toy} --endpoint {server.url} --baseline none --out run"
            call(data, *flags, code=code)
        printed = "".join(capsys.readouterr())
        written = [file.read_bytes() for file in Path("run").glob("*.*")]
        assert KEY not in printed and KEY.encode() not in b"".join(written)
        return server, printed

    return ask


def test_everything_is_answered_once_whatever_goes_wrong(ask):
    """Two tries fail, each in another way; a second run asks nothing, not even /models."""
    faults = [None, HALF, HANG, OVERLOADED, (429, "slow", {"Retry-After": "0"})]
    faults = itertools.cycle([*faults, (500, f"{KEY}?"), (200, '{"error": "overloaded"}')])

    def reply(body, nth):
        if nth < 2:
            return next(faults)
        parts = [{"text": part} for part in re.split("(?<=: )", solve_request(body))]
        return {"message": {"content": parts}}

    server, _ = ask(reply, "--timeout 3")
    said = server.asked.values()
    assert len(said) == 32 and all(tries[2:] == ["answered"] for tries in said)
    assert server.keys == {f"Bearer {KEY}"}
    assert server.bodies[0]["model"] == "stand-in"
    assert len(server.bodies[0]["messages"][0]["content"]) == 16 + 1  # frames and a text
    server, _ = ask(reply, "--resume", listing=OVERLOADED)
    assert not server.asked and len(lines_of("run/answers.rank0.jsonl")) == 32
    assert macro_of()["pair"] == 100.0


SAID = {  # (kind of reply, how often it is asked for): a choice, or status and text -> what is kept
    ("ok", 1): """
{"message": {"content": null}, "finish_reason": "stop"} -> |stop
{"message": {"content": null, "refusal": "I cannot"}} -> I cannot|
{"message": {"content": "I"}, "finish_reason": "content_filter"} -> I|content_filter
{"message": {"content": null}, "finish_reason": "SAFETY"} -> |content_filter
{"message": {}, "finish_reason": "error", "error": {"code": "content_filter"}} -> |content_filter
200 {"error": {"code": "content_filter", "message": "The prompt was filtered"}} -> |content_filter
400 {"error": {"code": "content_filter", "message": "The prompt was filtered"}} -> |content_filter
403 {"error": "flagged by moderation"} -> |content_filter
""",
    ("error", 2): """
{"message": {"content": ""}, "finish_reason": "error"} -> error
{"message": {"content": "Answer: A"}, "finish_reason": "abort"} -> abort
{"message": {"content": "Answer: A"}, "error": {"message": "upstream died"}} -> upstream died
{"message": {"content": null}, "finish_reason": null} -> null
{"message": {"content": {}}, "finish_reason": "stop"} -> {}
{} -> [{}]
200 [] -> []
200 <!DOCTYPE html><html><title>Welcome</title></html> -> <!DOCTYPE
408 too slow -> too slow
""",
    ("error", 1): """
400 bad picture -> bad picture
400 maximum context length is 4096; max_tokens is 1024 -> fewer --frames
413 too large -> --size
""",
    # no question will be answered: what to change
    ("refused", 1): """
401 Incorrect API key provided: <key> -> OPENAI_API_KEY
404 model stand-in does not exist -> --model
302 moved -> redirects
400 At most 8 image(s) may be provided in one request -> --limit-mm-per-prompt
500 Too many images in request -> --frames
400 Unsupported parameter: 'max_tokens' is not supported -> --extra
422 {"detail": [{"loc": ["body", "seed"], "msg": "extra fields"}]} -> --extra
""",
}


@pytest.mark.usefixtures("ask")
def test_a_reply_is_an_answer_a_failure_or_a_refusal():
    """A failure is asked again and never an answer."""
    for (kind, tries), lines in SAID.items():
        for said, kept in rows_of(lines.replace("<key>", KEY)):
            status, _, text = said.partition(" ")
            reply = (int(status), text) if status.isdigit() else json.loads(said)
            with StandIn(lambda body, nth, reply=reply: reply) as server:
                config = Config(endpoint=server.url, retries=1)
                row = mvp_eval.Endpoint(config).ask("m", "Which?", [], "")
            assert (row.pop("status"), len(server.bodies)) == (kind, tries), said
            assert KEY not in str(row)
            found = "|".join(row.values())
            assert found == kept if kind == "ok" else kept in found, said


def test_failed_questions_are_asked_again_and_only_those(ask):
    """What was filtered, cut off or chatter is an answer, and the report warns of it."""

    def reply(body, nth):
        prompt = body["messages"][0]["content"][-1]["text"]
        if "as high" in prompt:
            return (400, "bad picture", {})
        if "many balls" in prompt:
            return "I see a banana."
        finish = "length" if "same side" in prompt else "content_filter"
        return {"message": {"content": None}, "finish_reason": finish}

    server, printed = ask(reply, code=1)
    assert "8 questions have no answer" in printed and "--resume" in printed
    found = groups_of()
    assert len(server.bodies) == 32
    counts = [found["macro"][name] for name in ("errors", "unparsed", "differ", "pair")]
    assert counts == [8, 16, 8, 0.0]
    warnings = Path("run/report.md").read_text()
    assert "8 replies were cut off at --max-tokens" in warnings
    assert "8 replies were stopped by a content filter" in warnings
    assert "16 replies have no text" in warnings
    server, _ = ask(solve_request, "--resume")
    assert len(server.bodies) == 8 and groups_of()["robot_object_interactions"]["pair"] == 100.0


def test_what_cannot_go_on_stops_and_keeps_its_answers(ask):
    server, printed = ask(lambda *_: (404, "", {}), code=2)
    assert len(server.bodies) == 1 and "--out run --resume" in printed
    _, printed = ask(lambda *_: OVERLOADED, "--retries 1 --resume", code=3)
    assert "20 questions in a row" in printed and "--out run --resume" in printed
    with full_disk(16000):
        _, printed = ask(solve_request, "--resume", code=1)
    assert "disk is full" in printed and "--resume" in printed
    kept = len(mvp_eval.load_answers("run"))
    server, _ = ask(solve_request, "--resume")
    assert kept and len(server.bodies) == 32 - kept and macro_of()["pair"] == 100.0


def test_what_models_says_is_told_apart(ask):
    with StandIn() as thief:
        said = [
            ((401, f"bad key {KEY}"), "refuses the key"),
            ((404, "Not Found"), "no such path"),
            ((503, "Loading model"), "Loading model. Start the server, or wait"),
            ((200, "<!DOCTYPE html>", {"Content-Type": "text/html"}), "text/html: <!DOCTYPE html>"),
            ((200, '{"data": []}'), "--model"),
            ((307, "", {"Location": f"{thief.url}/models"}), "redirects"),
        ]
        for listing, hint in said:
            _, printed = ask(None, "--resume", code=2, listing=listing)
            assert "/models" in printed and hint in printed
    assert not thief.keys, "another host got the key"
    _, printed = ask(None, "--model m --endpoint http://127.0.0.1:9/v1 --resume", code=2)
    assert "Start the server" in printed
    ask(solve_request, "--limit 1 --model m --resume", listing=OVERLOADED)
    assert lines_of("run/log.jsonl")[-1]["model"] == "m"


def test_whole_files_go_through_a_proxy(ask, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    with StandIn() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        ask(None, "--limit 1 --video-url --baseline frame --endpoint http://far.away.invalid/v1")
    parts = [body["messages"][0]["content"][0] for body in proxy.bodies]
    urls = [part["video_url"]["url"][:22] for part in parts if part["type"] == "video_url"]
    assert urls == ["data:video/mp4;base64,"] * 8 and len(parts) == 16


def test_killed_runs_lose_nothing_and_repeat_nothing(ask, toy):
    """Ended by SIGTERM, which names the command, then by kill -9; at last on two ranks."""

    def reply(body, nth):
        time.sleep(0.2)
        return solve_request(body)

    with StandIn(reply) as server:
        flags = f"--data {toy} --endpoint {server.url} --baseline none --concurrency 4 --out run"
        for number, goal, code in ((signal.SIGTERM, 6, 0), (signal.SIGKILL, 18, -9)):
            process = start("mvp_eval.py", flags, "--resume")
            wait_for_rows("run", goal, process)
            process.kill(number)
            printed = process.printed(timeout=30)
            assert process.code() == code and KEY not in printed
            assert ("--out run --resume" in printed) == (code == 0)
            with open("run/answers.rank0.jsonl", "a") as torn:
                torn.write('{"key": "torn')
        run_several(f"mvp_eval {flags} --resume", ranks=2)
    rest, _ = ask(solve_request, "--resume")
    rows = [lines_of(f"run/answers.rank{rank}.jsonl") for rank in (0, 1)]
    keys = [row["key"] for row in sum(rows, [])]
    assert len(set(keys)) == len(keys) == 32, "an answer was lost, or asked for twice"
    assert rows[1] and not rest.bodies and macro_of()["pair"] == 100.0


def test_work_in_flight_is_bounded():
    taken = []
    items = (taken.append(i) for i in range(40))
    with mvp_eval.ThreadPoolExecutor(3) as pool:
        results = mvp_eval.in_flight(pool, str, items, 3)
        ahead = [len(taken) - done for done, _ in enumerate(results)]
    assert len(ahead) == 40 and max(ahead) <= 3


def test_compare_runs_on_shared_pairs(capsys):
    questions = golden_questions()
    for out, letters in {"right": "AB", "a": "AA", "some": "AB"}.items():
        lines = []
        for q in questions[: 3 if out == "some" else None]:
            row = {**vars(q), "key": str(q), "pair": q.pair, "status": "ok", "system": "model"}
            row["reply"] = letters[q.answer_idx]
            lines.append(json.dumps(row))
        Path(out).mkdir()
        Path(out, "answers.rank0.jsonl").write_text("\n".join(lines))
    call("compare right a")
    printed = capsys.readouterr().out
    assert "all: 25 pairs, 100.0% - 0.0% = +100.0% [+100.0%, +100.0%], McNemar p 6e-08" in printed
    call("compare a a")
    assert "+0.0% [+0.0%, +0.0%], McNemar p 1\n" in capsys.readouterr().out
    call("compare right some")  # half a pair does not count
    assert "all: 1 pairs" in capsys.readouterr().out
    assert "no pair" in refused(capsys, MVP, "compare nowhere some")


# ------------------------------------------------------------------------------------ users' files

PROBLEMS = """
{"answer": "Put the bag — on the chair"} -> answer must have 2
{"video_path": "star/C311X.mp4"} -> video_path must have 2
{"video_id": "star_x_001_1"} -> video_id must have 2
{"question": "What?"} -> question must have 1
{"candidates": "['Took the bag – from the chair', '']"} -> candidates must have 1
{"video_id": "alone_2"} -> 1 rows share its id
{"answer": "z"} -> answer='z'
{"candidates": "['z']", "answer": "z"} -> candidates=('z',)
{"question": null} -> question=''
{"video_path": "star/../../a.mp4"} -> a path below
"""  # how the second row of a pair is changed -> what is said of the pair


def test_invalid_pairs_are_named_and_left_out_on_request(capsys):
    rows = lines_of(GOLDEN / "annotations" / "temporal_reasoning" / "mini.jsonl")[:4]
    path = Path("d/temporal_reasoning/mini.jsonl")
    path.parent.mkdir(parents=True)
    flags = "--data d --baseline oracle"
    for changed, reason in rows_of(PROBLEMS):
        lines = [*rows[:3], {**rows[3], **json.loads(changed)}]
        path.write_text("\n".join(map(json.dumps, lines)))
        printed = refused(capsys, MVP, flags)
        assert reason in printed and "--allow-missing" in printed
    assert not Path("runs").exists(), "a folder was left behind"
    flags += " --allow-missing"
    call(f"{flags} --out run")
    assert macro_of("oracle")["pairs"] == 1
    path.write_text(json.dumps(rows[0]))
    assert "1 of 1 pairs" in refused(capsys, MVP, flags)
    path.write_text('{"video_id": ')
    assert "cannot read the annotations" in refused(capsys, MVP, flags)


def test_missing_and_broken_videos(toy, ask, capsys):
    shutil.copytree(toy / "videos", "videos")
    gone = "toy_turn/s000_00.mp4"
    Path("videos", gone).unlink()
    shutil.copy(GOLDEN / "clips" / "truncated.mp4", "videos/toy_count/s001_00.mp4")
    flags = f"--data {toy} --videos videos"
    printed = refused(capsys, MVP, f"{flags} --baseline frame")
    assert "1 of 16 pairs" in printed and gone in printed and "--check" in printed
    call(flags)  # looks at no video
    call(f"--data {toy} --check")
    call(f"{flags} --check", code=1)
    printed = capsys.readouterr().out
    assert gone in printed and "toy_count/s001_00.mp4: " in printed
    assert "{'toy_count': 1, 'toy_turn': 1} of 32" in printed
    ask(solve_request, "--videos videos --allow-missing", code=1)
    found = macro_of()
    assert (found["pairs"], found["errors"]) == (15, 1)
    assert "1 of 16 pairs are left out" in Path("run/report.md").read_text()
    assert "video toy_count/s001_00.mp4" in Path("run/answers.rank0.jsonl").read_text()


def test_annotations_are_downloaded_page_by_page_once(monkeypatch, capsys):
    asked = []

    def open_page(url, timeout):
        asked.append(url)
        if len(asked) % 3 == 0:
            raise OSError("connection reset")
        [(subset, split, offset)] = re.findall(r"pairs&config=(\w+)&split=(\w+)&offset=(\d+)", url)
        rows = lines_of(GOLDEN / "annotations" / subset / f"{split}.jsonl")
        page = [{"row": row} for row in rows[int(offset) :][:4]]
        return io.BytesIO(json.dumps({"rows": page, "num_rows_total": len(rows)}).encode())

    monkeypatch.setenv("DATA", "data")
    monkeypatch.setattr(time, "sleep", print)
    monkeypatch.setattr(mvp_eval.urllib.request, "urlopen", open_page)
    call("--data hub --limit 4 --out run")
    assert macro_of("first")["pairs"] == 16
    assert mvp_eval.read_annotations(Path("data/mvp"), "mini") == golden_questions()
    monkeypatch.setattr(mvp_eval.urllib.request, "urlopen", mock.Mock(side_effect=OSError))
    call("--data hub --out again")
    assert "by hand" in refused(capsys, MVP, "--data hub --split full")


REFUSED = """
--frames 0 -> --frames
--endpoint http://localhost/v1 --fn a:b -> --endpoint
--fn json:dumps --video-url -> --video-url
--extra [1] -> JSON object
--extra { -> JSON object
--baseline blind -> --endpoint or --fn
--baseline longst -> longest
--endpoint localhost:8000 -> expected http
--endpoint http://me:secret@localhost/v1 -> OPENAI_API_KEY
--endpoint http://localhost/v1?key=secret -> OPENAI_API_KEY
--endpoint http://localhost/v1 --api-key-env MY_KEY -> $MY_KEY
--fn nowhere:f -> module:function
--fn json:nothing -> module:function
--data nothing -> no annotations
compare some -> unrecognized arguments: compare
"""  # flags -> what the refusal names


def test_flags_that_cannot_work_are_refused(toy, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret with a blank")
    for flags, hint in rows_of(REFUSED):
        printed = refused(capsys, MVP, flags)
        assert hint in printed and "secret" not in printed, printed
    assert not Path("runs").exists()
    call(f"--data {toy} --out used")
    assert "--resume" in refused(capsys, MVP, f"--data {toy} --out used")
