"""mvp_eval.py: parity with the official code, the toy set, a server that misbehaves, and users' files."""

import csv
import io
import json
import os
import random
import shutil
import signal
import tarfile
import threading
import time
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import run, start
from PIL import Image
from stand_in import StandIn, solve_request

import mvp_eval
from mvp_eval import CONFIGS, Config

GOLDEN = Path(__file__).parent / "golden" / "mvp_eval"


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def golden_questions():
    return mvp_eval.read_annotations(GOLDEN / "annotations", "mini")


# ------------------------------------------------------------------------------------- parity with the official code


def test_prompts_and_answers_of_annotations():
    questions = {(q.subset, q.video_id): q for q in golden_questions()}
    assert len(questions) == 50
    for case in golden("prompts.json"):
        q = questions[case["subset"], case["video_id"]]
        prompt = mvp_eval.make_prompt(q.question, q.candidates)
        assert prompt == case["prompt"] and prompt.startswith(case["prompt_without_kwargs"])
        assert list(q.candidates) == case["candidates"]
        assert (q.answer_idx, q.answer) == (case["answer_idx"], case["target"])
        assert not q.video_path.startswith("/")


def test_both_parsers_on_recorded_replies():
    for case in golden("answers.json"):
        assert mvp_eval.parse_official(case["reply"]) == case["official"], case
        assert mvp_eval.parse_strict(case["reply"], case["candidates"]) == case["strict"], case
    questions = {(q.subset, q.video_id): q for q in golden_questions()}
    for line in (GOLDEN / "predictions.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            case = json.loads(line)
            q = questions[case["subset"], case["video_id"]]
            for parser in ("official", "strict"):
                parse = mvp_eval.parse_official if parser == "official" else mvp_eval.parse_strict
                found = parse(case["reply"]) if parser == "official" else parse(case["reply"], q.candidates)
                assert found == case[f"{parser}_idx"] and q.answer_idx == case["answer_idx"]
                assert int(found == q.answer_idx) == case[f"{parser}_rating"]


def golden_predictions():
    """questions, pairs, {"official", "strict": int [N]} from predictions.jsonl."""
    questions = golden_questions()
    lines = (GOLDEN / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    rows = {(r["subset"], r["video_id"]): r for r in (json.loads(line) for line in lines if line)}
    rows = [rows[q.subset, q.video_id] for q in questions]
    values = {p: [-1 if r[f"{p}_idx"] is None else r[f"{p}_idx"] for r in rows] for p in ("official", "strict")}
    return questions, list(mvp_eval.pair_up(questions).values()), {k: np.array(v) for k, v in values.items()}


def test_accuracies_and_intervals():
    questions, pairs, predictions = golden_predictions()
    expected, ok = golden("aggregate.json"), np.ones(50, bool)
    found = mvp_eval.score(questions, pairs, predictions, ok, Config())
    assert expected["bootstrap"]["order"] == list(CONFIGS)

    def same(ours, theirs):
        for key in ("pair", "single"):
            assert ours[key] == pytest.approx(theirs[f"{key}_accuracy"], abs=1e-9)

    for config in CONFIGS:
        task, ours = expected["tasks"][f"mvp_mini_{config}"], found["configs"][config]
        same(ours, task)
        same(ours["strict"], expected["strict"]["tasks"][f"mvp_mini_{config}"])
        assert (ours["pairs"], ours["unparsed"]) == (task["n_pairs"], task["n_unparsed"])
    for source, theirs in expected["sources"].items():
        same(found["sources"][source], theirs)
        same(found["sources"][source]["strict"], expected["strict"]["sources"][source])
        assert found["sources"][source]["pairs"] == theirs["n_pairs"]
    assert found["sources"].keys() == expected["sources"].keys()
    same(found["macro"], expected["group"])
    same(found["macro"]["strict"], expected["strict"]["group"])
    for config, interval in expected["bootstrap"]["official"].items():
        ours = found["macro"] if config == "group" else found["configs"][config]
        np.testing.assert_allclose(ours["pair_ci"], interval, atol=1e-9)
        np.testing.assert_allclose(ours["strict"]["pair_ci"], expected["bootstrap"]["strict"][config], atol=1e-9)
    strict = mvp_eval.score(questions, pairs, predictions, ok, Config(parser="strict"))
    assert strict["macro"]["pair"] == found["macro"]["strict"]["pair"]
    assert strict["macro"]["official"]["pair_ci"] == found["macro"]["pair_ci"]


def test_submissions(tmp_path):
    questions, _, predictions = golden_predictions()
    mvp_eval.write_submissions(tmp_path / "s", questions, predictions["official"], np.ones(50, bool), "mini")
    files = sorted((GOLDEN / "submissions").iterdir())
    assert [f.name for f in sorted((tmp_path / "s").iterdir())] == [f.name for f in files]
    for file in files:
        ours = (tmp_path / "s" / file.name).read_text(encoding="utf-8").splitlines()
        theirs = file.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in ours] == [json.loads(line) for line in theirs]


def test_frame_indices():
    cases = np.load(GOLDEN / "frame_indices.npz")
    for key in cases.files:
        settings, rule = key.split("/")
        total, rate, n = (part.lstrip("Tfpsn") for part in settings.split("_"))
        rule, _, fps = rule.partition("_fps")
        found = mvp_eval.frame_indices(rule, int(total), float(Fraction(rate)), int(n), float(fps or 0))
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, cases[key], err_msg=key)
    assert len(cases.files) > 80
    with pytest.raises(ValueError):
        mvp_eval.frame_indices("qwen2vl", 1, 24.0, 16)


def test_option_scores():
    for case in golden("logprobs.json"):
        index, margin = mvp_eval.option_scores(case["content"])
        assert index == case["idx"]
        assert margin == (None if case["margin"] is None else pytest.approx(case["margin"], abs=1e-9))
    assert mvp_eval.option_scores(None) == (None, None)


def test_request_bodies():
    cases = golden("payloads.json")
    question = next(q for q in golden_questions() if q.video_id == cases["video_id"])
    prompt = mvp_eval.make_prompt(question.question, question.candidates)
    images = [f"<FRAME {i}>" for i in range(cases["n_frames"])]
    configs = {"default": Config(), "text_first": Config(order="text-first"), "logprobs": Config(score="logprobs")}
    for name, config in configs.items():
        assert mvp_eval.make_payload(config, "some-model", prompt, images) == cases[name], name
    blind = mvp_eval.make_payload(Config(), "some-model", prompt)
    content = [{"type": "text", "text": prompt}]
    assert blind == cases["default"] | {"messages": [{"role": "user", "content": content}]}
    extra = Config(extra='{"top_k": 1, "temperature": 0.5}', request_seed=False, token_field="max_completion_tokens")
    body = mvp_eval.make_payload(replace_config(extra, frame_labels=True), "m", prompt, images[:2])
    assert body["top_k"] == 1 and body["temperature"] == 0.5 and body["max_completion_tokens"] == 1024
    assert "seed" not in body and "max_tokens" not in body
    parts = body["messages"][0]["content"]
    assert [p.get("text", "image") for p in parts] == ["Frame 1:", "image", "Frame 2:", "image", prompt]


def replace_config(config, **changes):
    return Config(**{**vars(config), **changes})


@pytest.mark.parametrize("name", ["h264_bframes.mp4", "vp9.webm", "mpeg4.avi"])
def test_decoding_gives_the_frames_that_were_asked_for(name):
    clip = golden("clips/clips.json")[name]
    for n, expected in clip["expect"].items():
        seen = []

        def choose(total, rate):
            seen.append((total, rate))
            return mvp_eval.frame_indices("uniform", total, rate, int(n))

        images, indices = mvp_eval.decode(GOLDEN / "clips" / name, choose)
        assert list(indices) == expected and len(images) == len(expected)
        assert seen[-1] == (clip["frames"], pytest.approx(float(Fraction(clip["rate"]))))
        for image, i in zip(images, indices):
            grey = clip["gray_first"] + clip["gray_step"] * i
            assert abs(np.asarray(image, float) - grey).max() <= 2


def test_parquet_is_read_without_pyarrow(tmp_path):
    table = mvp_eval.read_table(GOLDEN / "parquet" / "intuitive_physics" / "mini-00000-of-00001.parquet")
    rows = mvp_eval.read_table(GOLDEN / "annotations" / "intuitive_physics" / "mini.jsonl")
    assert table == rows
    # snappy: literals with long lengths, copies of all kinds, overlapping ones
    assert mvp_eval.unsnappy(b"\x0a\x08abc\x0d\x03") == b"abcabcabca"
    assert mvp_eval.unsnappy(b"\x08\x00a\x1a\x01\x00") == b"a" * 8
    long = bytes(range(256)) * 2
    assert mvp_eval.unsnappy(b"\x80\x04\xf4\xff\x01" + long) == long
    with pytest.raises(ValueError):
        mvp_eval.unsnappy(b"\x08\x00a\x1a\x09\x00")


def test_annotations_in_every_layout(tmp_path):
    """jsonl, json (list, or object of a list), csv, parquet, one file with a column `subset`: the same rows."""
    expected = golden_questions()
    sources = {name: mvp_eval.read_table(GOLDEN / "annotations" / name / "mini.jsonl") for name in CONFIGS}

    def check(path):
        assert mvp_eval.read_annotations(path, "mini") == expected

    (tmp_path / "csv").mkdir()
    for name, rows in sources.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        (tmp_path / "csv" / f"{name}_mini.csv").write_text(text.getvalue(), encoding="utf-8")
    check(tmp_path / "csv")
    for name, rows in sources.items():
        folder = tmp_path / "json" / f"{name}_mini"
        folder.mkdir(parents=True)
        rows = [row | {"candidates": list(mvp_eval.parse_candidates(row["candidates"]))} for row in rows]
        (folder / f"{name}_mini.json").write_text(json.dumps({"data": rows} if "robot" in name else rows))
    check(tmp_path / "json")
    lines = [json.dumps(row | {"subset": name}) for name, rows in reversed(sources.items()) for row in rows]
    (tmp_path / "mvp_mini.jsonl").write_text("\n".join(lines))
    check(tmp_path)
    check(tmp_path / "mvp_mini.jsonl")
    parquet = mvp_eval.read_annotations(GOLDEN / "parquet", "mini")
    assert parquet == [q for q in expected if q.subset == "intuitive_physics"]
    sourceless = mvp_eval.make_question({"video_id": "a_1", "video_path": "/star/x.mp4"}, "temporal_reasoning")
    assert sourceless.source == "star" and sourceless.broken == "question, answer, candidates missing"


# ------------------------------------------------------------------------------------------------------- the toy pairs


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder of toy pairs: 3 scenes, 48 pairs."""
    folder = tmp_path_factory.mktemp("toy")
    mvp_eval.write_toy(folder, 3, 0)
    return folder


@pytest.fixture(scope="module")
def distinct(toy, tmp_path_factory):
    """Those toy pairs that share no clip, so that no two questions are the same request: 30 pairs, annotations only."""
    folder = tmp_path_factory.mktemp("distinct")
    for name in CONFIGS:
        lines = (toy / name / "mini.jsonl").read_text().splitlines()
        lines = [line for line in lines if "toy_ring" in line or "_p0_" in line or "_p3_" in line]
        (folder / name).mkdir()
        (folder / name / "mini.jsonl").write_text("\n".join(lines))
    return folder


def report_of(out):
    return json.loads((Path(out) / "report.json").read_text())


def call(*flags, code=0):
    """The command line, in this process."""
    assert mvp_eval.main(list(map(str, flags))) == code


def refused(capsys, *flags, code=2):
    """Expect the command line to leave with `code`, and return the one line it printed."""
    with pytest.raises(SystemExit) as stop:
        mvp_eval.main(list(map(str, flags)))
    printed = capsys.readouterr().err
    assert stop.value.code == code and printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


def test_toy_pairs_are_minimal_and_no_shortcut_works(capsys):
    """The default run: each baseline as the paper's argument says, the random one within four sigma, and the files."""
    call("--scenes", 2, "--seed", 3)
    report, printed = report_of("runs/mvp_eval"), capsys.readouterr().out
    for name in ("first", "last", "longest", "text", "frame"):
        for values in (report["systems"][name]["macro"], *report["systems"][name]["configs"].values()):
            assert (values["pair"], values["single"], values["stuck"]) == (0.0, 50.0, 100.0), name
            assert values["pair_ci"][1] <= 25
    oracle, coin = (report["systems"][name]["macro"] for name in ("oracle", "random"))
    assert (oracle["pair"], oracle["single"]) == (100.0, 100.0)
    pairs = coin["pairs"]
    assert pairs == 32 and abs(coin["pair"] / 100 - 0.25) < 4 * (0.25 * 0.75 / pairs) ** 0.5
    assert abs(coin["single"] / 100 - 0.5) < 4 * (0.25 / 2 / pairs) ** 0.5
    assert "oracle" in printed and "paper: human" in printed and "32 pairs (64 questions)" in printed
    assert len(Path("runs/mvp_eval/failures.jsonl").read_text().splitlines()) == 32
    assert Image.open("runs/mvp_eval/picture.png").size[0] > 1000
    assert "| frame" in Path("runs/mvp_eval/report.md").read_text()
    # the seed makes other clips, the same seed the same ones
    clips = mvp_eval.toy_clips("toy_turn", 0, 3)
    np.testing.assert_array_equal(clips[0, 1], mvp_eval.toy_clips("toy_turn", 0, 3)[0, 1])
    assert (clips[0, 1] != mvp_eval.toy_clips("toy_turn", 0, 4)[0, 1]).any()


def test_toy_set_is_balanced_and_its_centre_frames_say_nothing(toy):
    questions = mvp_eval.read_annotations(toy, "mini")
    pairs = [[questions[i] for i in rows] for rows in mvp_eval.pair_up(questions).values()]
    assert not mvp_eval.validate(questions) and len(pairs) == 48
    for source, (config, _, candidates) in mvp_eval.TOY.items():
        mine = [pair for pair in pairs if pair[0].source == source]
        assert {q.subset for pair in mine for q in pair} == {config} and len(mine) == 12
        assert sum(pair[0].candidates == candidates for pair in mine) == 6
        assert sum(pair[0].answer == candidates[0] for pair in mine) == 6
    videos = {q.video_path: toy / "videos" / q.video_path for q in questions}
    everything = {path: mvp_eval.decode(file, lambda total, rate: np.arange(total))[0] for path, file in videos.items()}
    for a, b in pairs:
        first, second = (np.stack([np.asarray(f) for f in everything[q.video_path]]) for q in (a, b))
        assert first.shape == (25, 64, 64, 3)
        np.testing.assert_array_equal(first[12], second[12])
        if a.source == "toy_ring":
            np.testing.assert_array_equal(first[[0, 24]], second[[0, 24]])
        assert (first != second).any()


def test_a_function_that_looks_is_perfect_and_one_that_sees_half_gets_nothing(toy, monkeypatch):
    """A solver through --fn: 100 %. Right on one row of each pair: 0 % of pairs, 50 % of rows. Batches; wrong types."""
    module = Path("plug_in.py")
    module.write_text(
        "from stand_in import solve\n"
        "def answer(frames, prompt, row):\n"
        "    assert 'answer' not in row and len(row['candidates']) == 2\n"
        "    return solve(frames, prompt) if len(frames) == 16 else 'Answer: A'\n"
        "def batched(frames, prompts, rows):\n"
        "    assert 1 <= len(frames) <= 7\n"
        "    return ['AB'.index(solve(f, p)[-1]) for f, p in zip(frames, prompts)]\n"
        "batched.batch_size = 7\n"
        "def half(frames, prompt, row):\n"
        "    right = 'AB'.index(solve(frames, prompt)[-1])\n"
        "    return right if row['video_id'].endswith('_1') else 1 - right\n"
        "def broken(frames, prompt, row):\n"
        "    raise RuntimeError('no such layer')\n"
        "def strange(frames, prompt, row):\n"
        "    return 2 if row['video_id'].startswith('toy_ring_s000') else 'B'\n"
    )
    call("--data", toy, "--fn", "plug_in:answer", "--baseline", "blind,frame,reverse,shuffle", "--out", "perfect")
    systems = report_of("perfect")["systems"]
    assert systems["model"]["macro"]["pair"] == systems["model"]["macro"]["single"] == 100.0
    assert systems["blind"]["macro"]["pair"] == systems["frame"]["macro"]["pair"] == 0.0
    assert systems["reverse"]["configs"]["robot_object_interactions"]["pair"] == 0.0
    assert systems["reverse"]["sources"]["toy_permanence"]["pair"] == 100.0
    call("--data", toy, "--fn", "plug_in:batched", "--baseline", "none", "--out", "batched")
    assert report_of("batched")["macro"]["pair"] == 100.0
    call("--data", toy, "--fn", "plug_in:half", "--out", "half")
    report = report_of("half")
    assert (report["macro"]["pair"], report["macro"]["single"]) == (0.0, 50.0)
    assert all((r["pair"], r["single"]) == (0.0, 50.0) for r in report["configs"].values())
    assert report["systems"]["text"]["macro"]["single"] == 50.0 and "frame" not in report["systems"]
    # what is neither a text nor 0 or 1 is an error, never an answer
    call("--data", toy, "--fn", "plug_in:strange", "--out", "strange", code=1)
    report = report_of("strange")
    assert report["macro"]["errors"] == 8 and len(report["incomplete"]["model"]) == 4
    assert "expected a text, 0 or 1, not 2" in Path("strange/failures.jsonl").read_text()
    with pytest.raises(SystemExit) as stop:
        mvp_eval.main(["--data", str(toy), "--fn", "plug_in:broken", "--out", "broken"])
    assert stop.value.code == 3


# -------------------------------------------------------------------------------------------------------- an endpoint

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
    """Each question was answered, and none twice: the last request with each body, and only the last, was served."""
    outcomes = server.outcomes()
    assert len(outcomes) == questions
    for asked in outcomes.values():
        assert asked[-1] == "ok" and asked.count("ok") == 1, asked


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_endpoint_answers_everything_once_whatever_goes_wrong(distinct, toy, stream, key, no_waiting, capsys):
    """Up to three tries fail, in all ways; replies come as text or in parts; a second run asks nothing."""
    retry = [(429, "slow down", {"Retry-After": "0"}), (500, "oops", {}), (503, "busy", {"Retry-After": "0"})]
    faults = ["hang", "cut", "half", "error", *retry, *(["empty stream"] if stream else ["garbage", "null"])]
    plans, lock = {}, threading.Lock()

    def fault(body, nth):
        with lock:
            number = len(plans)
            plan = plans.setdefault(json.dumps(body), [faults[(number + i) % len(faults)] for i in range(number % 4)])
        return plan[nth] if nth < len(plan) and (plan[nth] != "hang" or number < 20) else None

    def answer(body):
        text = solve_request(body)
        return text if stream else {"content": [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}]}

    flags = ["--data", distinct, "--videos", toy / "videos", "--out", "run", "--timeout", 3, "--baseline", "none"]
    flags += ["--stream"] * stream
    with StandIn(answer, fault) as server:
        call(*flags, "--endpoint", server.url + "/", "--concurrency", 8)
        answered_once(server, 60)
        body = server.bodies[0]
        assert body["model"] == "stand-in" and body["temperature"] == 0 and body["max_tokens"] == 1024
        assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url"] * 16 + ["text"]
        assert server.keys == {f"Bearer {KEY}"}
        seen = {str(fault) for outcomes in server.outcomes().values() for fault in outcomes} - {"ok"}
        assert seen == {str(fault) for fault in faults}
        before, server.models = len(server.asked), ("another",)
        call(*flags, "--endpoint", server.url + "/", "--resume")
        assert len(server.asked) == before, "a resumed run asked again"
    report = report_of("run")
    assert (report["macro"]["pair"], report["macro"]["errors"], report["model"]) == (100.0, 0, "stand-in")
    rows = [json.loads(line) for line in Path("run/answers.rank0.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and all(row["status"] == "ok" and len(row["frame_idx"]) == 16 for row in rows)
    assert max(row["attempts"] for row in rows) == 4
    call("--report", "--out", "run", "--parser", "strict")  # without the server
    assert report_of("run")["macro"]["official"]["pair"] == 100.0
    assert_key_is_nowhere("run", "".join(capsys.readouterr()))
    lines = Path("run/submissions/mvp_mini_intuitive_physics_valid.jsonl").read_text().splitlines()
    assert len(lines) == 12 and json.loads(lines[0]).keys() == {"data_name", "row_id", "model_answer", "task"}


def test_refusals_stop_at_once_and_say_what_to_do(distinct, toy, key, capsys, no_waiting):
    flags = ["--data", distinct, "--videos", toy / "videos", "--baseline", "none", "--retries", 1]
    cases = {
        (401, f"Incorrect API key provided: {KEY}"): (2, "OPENAI_API_KEY"),
        (404, "model stand-in does not exist"): (2, "--model"),
        (302, "moved"): (2, "redirects"),
        (400, "At most 8 image(s) may be provided in one request"): (2, "--limit-mm-per-prompt"),
        (400, "maximum context length is 4096 tokens"): (3, "fewer --frames"),
        (413, "too large"): (3, "--quality"),
        (500, "still loading"): (3, "20 questions in a row"),
    }
    for number, ((status, text), (code, hint)) in enumerate(cases.items()):
        with StandIn(fault=lambda body, nth: (status, text, {})) as server:
            out = f"out{number}"
            printed = refused(capsys, *flags, "--endpoint", server.url, "--out", out, code=code)
            assert hint in printed and f"--out {out}" in printed, printed
            asked = server.outcomes()
            assert len(asked) < 50 and max(len(tries) for tries in asked.values()) == (2 if status == 500 else 1)
            assert_key_is_nowhere(out, printed)
    assert "no server at http://127.0.0.1:9" in refused(capsys, *flags, "--endpoint", "http://127.0.0.1:9/v1")


def test_what_failed_is_asked_again_and_only_that(distinct, toy, no_waiting, capsys):
    """A refused row counts as wrong and exits with 1; with --allow-missing its pair is left out; then resumed."""
    broken = {"on": True}

    def fault(body, nth):
        return (
            (400, "bad picture", {})
            if broken["on"] and "block go" in body["messages"][0]["content"][-1]["text"]
            else None
        )

    with StandIn(solve_request, fault) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url, "--baseline", "none"]
        flags += ["--limit", 3, "--out", "run"]
        call(*flags, code=1)
        report = report_of("run")
        assert report["configs"]["robot_object_interactions"]["pair"] == 0.0 and report["macro"]["errors"] == 6
        assert len(report["incomplete"]["model"]) == 3 and "bad picture" in Path("run/failures.jsonl").read_text()
        assert len(server.asked) == 24
        call(*flags, "--resume", "--allow-missing")
        report = report_of("run")
        assert "robot_object_interactions" not in report["configs"] and report["macro"]["pair"] == 100.0
        assert report["macro"]["configs"] == 3 and len(server.asked) == 30
        broken["on"] = False
        call(*flags, "--resume")
        assert report_of("run")["macro"]["pairs"] == 12 and report_of("run")["macro"]["pair"] == 100.0
        assert len(server.asked) == 36
    assert "some questions have no answer" in capsys.readouterr().out


def test_kill_and_resume_loses_nothing_and_repeats_nothing(distinct, toy, key, capsys):
    """kill -9 twice under 20 % failures: what a file holds is never asked again, and in the end all is answered."""
    chance, lock = random.Random(1), threading.Lock()
    faults = ["cut", "half", "garbage", "null", "error", "hang", (500, "oops", {"Retry-After": "0"})]
    faults += [(429, "slow down", {"Retry-After": "0"})] * 2

    def fault(body, nth):
        time.sleep(0.2)
        with lock:
            return chance.choice(faults) if chance.random() < 0.2 else None

    def recorded():
        file = Path("run/answers.rank0.jsonl")
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"}")]  # torn lines do not

    printed = ""
    with StandIn(solve_request, fault) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url, "--baseline", "none"]
        flags += ["--out", "run", "--resume", "--timeout", 3, "--concurrency", 4]
        kept = []
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
    rows = [json.loads(line) for line in Path("run/answers.rank0.jsonl").read_text().split("\n") if line.endswith("}")]
    done = [row["key"] for row in rows if row["status"] == "ok"]
    assert len(done) == len(set(done)) == 60, "an answer was lost, or asked for twice"
    assert len(kept[0]) >= 8 and len(kept[1]) >= 25 and rows[: len(kept[1])] == kept[1]
    # only what was under way at a kill can have been served without having been kept: at most 4 requests each time
    served = sum(tries.count("ok") for tries in outcomes.values())
    assert len(outcomes) == 60 and 60 <= served <= 60 + 2 * 4
    assert report_of("run")["macro"]["pair"] == 100.0 and report_of("run")["macro"]["errors"] == 0
    assert_key_is_nowhere("run", printed)


def test_signals_stop_asking_report_and_name_the_command_that_resumes(distinct, toy):
    with StandIn(solve_request, lambda body, nth: time.sleep(0.4)) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url, "--concurrency", 2]
        process = start("mvp_eval.py", *flags, "--out", "run", "--baseline", "none")
        while len(server.asked) < 12:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and "--out run --baseline none --resume" in printed, printed
        asked = len(server.asked)
        rows = Path("run/answers.rank0.jsonl").read_text().splitlines()
        assert len(rows) == asked < 40, "what was under way was not waited for"
        assert 0 < report_of("run")["macro"]["pairs"] < 30 and report_of("run")["macro"]["pair"] == 100.0


def test_two_ranks_share_the_pairs_and_make_one_report(distinct, toy):
    with StandIn(solve_request) as server:
        flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url, "--out", "run"]
        printed = run("mvp_eval.py", *flags, ranks=2)
        answered_once(server, 60)
        sides = [Path(f"run/answers.rank{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
        stems = [{json.loads(line)["video_id"][:-2] for line in side} for side in sides]
        assert not stems[0] & stems[1] and len(stems[0]) == len(stems[1]) == 15
        assert report_of("run")["macro"]["pair"] == 100.0 and printed.count("paper: human") == 1
        call(*flags, "--resume")  # on one rank: all is there
        assert len(server.asked) == 60


def test_log_probabilities_decide_and_swapping_takes_out_bias(distinct, toy, no_waiting):
    """A server that knows the answer but leans to A: with both orders averaged it is right; old vLLM's limit of 5."""

    def answer(body):
        assert body["logprobs"] is True and body["max_tokens"] == 4 and body["top_logprobs"] == 5
        side = 1.0 if solve_request(body) == "Answer: A" else -1.0
        lean = 1.5
        top = [{"token": " A", "logprob": (side + lean) / 2 - 2}, {"token": "B", "logprob": -(side + lean) / 2 - 2}]
        first = max(top, key=lambda entry: entry["logprob"])
        position = {"token": first["token"], "logprob": first["logprob"], "top_logprobs": top}
        return {"content": f"Answer: {first['token'].strip()}", "logprobs": {"content": [position]}}

    def fault(body, nth):
        return (400, "top_logprobs must be at most 5", {}) if body["top_logprobs"] > 5 else None

    with StandIn(answer, fault) as server:
        for stream in ([], ["--stream"]):
            flags = ["--data", distinct, "--videos", toy / "videos", "--endpoint", server.url, "--score", "logprobs"]
            flags += ["--limit", 3]
            call(*flags, "--debias", "--out", f"run{len(stream)}", "--baseline", "none", *stream)
            systems = report_of(f"run{len(stream)}")["systems"]
            assert systems["model"]["macro"]["p_a"] == 100.0 and systems["model"]["macro"]["pair"] == 0.0
            assert systems["debiased"]["macro"]["pair"] == 100.0
            assert systems["model"]["mean_margin"] == pytest.approx(1.5)  # of 2.5 and 0.5
            assert any("not the paper's protocol" in warning for warning in report_of("run0")["warnings"])


def test_bad_replies_are_counted_and_never_guessed(distinct, toy, capsys):
    """Chatter, empty thoughts: unparsed; warnings name what makes the number doubtful; whole files are sent."""

    def answer(body):
        video = next(p for p in body["messages"][0]["content"] if p["type"] == "video_url")["video_url"]["url"]
        assert video.startswith("data:video/mp4;base64,")
        if "Clockwise" in body["messages"][0]["content"][-1]["text"]:
            return {"content": None, "reasoning_content": "hm", "finish_reason": "length"}
        return "I see a banana."

    with StandIn(answer) as server:
        flags = [
            "--data",
            distinct,
            "--videos",
            toy / "videos",
            "--endpoint",
            server.url,
            "--video-url",
            "--out",
            "run",
        ]
        call(*flags, "--baseline", "none")
        report = report_of("run")
        assert report["configs"]["robot_object_interactions"]["unparsed"] == 24
        assert report["macro"]["unparsed"] == 24 and report["macro"]["strict"]["single"] == 0.0
        assert report["configs"]["robot_object_interactions"]["single"] == 0.0
        warnings = " ".join(report["warnings"])
        for part in ("official parser and the strict one differ on 36 of 60", "24 replies were cut off", "--video-url"):
            assert part in warnings
        assert "24 unparsed replies stand in submissions/ as the first candidate" in warnings
        assert report["systems"]["model"]["macro"]["errors"] == 0
    assert "warning: model: the official parser" in capsys.readouterr().out


def test_compare_runs_on_shared_pairs(distinct, toy, capsys):
    call("--data", distinct, "--videos", toy / "videos", "--out", "free")
    files = {name: f"free/answers.{name}.rank0.jsonl" for name in ("oracle", "first", "random")}
    found = mvp_eval.compare(files["oracle"], files["first"])
    assert found["macro"]["pairs"] == 30 and found["macro"]["pair"]["difference"] == 100.0
    assert found["macro"]["single"]["difference"] == 50.0 and found["macro"]["p"] == pytest.approx(2 / 2**30)
    same = mvp_eval.compare(files["random"], files["random"])["macro"]
    assert same["p"] == 1.0 and same["pair"]["ci"] == [0.0, 0.0]
    other = mvp_eval.compare(files["first"], files["random"])["macro"]["pair"]
    assert other["ci"][0] <= other["difference"] <= other["ci"][1] <= 0
    some = Path("some.jsonl")
    lines = Path(files["first"]).read_text().splitlines()
    some.write_text("\n".join(lines[:3]))  # half a pair does not count
    assert mvp_eval.compare(files["oracle"], some)["macro"]["pairs"] == 1
    capsys.readouterr()
    call("compare", files["oracle"], files["first"])
    assert "+100.0 [+100.0, +100.0]" in capsys.readouterr().out
    assert "no such file" in refused(capsys, "compare", "nothing.jsonl", some)
    assert "no answers" in refused(capsys, "compare", "free", some)
    some.write_text("")
    assert "no pair in common" in refused(capsys, "compare", some, files["first"])
    assert "takes two" in refused(capsys, "compare", some)
    # the exact test, by hand: 8 pairs only A gets, 2 only B: 2 * (1 + 10 + 45) / 2^10
    a, b = np.array([1] * 8 + [0] * 2 + [1], bool), np.array([0] * 8 + [1] * 2 + [1], bool)
    assert mvp_eval.mcnemar(a, b) == mvp_eval.mcnemar(b, a) == pytest.approx(2 * 56 / 1024)


# --------------------------------------------------------------------------------------------------------- users' files


def annotate(folder, config, rows):
    """Write annotations: rows of (video_id, video_path, answer) with candidates x and y, or dicts of changed fields."""
    (folder / config).mkdir(parents=True, exist_ok=True)
    lines = []
    for video_id, path, answer, *changes in rows:
        row = dict(video_id=video_id, video_path=path, question="Which?", answer=answer)
        row |= dict(candidates="['x', 'y']", source=path.split("/")[0]) | (changes[0] if changes else {})
        lines.append(json.dumps(row))
    (folder / config / "mini.jsonl").write_text("\n".join(lines))


def test_invalid_pairs_are_named_and_left_out_on_request(tmp_path, capsys):
    a, b = ("star/1.mp4", "x"), ("star/2.mp4", "y")
    broken = {
        "two rows": [("p_1", *a)],
        "the answer 'z' is none": [("q_1", "star/1.mp4", "z"), ("q_2", *b)],
        "both rows have the same answer": [("r_1", *a), ("r_2", "star/2.mp4", "x")],
        "both rows have the same video": [("s_1", *a), ("s_2", "star/1.mp4", "y")],
        "its questions differ": [("t_1", *a), ("t_2", *b, {"question": "What?"})],
        "its candidates differ": [("u_1", *a), ("u_2", *b, {"candidates": "['y', 'x']"})],
        "two different texts": [("v_1", *a, {"candidates": "['x', 'x']"}), ("v_2", *b)],
        "question missing": [("w_1", *a, {"question": None}), ("w_2", *b)],
        "same video_id twice": [("x_1", *a), ("x_1", *b)],
        "leads out of the folder": [("y_1", "star/../../a.mp4", "x"), ("y_2", *b)],
    }
    hint = "not two"
    for number, (reason, rows) in enumerate(broken.items()):
        annotate(tmp_path / "d", "temporal_reasoning", [("good_a_1", *a), ("good_a_2", *b), *rows])
        flags = ["--data", tmp_path / "d", "--baseline", "first,text,oracle", "--out", f"out{number}"]
        printed = refused(capsys, *flags)
        assert (hint if reason == "two rows" else reason) in printed and "--allow-missing" in printed, printed
        call(*flags, "--allow-missing", "--resume")
        assert report_of(f"out{number}")["data"]["pairs"] == 1
        assert report_of(f"out{number}")["systems"]["oracle"]["macro"]["pair"] == 100.0
        capsys.readouterr()
    annotate(tmp_path / "d", "temporal_reasoning", broken["two rows"])
    assert "no valid pair" in refused(capsys, "--data", tmp_path / "d", "--allow-missing", "--out", "none")
    for name in ("nothing", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert "no annotations" in refused(capsys, "--data", tmp_path / name, "--out", name)
    (tmp_path / "d" / "temporal_reasoning" / "mini.jsonl").write_text('{"video_id": ')
    assert "cannot read the annotations" in refused(capsys, "--data", tmp_path / "d", "--out", "torn")


def test_broken_parquet_files_are_one_sentence(tmp_path, capsys):
    whole = (GOLDEN / "parquet" / "intuitive_physics" / "mini-00000-of-00001.parquet").read_bytes()
    chance, file = random.Random(0), tmp_path / "x.parquet"
    refusals = 0
    for trial in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[chance.randrange(len(data))] = chance.randrange(256)
        file.write_bytes(data[: chance.randrange(len(data))] if trial % 3 == 0 else data)
        try:
            assert isinstance(mvp_eval.read_table(file), list)
        except SystemExit as stop:
            refusals += 1
            assert stop.code == 2 and capsys.readouterr().err.startswith("error: cannot read the annotations")
    assert refusals >= 20


def test_missing_and_broken_videos(distinct, toy, tmp_path, capsys, no_waiting):
    videos = tmp_path / "videos"
    shutil.copytree(toy / "videos", videos)
    (videos / "toy_turn" / "s000_0.mp4").unlink()
    shutil.copy(GOLDEN / "clips" / "truncated.mp4", videos / "toy_count" / "s001_0.mp4")
    flags = ["--data", distinct, "--videos", videos]
    printed = refused(capsys, *flags, "--out", "a")
    assert "1 of 60 videos" in printed and "toy_turn/s000_0.mp4" in printed and "--check" in printed
    call(*flags, "--check", code=1)
    printed = capsys.readouterr().out
    assert "11 of 12 found, 1 missing, 0 broken" in printed and "12 of 12 found, 0 missing, 1 broken" in printed
    assert "missing toy_turn/s000_0.mp4" in printed and "broken toy_count/s001_0.mp4" in printed
    with StandIn(solve_request) as server:
        flags += ["--endpoint", server.url, "--baseline", "none"]
        call(*flags, "--allow-missing", "--out", "b")
        report = report_of("b")
        assert report["macro"]["pairs"] == 28 and report["macro"]["pair"] == 100.0
        assert "1 pairs are left out, since 1 videos are missing" in report["warnings"][0]
        shutil.copy(toy / "videos" / "toy_turn" / "s000_0.mp4", videos / "toy_turn" / "s000_0.mp4")
        call(*flags, "--out", "c", code=1)  # one of 60: more than 1 %, but a single one never stops a run
        assert "skipped an unreadable file: toy_count/s001_0.mp4" in capsys.readouterr().out
        assert report_of("c")["macro"]["errors"] == 1
        for name in ("s001_1", "s002_0"):
            shutil.copy(GOLDEN / "clips" / "truncated.mp4", videos / "toy_count" / f"{name}.mp4")
        assert "--max-bad" in refused(capsys, *flags, "--out", "d")[-200:]


def test_videos_are_made_from_downloads(tmp_path, capsys):
    """Flattened folders, webm to mp4, archives, single frames at 24 and 5 a second; what is unclear is not guessed."""
    downloads, root, clip = tmp_path / "downloads", tmp_path / "videos", GOLDEN / "clips" / "h264_bframes.mp4"

    def put(file, target):
        (downloads / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, downloads / target)

    put(clip, "clevrer/video_10000-11000/video_10001.mp4")
    put(GOLDEN / "clips" / "vp9.webm", "ssv2/20bn/77.webm")
    put(clip, "pt/a/video_1.mp4")
    put(clip, "pt/b/video_1.mp4")
    with zipfile.ZipFile(downloads / "star.zip", "w") as archive:
        archive.write(clip, "Charades_v1_480/ABC.mp4")
    put(downloads / "star.zip", "star/Charades_v1_480.zip")
    (downloads / "grasp").mkdir()
    with tarfile.open(downloads / "grasp" / "grasp.tar.gz", "w:gz") as archive:
        archive.add(GOLDEN / "clips" / "mpeg4.avi", "grasp/level1/x.avi")
        archive.add(clip, "grasp/level2/x.mp4")
    for i in range(12):
        grey = Image.new("RGB", (32, 24), (20 * i,) * 3)
        for target in (f"intphys/dev/O1/07/3/scene/scene_{i + 1:03d}.png", f"language_table/frames/9_frame_{i}.jpg"):
            (downloads / target).parent.mkdir(parents=True, exist_ok=True)
            grey.save(downloads / target)
    needed = ["clevrer/video_10001", "ssv2/77", "pt/video_1", "star/ABC", "grasp/level2/x", "intphys/_O1_07_3"]
    needed += ["language_table/video_9", "vinoground/0"]
    rows = [(f"{i // 2}_{i % 2}", f"/{path}.mp4", "xy"[i % 2]) for i, path in enumerate(needed)]
    annotate(tmp_path / "data", "intuitive_physics", rows)
    flags = ["--data", tmp_path / "data", "--videos", root]
    before = sorted(f for f in downloads.rglob("*") if f.is_file())
    call(*flags, "--prepare", downloads, code=1)
    printed = capsys.readouterr().out
    assert "2 files fit" in printed and f"there is no folder {downloads / 'vinoground'}" in printed
    assert "HanSolo9682" in printed and "missing pt/video_1.mp4" in printed
    assert sorted(f for f in downloads.rglob("*") if f.is_file()) == before, "a download was deleted"
    made = sorted(f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())
    assert made == sorted(f"{name}.mp4" for name in needed if name not in ("pt/video_1", "vinoground/0"))

    def everything(name):
        seen = []
        images, _ = mvp_eval.decode(root / name, lambda total, rate: seen.append(rate) or np.arange(total))
        return seen[-1], [float(np.asarray(image).mean()) for image in images]

    for name, rate in (("intphys/_O1_07_3.mp4", 24), ("language_table/video_9.mp4", 5)):
        found, greys = everything(name)
        assert found == rate and np.abs(np.array(greys) - 20 * np.arange(12)).max() < 4
    rate, greys = everything("ssv2/77.mp4")
    assert rate == pytest.approx(30000 / 1001, rel=1e-3)
    assert np.abs(np.array(greys) - (40 + 8 * np.arange(23))).max() < 4
    assert len(everything("grasp/level2/x.mp4")[1]) == len(everything("star/ABC.mp4")[1]) == 37
    # a second time nothing is made again; a webm alone is used as it is; a file in another folder is pointed at
    times = {f: f.stat().st_mtime_ns for f in root.rglob("*.mp4")}
    (root / "ssv2" / "77.mp4").unlink()
    shutil.copy(GOLDEN / "clips" / "vp9.webm", root / "ssv2" / "77.webm")
    (root / "pt" / "deeper").mkdir(parents=True)
    shutil.copy(clip, root / "pt" / "deeper" / "video_1.mp4")
    call(*flags, "--prepare", downloads, code=1)
    printed = capsys.readouterr().out
    assert all(f.stat().st_mtime_ns == t for f, t in times.items() if f.exists())
    assert not (root / "ssv2" / "77.mp4").exists() and "1 with another suffix (used as they are)" in printed
    assert "there is pt/deeper/video_1.mp4, in another folder" in printed


def test_annotations_are_downloaded_page_by_page_once(tmp_path, monkeypatch, capsys):
    rows = {name: mvp_eval.read_table(GOLDEN / "annotations" / name / "mini.jsonl") for name in CONFIGS}
    asked = []

    class Page(io.BytesIO):
        pass

    def open_page(url, timeout):
        asked.append(url)
        if len(asked) % 3 == 0:
            raise OSError("connection reset")
        query = dict(part.split("=") for part in url.split("?")[1].split("&"))
        assert query["split"] == "mini" and query["dataset"] == "facebook/minimal_video_pairs"
        mine, offset = rows[query["config"]], int(query["offset"])
        page = [{"row": row} for row in mine[offset : offset + 4]]
        return Page(json.dumps({"rows": page, "num_rows_total": len(mine)}).encode())

    monkeypatch.setattr(mvp_eval.urllib.request, "urlopen", open_page)
    mvp_eval.download_annotations(tmp_path / "mvp", "mini", pause=0)
    assert mvp_eval.read_annotations(tmp_path / "mvp", "mini") == golden_questions()
    count = len(asked)
    monkeypatch.setenv("DATA", str(tmp_path))
    call("--data", "hub", "--baseline", "first,last,longest,text,random,oracle", "--out", "run", "--limit", 4)
    assert len(asked) == count and report_of("run")["data"]["pairs"] == 16
    assert report_of("run")["systems"]["text"]["macro"]["pair"] == 0.0
    monkeypatch.setattr(mvp_eval.urllib.request, "urlopen", lambda url, timeout: (_ for _ in ()).throw(OSError("down")))
    with pytest.raises(SystemExit):
        mvp_eval.download_annotations(tmp_path / "other", "mini", pause=0)
    assert "by hand" in capsys.readouterr().err


def test_rotated_and_damaged_files(tmp_path):
    """Phones turn frames by metadata; packets that are damaged cost their frames only."""
    half = np.zeros((20, 32, 48, 3), np.uint8)
    half[:, :, :24] = 255  # white on the left
    options = mvp_eval.TOY_CODEC
    mvp_eval.write_video(tmp_path / "a.mp4", half, 10, options)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44
    turned = [0, 1 << 16, 0, (1 << 32) - (1 << 16), 0, 0, 0, 0, 1 << 30]  # a quarter turn clockwise
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    (tmp_path / "turned.mp4").write_bytes(data)
    centre = lambda total, rate: mvp_eval.frame_indices("center", total, rate, 1)  # noqa: E731
    image = mvp_eval.decode(tmp_path / "turned.mp4", centre)[0][0]
    assert image.size == (32, 48)
    assert np.asarray(image)[:20].min() > 200 and np.asarray(image)[28:].max() < 50  # the left side is on top now
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    packet = (len(data) - start) // 24
    for i in range(start + 8 * packet, start + 9 * packet):
        data[i] ^= 0x5A
    (tmp_path / "damaged.mp4").write_bytes(data)
    images, indices = mvp_eval.decode(tmp_path / "damaged.mp4", lambda total, rate: np.arange(total))
    assert 15 <= len(images) == len(indices) <= 20
    with pytest.raises((mvp_eval.av.FFmpegError, ValueError)):
        mvp_eval.decode(GOLDEN / "clips" / "truncated.mp4", centre)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises((mvp_eval.av.FFmpegError, ValueError)):
        mvp_eval.decode(tmp_path / "text.mp4", centre)


def test_frames_are_shrunk_and_kept(toy):
    path = next((toy / "videos").rglob("*.mp4"))
    frames = mvp_eval.Frames(Config(size=48, frames=4), encode=True)
    first, indices = frames.load(path, "uniform")
    assert frames.load(path, "uniform")[0] is first and list(indices) == [0, 8, 16, 24]
    picture = Image.open(io.BytesIO(mvp_eval.base64.b64decode(first[0])))
    assert picture.format == "JPEG" and picture.size == (48, 48)
    assert mvp_eval.shrink(Image.new("RGB", (40, 30)), 48).size == (40, 30)
    assert mvp_eval.shrink(Image.new("RGB", (640, 480)), 448).size == (448, 336)
    small = mvp_eval.Frames(Config(cache=0, frames=4), encode=True)
    small.load(path, "uniform")
    assert small.bytes == 0 and not small.kept


def test_requests_are_limited():
    gate, begun = mvp_eval.Gate(8, rate=50), time.monotonic()
    for _ in range(11):
        with gate:
            pass
    assert time.monotonic() - begun >= 10 / 50
    gate = mvp_eval.Gate(8, 0)
    gate.slow_down()
    gate.slow_down()  # at the same moment: counts once
    assert gate.limit == 4
    held = [gate.__enter__() for _ in range(4)]
    entered = threading.Event()
    waiting = threading.Thread(target=lambda: (gate.__enter__(), entered.set()), daemon=True)
    waiting.start()
    assert not entered.wait(0.3) and len(held) == 4
    gate.__exit__()
    assert entered.wait(3)
    assert mvp_eval.retry_after("7", 1.0) == 7.0 and mvp_eval.retry_after(None, 1.5) == 1.5
    assert mvp_eval.retry_after("soon", 1.5) == 1.5 and mvp_eval.retry_after("1e9", 1.5) == 600.0
    assert mvp_eval.retry_after("Wed, 21 Oct 2015 07:28:00 GMT", 1.5) == 0.0


def test_flags_that_cannot_work_are_refused(capsys, monkeypatch, toy):
    url = "http://localhost:1/v1"
    cases = {
        ("--endpont", url): "--endpoint",
        ("--preset", "qwen"): "qwen2-vl",
        ("--sampling", "random"): "uniform",
        ("--split", "train"): "mini, full",
        ("--frames", 0): "--frames",
        ("--quality", 0): "--quality",
        ("--rate", -1): "negative",
        ("--timeout", 0): "--timeout",
        ("--fps", 2, "--sampling", "segments"): "--fps",
        ("--endpoint", url, "--fn", "a:b"): "two models",
        ("--score", "logprobs"): "--endpoint",
        ("--debias", "--endpoint", url): "--score logprobs",
        ("--video-url",): "--endpoint",
        ("--video-url", "--endpoint", url, "--baseline", "frame"): "need frames",
        ("--extra", "[1]"): "JSON object",
        ("--baseline", "blind"): "--endpoint or --fn",
        ("--baseline", "longst"): "longest",
        ("--endpoint", "localhost:8000"): "expected a URL",
        ("--endpoint", "http://me:secret@localhost/v1"): "OPENAI_API_KEY",
        ("--endpoint", "http://localhost/v1?key=secret"): "OPENAI_API_KEY",
        ("--fn", "nowhere:f"): "module:function",
        ("--fn", "json:nothing"): "module:function",
        ("--check",): "--data",
        ("--data", toy, "--prepare", "nowhere"): "no such folder",
        ("--report",): "holds none",
    }
    for flags, hint in cases.items():
        printed = refused(capsys, *flags)
        assert hint in printed and "secret" not in printed, printed
    monkeypatch.setenv("MY_KEY", "sk-with a blank")
    printed = refused(capsys, "--endpoint", url, "--api-key-env", "MY_KEY")
    assert "$MY_KEY" in printed and "sk-with" not in printed
    monkeypatch.setenv("MY_KEY", "")
    Path("used").mkdir()
    Path("used/config.json").write_text("{}")
    assert "--resume" in refused(capsys, "--out", "used")


def test_answers_files_are_written_by_one_process_and_a_full_disk_is_told(tmp_path, capsys):
    first, second = mvp_eval.Answers(tmp_path, 0), mvp_eval.Answers(tmp_path, 0)
    first.append({"system": "model", "key": "a", "status": "ok"})
    with pytest.raises(SystemExit) as stop:
        second.append({"system": "model", "key": "b", "status": "ok"})
    assert stop.value.code == 2 and "another process" in capsys.readouterr().err
    first.close()
    assert mvp_eval.load_rows([first.path("model")]).keys() == {"a"}
    if Path("/dev/full").exists():
        first.path("blind").symlink_to("/dev/full")
        with pytest.raises(SystemExit) as stop:
            mvp_eval.Answers(tmp_path, 0).append({"system": "blind"})
        assert stop.value.code == 1 and "--resume" in capsys.readouterr().err
    # an answer stays an answer, whatever comes after it; of errors the last one counts
    rows = [{"key": "k", "status": "error", "n": 1}, {"key": "k", "status": "ok", "n": 2}]
    rows += [{"key": "k", "status": "error", "n": 3}, {"key": "e", "status": "error", "n": 4}]
    rows += [{"key": "e", "status": "error", "n": 5}]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows) + b'\n{"key": "torn\xff')
    assert {key: row["n"] for key, row in mvp_eval.load_rows([file]).items()} == {"k": 2, "e": 5}


def test_parsers_beyond_the_recorded_cases():
    options = ("Yes, all is normal", "No, something is odd")
    official = {"banana": 0, "__A__": None, "Ａ": None, "(A) x\n(B) y": 1, "B\n\nA": 0, "assistant: b": 1}
    assert {reply: mvp_eval.parse_official(reply) for reply in official} == official
    assert mvp_eval.parse_official("B\n\nA", stop_at_blank_line=True) == 1
    strict = {
        "<thinking>A</thinking> (B)": 1, "<answer>A</answer> <answer>B</answer>": 1, "A and B": None,
        "Answer: A\nAnswer: B": 1, "The correct option is B": 1, "(A) or (B)?": None, "B)": 1, "Best choice - (a)": 0,
        "A because it falls": 0, "Reasons...\nB": 1, "[B] it is": 1, "no": 1, "Yes!": 0, "yes all is normal": 0,
        "Nothing fits": None, "answering B": None, 7: None, None: None,
    }  # fmt: skip
    assert {reply: mvp_eval.parse_strict(reply, options) for reply in strict} == strict
    # replies of nothing but blanks, as degenerate models give them, stall neither parser
    blanks = "answer" + " " * 200_000
    assert mvp_eval.parse_official(blanks) is None and mvp_eval.parse_strict(blanks + "x", options) is None
    assert mvp_eval.parse_strict("answer is" + "\n \n" * 50_000 + "b", options) == 1


def test_work_in_flight_is_bounded():
    """Items are taken as threads get free; exceptions are results; a stop waits for what is under way, not for ever."""
    taken, results = [], []

    def items():
        for i in range(40):
            taken.append(i)
            yield i

    def work(i):
        if i == 7:
            raise ValueError("seven")
        return i

    for result in mvp_eval.in_flight(work, items(), 3):
        results.append(result)
        assert len(taken) - len(results) <= 3
    assert sorted(r for r in results if isinstance(r, int)) == [i for i in range(40) if i != 7]
    assert [str(r) for r in results if isinstance(r, ValueError)] == ["seven"]
    release, stopped, begun = threading.Event(), [False], time.monotonic()

    def slow(i):
        return release.wait(60) if i == 1 else i

    found = []
    for result in mvp_eval.in_flight(slow, range(100), 2, lambda: stopped[0], grace=0.5):
        found.append(result)
        stopped[0] = len(found) >= 4
    assert 4 <= len(found) <= 6 and time.monotonic() - begun < 30
    release.set()


def test_malformed_replies_raise_and_well_formed_ones_do_not():
    choice = {"message": {"content": "A"}, "finish_reason": "stop"}
    bad = [
        [],
        {},
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        {"error": "x", "choices": [choice]},
    ]
    bad += [{"choices": [choice | {"message": {"content": 3}}]}, {"choices": [choice | {"message": {"content": [3]}}]}]
    bad += [{"choices": [choice | {"logprobs": {"content": [{"logprob": 1}]}}]}, "text", None, 7]
    for body in bad:
        with pytest.raises(ValueError):
            mvp_eval.read_reply(body)
    assert mvp_eval.read_reply({"choices": [choice]})["reply"] == "A"
    refusal = {"message": {"content": None, "refusal": "I cannot"}, "finish_reason": "stop"}
    assert mvp_eval.read_reply({"choices": [refusal]})["reply"] == "I cannot"
    thinking = {"message": {"content": None, "reasoning": "..."}, "finish_reason": "length"}
    assert mvp_eval.read_reply({"choices": [thinking]})["reply"] == ""

    def events(*lines):
        return mvp_eval.read_events([line.encode() for line in lines], time.monotonic() + 60)

    first = 'data: {"choices": [{"delta": {"content": "Answer"}}]}\n'
    last = 'data: {"choices": [{"delta": {"content": ": B"}, "finish_reason": "stop"}]}\n'
    whole = events(first, "\n", ": ping\n", last, "data: [DONE]\n")
    assert mvp_eval.read_reply(whole)["reply"] == "Answer: B"
    assert events('data: {"error": "overloaded"}\n') == {"error": "overloaded"} and events("data: [1]\n") == [1]
    with pytest.raises(ConnectionError):
        events('data: {"choices": []}\n')
    with pytest.raises(TimeoutError):
        mvp_eval.read_events([b"\n"], time.monotonic() - 1)


def test_no_centre_frame_of_many_scenes_differs():
    """Before encoding, over 60 scenes a source: rounding must not tell one direction of the ring from the other."""
    for source in mvp_eval.TOY:
        for scene in range(60 if source == "toy_ring" else 5):
            clips = mvp_eval.toy_clips(source, scene, 1)
            for (s1, s2), clip in clips.items():
                other = clips[s1, 1 - s2]
                np.testing.assert_array_equal(clip[12], other[12])
                if source == "toy_ring":
                    np.testing.assert_array_equal(clip[[0, 24]], other[[0, 24]])
                else:
                    np.testing.assert_array_equal(clip[12], clips[1 - s1, s2][12])


def test_without_libx264_equal_frames_still_decode_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(mvp_eval.av, "codecs_available", {"mpeg4"})
    centres = []
    for kind, clip in mvp_eval.toy_clips("toy_permanence", 0, 0).items():
        path = tmp_path / f"{kind}.mp4"
        mvp_eval.write_video(path, clip, 10, mvp_eval.TOY_CODEC)
        images, _ = mvp_eval.decode(path, lambda total, rate: np.arange(total))
        assert len(images) == 25 and np.abs(np.asarray(images[24], int) - clip[24]).mean() < 12
        centres.append(np.asarray(images[12]))
    assert len(centres) == 4
    for centre in centres[1:]:
        np.testing.assert_array_equal(centre, centres[0])
