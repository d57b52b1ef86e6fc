"""mvp_eval.py: parity with the official code, the toy set, a misbehaving server, users' files."""

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import run, start
from PIL import Image
from stand_in import StandIn, solve_request

import mvp_eval
from mvp_eval import SUBSETS, Config

GOLDEN = Path(__file__).parent / "golden" / "mvp_eval"


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def golden_questions():
    return mvp_eval.read_annotations(GOLDEN / "annotations", "mini")


def lines_of(path):
    """The objects of a jsonl file; blank and torn lines are skipped."""
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.endswith("}")]


# ------------------------------------------------------------------ parity with the official code


def test_prompts_and_answers_of_annotations():
    questions = {(q.subset, q.video_id): q for q in golden_questions()}
    assert len(questions) == 50
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
    questions = {(q.subset, q.video_id): q for q in golden_questions()}
    for case in lines_of(GOLDEN / "predictions.jsonl"):
        q = questions[case["subset"], case["video_id"]]
        official = mvp_eval.parse_official(case["reply"])
        strict = mvp_eval.parse_strict(case["reply"], q.candidates)
        assert (official, strict) == (case["official_idx"], case["strict_idx"])
        assert int(official == q.answer_idx) == case["official_rating"]
        assert int(strict == q.answer_idx) == case["strict_rating"]


def golden_guesses():
    """questions [2 P], guesses [P, 2, 2] from the replies of predictions.jsonl."""
    questions = golden_questions()
    rows = {(r["subset"], r["video_id"]): r for r in lines_of(GOLDEN / "predictions.jsonl")}
    rows = [{**rows[q.subset, q.video_id], "candidates": q.candidates} for q in questions]
    return questions, mvp_eval.parse_rows(rows)


def test_accuracies_and_intervals():
    questions, guesses = golden_guesses()
    assert [q.pair for q in questions[::2]] == [q.pair for q in questions[1::2]]
    expected = golden("aggregate.json")
    found = mvp_eval.score(questions, guesses, 0)
    assert expected["bootstrap"]["order"] == list(SUBSETS)
    assert found.keys() == {"macro", *SUBSETS, *expected["sources"]}
    official = {"macro": expected["group"], **expected["sources"]}
    strict = {"macro": expected["strict"]["group"], **expected["strict"]["sources"]}
    for subset in SUBSETS:
        official[subset] = expected["tasks"][f"mvp_mini_{subset}"]
        strict[subset] = expected["strict"]["tasks"][f"mvp_mini_{subset}"]
        assert found[subset]["unparsed"] == official[subset]["n_unparsed"]
    for name, values in found.items():
        for key in ("pair", "single"):
            assert values[key] == pytest.approx(official[name][f"{key}_accuracy"], abs=1e-9)
            wanted = strict[name][f"{key}_accuracy"]
            assert values[f"strict_{key}"] == pytest.approx(wanted, abs=1e-9)
        if "n_pairs" in official[name]:
            assert values["pairs"] == official[name]["n_pairs"]
    for name, interval in expected["bootstrap"]["official"].items():
        ours = found["macro" if name == "group" else name]
        np.testing.assert_allclose(ours["pair_ci"], interval, atol=1e-9)
        interval = expected["bootstrap"]["strict"][name]
        np.testing.assert_allclose(ours["strict_pair_ci"], interval, atol=1e-9)


def test_submissions(tmp_path):
    questions, guesses = golden_guesses()
    mvp_eval.write_submissions(tmp_path / "s", questions, guesses[:, :, 0].ravel(), "mini")
    files = sorted((GOLDEN / "submissions").iterdir())
    assert [f.name for f in sorted((tmp_path / "s").iterdir())] == [f.name for f in files]
    for file in files:
        assert lines_of(tmp_path / "s" / file.name) == lines_of(file)


def test_frame_indices():
    cases = np.load(GOLDEN / "frame_indices.npz")
    kept = [
        key
        for key in cases.files
        if key.split("/")[1] in ("uniform", "segments", "center", "qwen2vl")
    ]
    for key in kept:
        settings, rule = key.split("/")
        total, rate, n = (part.lstrip("Tfpsn") for part in settings.split("_"))
        found = mvp_eval.frame_indices(rule, int(total), float(Fraction(rate)), int(n))
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, cases[key], err_msg=key)
    assert len(kept) >= 36
    with pytest.raises(ValueError):
        mvp_eval.frame_indices("qwen2vl", 1, 24.0, 16)


def test_request_bodies():
    case = golden("payloads.json")
    question = next(q for q in golden_questions() if q.video_id == case["video_id"])
    prompt = mvp_eval.make_prompt(question)
    images = [f"<FRAME {i}>" for i in range(case["n_frames"])]
    assert mvp_eval.make_payload(Config(), "some-model", prompt, images) == case["default"]
    blind = mvp_eval.make_payload(Config(), "some-model", prompt)
    content = [{"type": "text", "text": prompt}]
    assert blind == {**case["default"], "messages": [{"role": "user", "content": content}]}
    extra = '{"top_k": 1, "temperature": 0.5, "seed": null, "max_tokens": null, "max_completion_tokens": 9}'
    body = mvp_eval.make_payload(Config(extra=extra, frame_labels=True), "m", prompt, images[:2])
    assert body.keys() == {"model", "messages", "top_k", "temperature", "max_completion_tokens"}
    assert body["top_k"] == 1 and body["temperature"] == 0.5
    parts = body["messages"][0]["content"]
    assert [p.get("text", "image") for p in parts] == [
        "Frame 1:",
        "image",
        "Frame 2:",
        "image",
        prompt,
    ]


@pytest.mark.parametrize("name", ["h264_bframes.mp4", "vp9.webm", "mpeg4.avi"])
def test_decoding_gives_the_frames_that_were_asked_for(name):
    clip = golden("clips/clips.json")[name]
    for n, expected in clip["expect"].items():
        images, indices = mvp_eval.decode(GOLDEN / "clips" / name, "uniform", int(n))
        assert indices == expected and len(images) == len(expected)
        for image, i in zip(images, indices, strict=True):
            grey = clip["gray_first"] + clip["gray_step"] * i
            assert abs(np.asarray(image, float) - grey).max() <= 2


# ----------------------------------------------------------------------------------- the toy pairs


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder of toy pairs: 3 scenes, 48 pairs."""
    folder = tmp_path_factory.mktemp("toy")
    mvp_eval.write_toy(folder, 3, 0)
    return folder


@pytest.fixture(scope="module")
def distinct(toy, tmp_path_factory):
    """Those toy pairs that share no clip, so that no two questions are one request: 24 pairs."""
    folder = tmp_path_factory.mktemp("distinct")
    for name in SUBSETS:
        lines = (toy / name / "mini.jsonl").read_text().splitlines()
        lines = [line for line in lines if "_p0_" in line or "_p3_" in line]
        (folder / name).mkdir()
        (folder / name / "mini.jsonl").write_text("\n".join(lines))
    return folder


def report_of(out):
    return json.loads((Path(out) / "report.json").read_text())


def macro_of(out, system="model"):
    return report_of(out)["systems"][system]["macro"]


def call(*flags):
    """The command line, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        mvp_eval.main(list(map(str, flags)))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(capsys, *flags, code=2):
    """Expect the command line to leave with `code`, and return the one line of its error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    printed = capsys.readouterr().err
    assert stop.value.code == code and printed.count("error: ") == 1, printed
    line = printed[printed.index("error: ") :]
    assert line.count("\n") == 1, printed
    return line


def test_toy_pairs_are_minimal_and_no_shortcut_works(capsys):
    """The default run: each baseline as the paper argues, a coin within four sigma, and the files."""
    call("--scenes", 2, "--seed", 3)
    systems = report_of("runs/mvp_eval")["systems"]
    printed = capsys.readouterr().out
    for name in ("first", "longest", "frame"):
        for values in systems[name].values():
            assert (values["pair"], values["single"]) == (0.0, 50.0), name
    assert systems["oracle"]["macro"]["pair"] == systems["oracle"]["macro"]["single"] == 100.0
    coin = systems["random"]["macro"]
    assert coin["pairs"] == 32 and abs(coin["pair"] / 100 - 0.25) < 4 * (0.25 * 0.75 / 32) ** 0.5
    assert abs(coin["single"] / 100 - 0.5) < 4 * (0.25 / 2 / 32) ** 0.5
    assert (
        "oracle" in printed and "human (full)" in printed and "64 questions = 32 pairs" in printed
    )
    assert Image.open("runs/mvp_eval/picture.png").size[0] == 1000
    assert "frame, macro" in Path("runs/mvp_eval/report.md").read_text()


def test_toy_set_is_balanced_and_its_centre_frames_say_nothing(toy):
    questions = mvp_eval.read_annotations(toy, "mini")
    root = toy / "videos"
    chosen, warnings = mvp_eval.choose_questions(questions, root, True, Config())
    assert len(chosen) == 96 and not warnings
    pairs = list(zip(chosen[::2], chosen[1::2], strict=True))
    for source, (subset, _, _) in mvp_eval.TOY.items():
        mine = [pair for pair in pairs if pair[0].source == source]
        assert {q.subset for pair in mine for q in pair} == {subset} and len(mine) == 12
        assert sum(pair[0].candidates == mvp_eval.CANDIDATES for pair in mine) == 6
    clips = {}
    for path in {q.video_path for q in questions}:
        images, _ = mvp_eval.decode(root / path, "uniform", 100)
        clips[path] = np.stack([np.asarray(image) for image in images])
    for a, b in pairs:
        first, second = clips[a.video_path], clips[b.video_path]
        assert first.shape == (25, 64, 64, 3) and (first != second).any()
        np.testing.assert_array_equal(first[12], second[12])


def test_a_function_that_looks_is_perfect_and_one_that_sees_half_gets_nothing(toy, capsys):
    """A solver through --fn: 100 %. Right on one row of each pair: 0 % of pairs, 50 % of rows."""
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
        "def broken(frames, prompt, row):\n"
        "    raise RuntimeError('no such layer')\n"
        "def strange(frames, prompt, row):\n"
        "    return 2 if row['video_id'].startswith('toy_height_s000') else 'B'\n"
    )
    call("--data", toy, "--fn", "plug_in:answer", "--baseline", "blind,frame", "--out", "perfect")
    assert macro_of("perfect")["pair"] == macro_of("perfect")["single"] == 100.0
    assert macro_of("perfect", "blind")["pair"] == macro_of("perfect", "frame")["pair"] == 0.0
    call("--data", toy, "--fn", "plug_in:half", "--out", "half")
    for values in report_of("half")["systems"]["model"].values():
        assert (values["pair"], values["single"]) == (0.0, 50.0)
    assert report_of("half")["systems"].keys() == {"model", "random", "first", "longest"}
    # what is neither a text nor 0 or 1 is an error, never an answer
    flags = ["--data", toy, "--fn", "plug_in:strange", "--out", "strange"]
    assert "8 questions have no answer" in refused(capsys, *flags, code=1)
    assert macro_of("strange")["errors"] == 8
    assert "0 or 1" in Path("strange/answers.rank0.jsonl").read_text()
    flags = ["--data", toy, "--fn", "plug_in:broken", "--out", "broken"]
    assert "no such layer" in refused(capsys, *flags, code=3)


# ------------------------------------------------------------------------------------- an endpoint

KEY = "sk-a-key-that-nobody-may-see"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def no_waiting(monkeypatch):
    """Retries follow at once."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)


def assert_key_is_nowhere(folder, printed):
    assert KEY not in printed
    for file in Path(folder).rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def answered_once(server, questions):
    """The last request with each body, and only the last, was served."""
    outcomes = server.outcomes()
    assert len(outcomes) == questions
    for asked in outcomes.values():
        assert asked[-1] == "ok" and asked.count("ok") == 1, asked


def test_endpoint_answers_everything_once_whatever_goes_wrong(
    distinct, toy, key, no_waiting, capsys
):
    """Up to three tries fail, in all ways; replies come in parts; a second run asks nothing."""
    retry = [
        (429, "slow", {"Retry-After": "0"}),
        (500, f"{KEY}?", {}),
        (503, "busy", {"Retry-After": "0"}),
    ]
    faults = ["hang", "cut", "half", "error", "garbage", "abort", *retry]
    plans, lock = {}, threading.Lock()

    def fault(body, nth):
        with lock:
            n = len(plans)
            plan = [faults[(n + i) % len(faults)] for i in range(n % 4)]
            plan = plans.setdefault(json.dumps(body), plan)
        return plan[nth] if nth < len(plan) and (plan[nth] != "hang" or n < 20) else None

    def answer(body):
        text = solve_request(body)
        return {"content": [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}]}

    flags = ["--data", distinct, "--videos", toy / "videos", "--out", "run", "--timeout", 3]
    with StandIn(answer, fault) as server:
        flags += ["--endpoint", server.url + "/", "--concurrency", 8, "--baseline", "none"]
        call(*flags)
        answered_once(server, 48)
        body = server.bodies[0]
        assert (
            body["model"] == "stand-in" and body["temperature"] == 0 and body["max_tokens"] == 1024
        )
        kinds = [part["type"] for part in body["messages"][0]["content"]]
        assert kinds == ["image_url"] * 16 + ["text"] and server.keys == {f"Bearer {KEY}"}
        seen = {str(fault) for outcomes in server.outcomes().values() for fault in outcomes} - {
            "ok"
        }
        assert seen == {str(fault) for fault in faults}
        before, server.models = len(server.asked), ("another",)
        call(*flags, "--resume")
        assert len(server.asked) == before, "a resumed run asked again"
    call(*flags, "--resume")  # without the server: everything is answered, so it reports
    assert (macro_of("run")["pair"], macro_of("run")["errors"]) == (100.0, 0)
    assert report_of("run")["model"] == "stand-in"
    rows = lines_of("run/answers.rank0.jsonl")
    assert len(rows) == 48 and all(row["status"] == "ok" for row in rows)
    assert_key_is_nowhere("run", "".join(capsys.readouterr()))
    lines = lines_of("run/submissions/mvp_mini_intuitive_physics_valid.jsonl")
    assert len(lines) == 12
    assert lines[0].keys() == {"data_name", "row_id", "model_answer", "task"}


HTML = "<!DOCTYPE html><html><title>Welcome</title></html>"
REFUSALS = {  # what the server says: (exit code, what the message names, most questions asked)
    (401, f"Incorrect API key provided: {KEY}"): (2, "OPENAI_API_KEY", 1),
    (404, "model stand-in does not exist"): (2, "--model", 1),
    (302, "moved"): (2, "redirects", 1),
    (400, "At most 8 image(s) may be provided in one request"): (2, "--limit-mm-per-prompt", 1),
    (500, "Too many images in request"): (2, "--frames", 1),
    (400, "Unsupported parameter: 'max_tokens' is not supported with this model"): (
        2,
        "--extra",
        1,
    ),
    (400, "'temperature' does not support 0 with this model"): (2, "--extra", 1),
    (422, '{"detail": [{"loc": ["body", "seed"], "msg": "extra fields not permitted"}]}'): (
        2,
        "--extra",
        1,
    ),
    (400, "maximum context length is 4096; max_tokens is 1024"): (3, "fewer --frames", 50),
    (413, "too large"): (3, "--size", 50),
    (500, "still loading"): (3, "20 questions in a row", 50),
    (200, HTML): (3, f"text/html: {HTML[:50]}", 50),
}


@pytest.mark.parametrize("said", REFUSALS, ids=lambda said: f"{said[0]} {said[1][:12]}")
def test_refusals_stop_at_once_and_say_what_to_do(said, distinct, toy, key, capsys, no_waiting):
    code, hint, most = REFUSALS[said]
    kind = {"Content-Type": "text/html"} if said[1] == HTML else {}
    with StandIn(fault=lambda body, nth: (*said, kind)) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--retries", 1, "--out", "run"]
        flags += ["--baseline", "none", "--endpoint", server.url]
        printed = refused(capsys, *flags, code=code)
        assert hint in printed and "--out run" in printed, printed
        assert len(server.outcomes()) <= most
        assert_key_is_nowhere("run", printed)


def test_extra_removes_a_field_that_a_server_refuses(distinct, toy):
    def fault(body, nth):
        return (400, "unknown field seed", {}) if "seed" in body else None

    with StandIn(solve_request, fault) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
        call(*flags, "--limit", 1, "--extra", '{"seed": null, "top_k": 1}', "--out", "run")
        assert macro_of("run")["pair"] == 100.0 and server.bodies[0]["top_k"] == 1


def test_what_models_says_is_told_apart(distinct, toy, capsys, key):
    said = {
        (401, f"bad key {KEY}"): ("refuses the key", "OPENAI_API_KEY"),
        (404, "Not Found"): ("/v1", "--model"),
        (503, "Loading model"): ("wait for it", "Loading model"),
        (200, HTML): ("text/html", "<!DOCTYPE html>"),
        (200, '{"data": []}'): ("/models", "--model"),
    }
    flags = ["--data", distinct, "--videos", toy / "videos", "--limit", 1, "--baseline", "none"]
    for number, (listing, hints) in enumerate(said.items()):
        kind = {"Content-Type": "text/html"} if listing[1] == HTML else {}
        with StandIn(solve_request, listing=(*listing, kind)) as server:
            printed = refused(capsys, *flags, "--endpoint", server.url, "--out", f"a{number}")
            assert all(hint in printed for hint in hints) and KEY not in printed, printed
            call(*flags, "--endpoint", server.url, "--model", "m", "--out", f"b{number}")
    printed = refused(capsys, *flags, "--endpoint", "http://127.0.0.1:9/v1", "--out", "c")
    assert "refused" in printed and "Start the server" in printed
    printed = refused(
        capsys, *flags, "--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--out", "d"
    )
    assert "Start the server" in printed


def test_the_proxy_variables_are_read(distinct, toy, monkeypatch):
    with StandIn(solve_request) as server:
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "")
        flags = ["--data", distinct, "--videos", toy / "videos", "--limit", 1, "--out", "run"]
        call(*flags, "--endpoint", "http://far.away.invalid/v1")
        assert len(server.asked) == 8 and macro_of("run")["pair"] == 100.0


NOTHING = {"content": None, "finish_reason": "stop"}
FILTERS = [
    {"content": "I", "finish_reason": "content_filter"},
    {"content": None, "finish_reason": "SAFETY"},
    {"content": None, "finish_reason": "error", "error": {"code": "content_filter"}},
]
AZURE = json.dumps({"error": {"code": "content_filter", "message": "The prompt was filtered"}})


@pytest.mark.parametrize(
    "reply", [NOTHING, {**NOTHING, "reasoning": "hm"}, {**NOTHING, "finish_reason": "length"}]
)
def test_a_reply_without_content_is_a_reply_without_a_letter(reply, distinct, toy):
    with StandIn(lambda body: dict(reply)) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
        call(*flags, "--limit", 2, "--out", "run")
        assert len(server.asked) == 16, "it was asked again"
        assert macro_of("run")["unparsed"] == 16 and macro_of("run")["errors"] == 0
        warnings = " ".join(report_of("run")["warnings"])
        assert "16 replies have no text" in warnings
        assert ("cut off at --max-tokens" in warnings) == (reply["finish_reason"] == "length")


def test_a_content_filter_is_one_thing_however_the_server_says_it(distinct, toy):
    said = [
        (400, AZURE, {}),
        (403, '{"error": {"message": "flagged by moderation"}}', {}),
        (200, AZURE, {}),
    ]

    def fault(body, nth):
        return said[len(server.asked) % 6] if len(server.asked) % 6 < 3 else None

    with StandIn(lambda body: dict(FILTERS[len(server.asked) % 3]), fault) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
        call(*flags, "--limit", 3, "--concurrency", 1, "--out", "run")
        assert len(server.asked) == 24 and macro_of("run")["errors"] == 0
    rows = lines_of("run/answers.rank0.jsonl")
    assert {row["finish_reason"] for row in rows} == {"content_filter"}
    assert macro_of("run")["unparsed"] == 24
    assert "24 replies were stopped by a content filter" in " ".join(report_of("run")["warnings"])


@pytest.mark.parametrize(
    "reply",
    [
        {"content": "", "finish_reason": "error"},
        {"content": "Answer: A", "finish_reason": "abort"},
        {"content": "Answer: A", "finish_reason": "stop", "error": {"message": "upstream died"}},
        {"content": None, "finish_reason": None},
    ],
)
def test_a_failure_inside_a_reply_is_no_answer(reply, distinct, toy, no_waiting, capsys):
    broken = {"on": True}

    def answer(body):
        return dict(reply) if broken["on"] else solve_request(body)

    with StandIn(answer) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
        flags += ["--limit", 2, "--baseline", "none", "--retries", 1, "--out", "run"]
        printed = refused(capsys, *flags, code=1)
        assert "16 questions have no answer" in printed and "--resume" in printed
        assert macro_of("run")["errors"] == 16 and len(server.asked) == 32
        broken["on"] = False
        call(*flags, "--resume")
        assert macro_of("run")["pair"] == 100.0


def test_what_failed_is_asked_again_and_only_that(distinct, toy, no_waiting, capsys):
    broken = {"on": True}

    def fault(body, nth):
        refuse = broken["on"] and "as high before" in body["messages"][0]["content"][-1]["text"]
        return (400, "bad picture", {}) if refuse else None

    with StandIn(solve_request, fault) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
        flags += ["--baseline", "none", "--limit", 3, "--out", "run"]
        assert "6 questions have no answer" in refused(capsys, *flags, code=1)
        systems = report_of("run")["systems"]["model"]
        assert (
            systems["robot_object_interactions"]["pair"] == 0.0 and systems["macro"]["errors"] == 6
        )
        assert systems["macro"]["pair"] == 75.0 and len(server.asked) == 24
        assert "bad picture" in Path("run/answers.rank0.jsonl").read_text()
        broken["on"] = False
        call(*flags, "--resume")
        assert macro_of("run")["pair"] == 100.0 and len(server.asked) == 30


def test_kill_and_resume_loses_nothing_and_repeats_nothing(distinct, toy, key, capsys):
    """kill -9 twice under 20 % failures: what is kept is not asked again, in the end all is there."""
    chance, lock = random.Random(1), threading.Lock()
    faults = [
        "cut",
        "half",
        "garbage",
        "abort",
        "error",
        "hang",
        (500, "oops", {"Retry-After": "0"}),
    ]
    faults += [(429, "slow down", {"Retry-After": "0"})] * 2

    def fault(body, nth):
        time.sleep(0.2)
        with lock:
            return chance.choice(faults) if chance.random() < 0.2 else None

    def recorded():
        file = Path("run/answers.rank0.jsonl")
        return lines_of(file) if file.exists() else []

    printed, kept = "", []
    with StandIn(solve_request, fault) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
        flags += [
            "--baseline",
            "none",
            "--out",
            "run",
            "--resume",
            "--timeout",
            3,
            "--concurrency",
            4,
        ]
        for goal in (8, 25):
            process = start("mvp_eval.py", *flags)
            while len(recorded()) < goal:
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            printed += process.communicate()[0]
            kept.append(recorded())
            with open("run/answers.rank0.jsonl", "ab") as file:
                file.write(b'{"key": "torn')  # as a crash of the machine would leave it
        call(*flags)
        printed += "".join(capsys.readouterr())
        outcomes = server.outcomes()
    rows = recorded()
    done = [row["key"] for row in rows if row["status"] == "ok"]
    assert len(done) == len(set(done)) == 48, "an answer was lost, or asked for twice"
    assert len(kept[0]) >= 8 and len(kept[1]) >= 25 and rows[: len(kept[1])] == kept[1]
    # only what was under way at a kill can have been served without having been kept
    served = sum(tries.count("ok") for tries in outcomes.values())
    assert len(outcomes) == 48 and 48 <= served <= 48 + 2 * 4
    assert macro_of("run")["pair"] == 100.0 and macro_of("run")["errors"] == 0
    assert_key_is_nowhere("run", printed)


def test_signals_end_a_run_at_once_and_name_the_command_that_resumes(distinct, toy):
    with StandIn(solve_request, lambda body, nth: time.sleep(0.4)) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
        process = start("mvp_eval.py", *flags, "--concurrency", 2, "--out", "run")
        while len(server.asked) < 12:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and "--out run --resume" in printed, printed
        assert 9 <= len(lines_of("run/answers.rank0.jsonl")) < 40


def test_two_ranks_share_the_pairs_and_make_one_report(distinct, toy):
    with StandIn(solve_request) as server:
        flags = [
            "--data",
            distinct,
            "--videos",
            toy / "videos",
            "--endpoint",
            server.url,
            "--out",
            "run",
        ]
        printed = run("mvp_eval.py", *flags, ranks=2)
        answered_once(server, 48)
        sides = [lines_of(f"run/answers.rank{rank}.jsonl") for rank in (0, 1)]
        assert len(sides[0]) == len(sides[1]) == 24
        assert macro_of("run")["pair"] == 100.0 and printed.count("human (full)") == 1
        call(*flags, "--resume")  # on one rank: all is there
        assert len(server.asked) == 48


def test_whole_files_are_sent_and_chatter_is_counted(distinct, toy, capsys):
    def answer(body):
        *parts, text = body["messages"][0]["content"]
        assert parts[0]["type"] in ("video_url", "image_url")
        if parts[0]["type"] == "image_url":
            return "B"
        assert parts[0]["video_url"]["url"].startswith("data:video/mp4;base64,")
        return "I see a banana."

    with StandIn(answer) as server:
        flags = [
            "--data",
            distinct,
            "--videos",
            toy / "videos",
            "--endpoint",
            server.url,
            "--limit",
            3,
        ]
        call(*flags, "--video-url", "--out", "run", "--baseline", "frame")
        assert macro_of("run")["unparsed"] == 0 and macro_of("run")["differ"] == 24
        assert macro_of("run")["single"] == 50.0 and macro_of("run")["strict_single"] == 0.0
        assert macro_of("run", "frame")["differ"] == 0
    assert "the official number is noise" in capsys.readouterr().out


def test_compare_runs_on_shared_pairs(distinct, toy, capsys):
    names = {
        "right": solve_request,
        "a": lambda body: "Answer: A",
        "none": lambda body: "Answer: ?",
    }
    for name, answer in names.items():
        with StandIn(answer) as server:
            flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
            call(*flags, "--baseline", "none", "--out", name)
    capsys.readouterr()
    call("compare", "right", "a")
    printed = capsys.readouterr().out
    assert "all: 24 pairs, 100.0% - 0.0% = +100.0% [+100.0%, +100.0%], McNemar p 1.2e-07" in printed
    assert printed.count("\n") == 5
    call("compare", "a", "a")
    assert "+0.0% [+0.0%, +0.0%], McNemar p 1\n" in capsys.readouterr().out
    lines = Path("a/answers.rank0.jsonl").read_text().splitlines()
    Path("some").mkdir()
    key = json.loads(lines[0])["video_id"][:-2]
    some = [line for line in lines if key in line] + lines[10:11]  # half a pair does not count
    Path("some/answers.rank0.jsonl").write_text("\n".join(some))
    call("compare", "right", "some")
    assert "all: 1 pairs" in capsys.readouterr().out
    assert "no pair" in refused(capsys, "compare", "nowhere", "some")
    assert "unrecognized arguments: compare" in refused(capsys, "compare", "some")


# ------------------------------------------------------------------------------------ users' files


def annotate(folder, subset, rows):
    """Write annotations: rows of (video_id, video_path, answer), or with a dict of changed fields."""
    (folder / subset).mkdir(parents=True, exist_ok=True)
    lines = []
    for video_id, path, answer, *changes in rows:
        row = {"video_id": video_id, "video_path": path, "question": "Which?", "answer": answer}
        row.update(
            candidates="['x', 'y']", source=path.split("/")[0], **(changes[0] if changes else {})
        )
        lines.append(json.dumps(row))
    (folder / subset / "mini.jsonl").write_text("\n".join(lines))


def test_invalid_pairs_are_named_and_left_out_on_request(tmp_path, capsys):
    a, b = ("star/1.mp4", "x"), ("star/2.mp4", "y")
    broken = {
        "1 rows share": [("p_1", *a)],
        "answer='z'": [("q_1", "star/1.mp4", "z"), ("q_2", *b)],
        "answer must have 2": [("r_1", *a), ("r_2", "star/2.mp4", "x")],
        "video_path must have 2": [("s_1", *a), ("s_2", "star/1.mp4", "y")],
        "question must have 1": [("t_1", *a), ("t_2", *b)],
        "candidates must have 1": [("u_1", *a), ("u_2", *b)],
        "candidates=('x',)": [("v_1", *a), ("v_2", *b)],
        "question=''": [("w_1", *a), ("w_2", *b)],
        "video_id must have 2": [("x_1", *a), ("x_1", *b)],
        "below": [("y_1", "star/../../a.mp4", "x"), ("y_2", *b)],
    }
    good = [("good_a_1", *a), ("good_a_2", *b)]
    for number, (reason, rows) in enumerate(broken.items()):
        annotate(tmp_path / "d", "temporal_reasoning", good + rows)
        path = tmp_path / "d" / "temporal_reasoning" / "mini.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        changes = {
            "question must": ("question", "What?"),
            "candidates must": ("candidates", "['y', 'x']"),
        }
        changes.update({"candidates=(": ("candidates", "['x']"), "question=": ("question", None)})
        for start_of, (name, value) in changes.items():
            if reason.startswith(start_of):
                lines[-1][name] = value
                if name == "candidates" and value == "['x']":
                    lines[-2][name] = value
        path.write_text("\n".join(map(json.dumps, lines)))
        flags = ["--data", tmp_path / "d", "--baseline", "first,oracle", "--out", f"out{number}"]
        printed = refused(capsys, *flags)
        assert reason in printed and "--allow-missing" in printed, printed
        assert not Path(f"out{number}").exists(), "a folder was left behind"
        call(*flags, "--allow-missing")
        assert macro_of(f"out{number}", "oracle")["pairs"] == 1
        assert macro_of(f"out{number}", "oracle")["pair"] == 100.0
    annotate(tmp_path / "d", "temporal_reasoning", [("p_1", *a)])
    assert "1 of 1 pairs" in refused(capsys, "--data", tmp_path / "d", "--allow-missing")
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "empty"):
        assert "no annotations" in refused(capsys, "--data", tmp_path / name)
    (tmp_path / "d" / "temporal_reasoning" / "mini.jsonl").write_text('{"video_id": ')
    assert "cannot read the annotations" in refused(capsys, "--data", tmp_path / "d")


def test_missing_and_broken_videos(distinct, toy, tmp_path, capsys, no_waiting):
    videos = tmp_path / "videos"
    shutil.copytree(toy / "videos", videos)
    call("--data", distinct, "--videos", videos, "--check")
    gone = "toy_turn/s000_00.mp4"
    (videos / gone).unlink()
    shutil.copy(GOLDEN / "clips" / "truncated.mp4", videos / "toy_count" / "s001_00.mp4")
    flags = ["--data", distinct, "--videos", videos]
    printed = refused(capsys, *flags, "--out", "a", "--baseline", "frame")
    assert "1 of 24 pairs" in printed and gone in printed and "--check" in printed
    with pytest.raises(SystemExit) as stop:
        call(*flags, "--check")
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and "{'toy_count': 1, 'toy_turn': 1} of 48" in printed
    assert gone in printed and "toy_count/s001_00.mp4: " in printed
    call(*flags, "--out", "text")  # which needs no videos
    with StandIn(solve_request) as server:
        flags += ["--endpoint", server.url, "--baseline", "none", "--allow-missing", "--out", "b"]
        assert "1 questions have no answer" in refused(capsys, *flags, code=1)
        report = report_of("b")
        assert macro_of("b")["pairs"] == 23 and macro_of("b")["errors"] == 1
        assert "1 of 24 pairs are left out" in report["warnings"][0]
        assert "video toy_count/s001_00.mp4" in Path("b/answers.rank0.jsonl").read_text()


def test_annotations_are_downloaded_page_by_page_once(tmp_path, monkeypatch, capsys):
    rows = {name: lines_of(GOLDEN / "annotations" / name / "mini.jsonl") for name in SUBSETS}
    asked = []

    def open_page(url, timeout):
        asked.append(url)
        if len(asked) % 3 == 0:
            raise OSError("connection reset")
        query = dict(part.split("=") for part in url.split("?")[1].split("&"))
        assert query["split"] == "mini" and query["dataset"] == "facebook/minimal_video_pairs"
        mine, offset = rows[query["config"]], int(query["offset"])
        page = [{"row": row} for row in mine[offset : offset + 4]]
        return io.BytesIO(json.dumps({"rows": page, "num_rows_total": len(mine)}).encode())

    monkeypatch.setattr(mvp_eval.urllib.request, "urlopen", open_page)
    mvp_eval.download_annotations(tmp_path / "mvp", "mini", pause=0)
    assert mvp_eval.read_annotations(tmp_path / "mvp", "mini") == golden_questions()
    count = len(asked)
    monkeypatch.setenv("DATA", str(tmp_path))
    call("--data", "hub", "--baseline", "first,longest,random,oracle", "--out", "run", "--limit", 4)
    assert len(asked) == count and macro_of("run", "first")["pairs"] == 16

    def down(url, timeout):
        raise OSError("down")

    monkeypatch.setattr(mvp_eval.urllib.request, "urlopen", down)
    with pytest.raises(SystemExit):
        mvp_eval.download_annotations(tmp_path / "other", "mini", pause=0)
    assert "by hand" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_rotated_and_damaged_files(tmp_path):
    """Phones turn frames by metadata; packets that are damaged cost their frames only."""
    half = np.zeros((32, 48, 3), np.uint8)
    half[:, :24] = 255  # white on the left
    mvp_eval.write_video(tmp_path / "a.mp4", np.stack([half] * 20))
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44
    turned = [0, 1 << 16, 0, (1 << 32) - (1 << 16), 0, 0, 0, 0, 1 << 30]  # a quarter turn clockwise
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    (tmp_path / "turned.mp4").write_bytes(data)
    image = mvp_eval.decode(tmp_path / "turned.mp4", "center", 1)[0][0]
    assert image.size == (32, 48)
    assert np.asarray(image)[:20].min() > 200 and np.asarray(image)[28:].max() < 50
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    begin = data.index(b"mdat") + 4
    packet = (len(data) - begin) // 24
    for i in range(begin + 8 * packet, begin + 9 * packet):
        data[i] ^= 0x5A
    (tmp_path / "damaged.mp4").write_bytes(data)
    images, indices = mvp_eval.decode(tmp_path / "damaged.mp4", "uniform", 100)
    assert 15 <= len(images) == len(indices) <= 20
    (tmp_path / "text.mp4").write_text("no video")
    for path in (GOLDEN / "clips" / "truncated.mp4", tmp_path / "text.mp4", tmp_path / "none.mp4"):
        with pytest.raises(mvp_eval.VIDEO_ERRORS):
            mvp_eval.decode(path, "center", 1)


def test_frames_are_shrunk_and_never_enlarged(toy):
    path = next((toy / "videos").rglob("*.mp4"))
    images, indices = mvp_eval.decode(path, "uniform", 4, 48)
    assert indices == [0, 8, 16, 24] and images[0].size == (48, 48)
    assert mvp_eval.decode(path, "uniform", 4, 448)[0][0].size == (64, 64)
    text = mvp_eval.load_jpegs(path, "uniform", 4, 48)[0]
    picture = Image.open(io.BytesIO(mvp_eval.base64.b64decode(text)))
    assert picture.format == "JPEG" and picture.size == (48, 48)


def test_flags_that_cannot_work_are_refused(capsys, monkeypatch, toy):
    url = "http://localhost:1/v1"
    cases = {
        ("--endpont", url): "--endpont",
        ("--preset", "qwen"): "toy",
        ("--sampling", "random"): "uniform",
        ("--split", "train"): "mini",
        ("--frames", 0): "--frames",
        ("--timeout", -1): "--timeout",
        ("--endpoint", url, "--fn", "a:b"): "--endpoint",
        ("--fn", "json:dumps", "--video-url"): "--video-url",
        ("--extra", "[1]"): "JSON object",
        ("--extra", "{"): "JSON object",
        ("--baseline", "blind"): "--endpoint or --fn",
        ("--baseline", "longst"): "longest",
        ("--baseline", "none"): "longest",
        ("--endpoint", "localhost:8000"): "expected http",
        ("--endpoint", "http://me:secret@localhost/v1"): "OPENAI_API_KEY",
        ("--endpoint", "http://localhost/v1?key=secret"): "OPENAI_API_KEY",
        ("--fn", "nowhere:f"): "module:function",
        ("--fn", "json:nothing"): "module:function",
    }
    for flags, hint in cases.items():
        printed = refused(capsys, *flags)
        assert hint in printed and "secret" not in printed, printed
    assert not Path("runs").exists()
    monkeypatch.setenv("MY_KEY", "sk-with a blank")
    printed = refused(capsys, "--endpoint", url, "--api-key-env", "MY_KEY")
    assert "$MY_KEY" in printed and "sk-with" not in printed
    call("--data", toy, "--baseline", "first", "--out", "used")
    assert "--resume" in refused(capsys, "--data", toy, "--out", "used")


def test_a_full_disk_is_told_and_torn_lines_are_ignored(distinct, toy, capsys):
    file = Path("run/answers.rank0.jsonl")
    file.parent.mkdir()
    rows = [
        {"key": "k", "status": "ok", "n": 1},
        {"key": "k", "status": "error"},
        {"key": "e", "status": "error"},
    ]
    file.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows) + b'\n{"key": "torn\xff')
    assert mvp_eval.load_answers("run") == {"k": rows[0]}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StandIn(solve_request) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        try:
            printed = refused(capsys, *flags, "--out", "full", code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "disk is full" in printed and "--resume" in printed
        assert mvp_eval.load_answers("full")
        call(*flags, "--out", "full", "--resume")
        assert macro_of("full")["pair"] == 100.0


def test_parsers_beyond_the_recorded_cases():
    options = ("Yes, all is normal", "No, something is odd")
    official = {"banana": 0, "__A__": None, "Ａ": None, "(A) x\n(B) y": 1, "assistant: b": 1}
    assert {reply: mvp_eval.parse_official(reply) for reply in official} == official
    strict = {
        "<thinking>A</thinking> (B)": 1, "<answer>A</answer> <answer>B</answer>": 1, "A and B": None,
        "Answer: A\nAnswer: B": 1, "The correct option is B": 1, "(A) or (B)?": None, "B)": 1,
        "Best choice - (a)": 0, "A because it falls": 0, "Reasons...\nB": 1, "[B] it is": 1, "no": 1,
        "Yes!": 0, "yes all is normal": 0, "Nothing fits": None, "answering B": None, 7: None, None: None,
        "": None, "***": None, "???": None,
    }  # fmt: skip
    assert {reply: mvp_eval.parse_strict(reply, options) for reply in strict} == strict
    # replies of nothing but blanks, as degenerate models give them, stall neither parser
    blanks = "answer" + " " * 200_000
    assert mvp_eval.parse_official(blanks) is None
    assert mvp_eval.parse_strict(blanks + "x", options) is None
    assert mvp_eval.parse_strict("answer is" + "\n \n" * 50_000 + "b", options) == 1


def test_work_in_flight_is_bounded_and_begins_with_one():
    taken, results, together = [], [], []

    def items():
        for i in range(40):
            taken.append(i)
            yield i

    def work(i):
        together.append(len(taken))
        time.sleep(0.01 * (i % 3))
        return i

    with mvp_eval.ThreadPoolExecutor(3) as pool:
        for result in mvp_eval.in_flight(pool, work, items(), 3):
            results.append(result)
            assert len(taken) - len(results) <= 3
    assert sorted(results) == list(range(40)) and results[0] == 0 and together[0] == 1


def test_malformed_replies_raise_and_well_formed_ones_do_not():
    choice = {"message": {"content": "A"}, "finish_reason": "stop"}
    bad = [
        [],
        {},
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        "text",
        None,
        7,
    ]
    bad += [
        {"error": "x", "choices": [choice]},
        {"choices": [{**choice, "finish_reason": "error"}]},
    ]
    bad += [{"choices": [{**choice, "message": {"content": value}}]} for value in (3, [3], {})]
    for body in bad:
        with pytest.raises(mvp_eval.MALFORMED):
            mvp_eval.read_reply(body)
    assert mvp_eval.read_reply({"choices": [choice]})["reply"] == "A"
    refusal = {"message": {"content": None, "refusal": "I cannot"}, "finish_reason": "stop"}
    assert mvp_eval.read_reply({"choices": [refusal]})["reply"] == "I cannot"
    assert mvp_eval.read_reply({"choices": [{"message": {"content": "B"}}]})["reply"] == "B"


def test_a_redirect_does_not_take_the_key_to_another_host(key, distinct, toy, capsys):
    with StandIn() as thief:
        away = (307, "", {"Location": thief.url + "/models"})
        with StandIn(listing=away) as server:
            flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url]
            assert "redirects" in refused(capsys, *flags)
        assert not thief.keys


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
