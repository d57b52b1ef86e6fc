# SPDX-License-Identifier: MIT
"""MVP: shortcut-aware video question answering, measured on minimal pairs of videos.

"A Shortcut-aware Video-QA Benchmark for Physical Understanding via Minimal Video Pairs", Krojer, Komeili, Ross,
Garrido, Sinha, Ballas, Assran, 2025, arXiv 2506.09987.

The idea. Models that see no video, or one frame of it, score far above chance on most video benchmarks: the question,
the options or one picture give the answer away. MVP asks the same question, with the same two options, about two videos
that look alike and whose right answers are opposite. A pair counts only if both answers are right. Then whatever does
not look at the video, and answers deterministically, scores exactly 0; a coin scores 25 %; people score 93 %.

How the pairs were mined: question types about the physical world from nine sources, 548 thousand examples; pairs of
equal questions and opposite answers whose videos are similar (overlap of annotated objects, then ViCLIP similarity), 70
thousand; minus those that four of five image models can answer from at least 30 % of single frames; 27,414 pairs stay.

    annotations -- pairs, checked --.                                    .-- official parser --> pair, single accuracy
    videos -- 16 frames of T -------+--> prompt --> model -- replies ----|                        per config and source,
                                    |    (HTTP endpoint, Python function)'-- strict parser -->    bootstrap over pairs
                                    '--> shortcuts: text alone, one frame, longest option, ... -- the same numbers --^

    python mvp_eval.py                                                    # toy pairs, all shortcut baselines, a minute
    python mvp_eval.py --data DIR --videos ROOT --check                   # which videos are missing or broken
    python mvp_eval.py --data DIR --videos ROOT --endpoint http://localhost:8000/v1 --model auto --baseline blind,frame
    python mvp_eval.py --data DIR --videos ROOT --fn mymodel:answer       # any Python function
    python mvp_eval.py compare runs/a runs/b                              # two runs on the same pairs, paired test

The paper reports pair accuracies (PAPER below): people 92.9, InternVL2.5-8B 40.2, Qwen2-VL-7B 30.0, one frame only 12
to 17, text only 0, chance 25. Measured here, toy set, 96 pairs: a coin 18.8 % [11.5, 27.1], the five other
shortcuts 0 %, a solver that compares an early frame with a late one 100 %. Parsing, scoring, prompts, frame indices and
submissions equal what the official functions gave on recorded cases. No video-language model was run here yet.

Where this departs from the official code: a failed request is never an answer, it is asked again; next to the official
parser, which reads "banana" as A, a strict one counts what it cannot read; incomplete pairs are named and make the run
exit with 1; intervals; the shortcut baselines; frame counts are taken from decoding, since headers lie.
"""

import ast
import base64
import csv
import email.utils
import fcntl
import hashlib
import http.client
import importlib
import io
import json
import math
import os
import platform
import queue
import random
import re
import shutil
import ssl
import struct
import sys
import tarfile
import textwrap
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections import Counter, OrderedDict, defaultdict
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

import common
from common import OldLog as Log, old_fail as fail

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag, and the comment beside it is its help text."""

    preset: str = ""  # a name of PRESETS; by default the one that fits --data

    # data
    data: str = "toy"  # toy, hub (downloads the annotations), a folder or file of annotations, or a folder of $DATA
    split: str = "mini"  # mini (9,208 pairs) or full (27,414)
    videos: str = ""  # root folder of the videos, default DATA/videos
    limit: int = 0  # this many pairs of each config, a seeded choice; 0 = all
    allow_missing: bool = False  # leave out invalid pairs, and pairs with a missing video or no answer, and say so
    check: bool = False  # only say which videos are missing or broken, per source
    prepare: str = ""  # only make --videos from this folder of the sources' downloads
    scenes: int = 6  # toy: scenes a task, each 4 pairs

    # the model
    endpoint: str = ""  # base URL of an OpenAI-compatible server, such as http://localhost:8000/v1
    model: str = "auto"  # its model; auto = the first that the server lists
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key
    fn: str = ""  # module:function, called as function(frames, prompt, row) -> reply, or index of the option
    baseline: str = ""  # shortcuts, by commas, or all, or none; default: all without a model, the textual ones with one

    # frames and prompt
    frames: int = 16  # frames a video
    sampling: str = "uniform"  # uniform, uniform_last, linspace, segments, openai, qwen2vl or center: frame_indices
    fps: float = 0.0  # at most this many frames a second (uniform, uniform_last, openai); 0 = no such limit
    size: int = 448  # longer side of a frame, pixels; never scaled up
    quality: int = 90  # JPEG quality
    order: str = "images-first"  # or text-first
    frame_labels: bool = False  # write "Frame i:" before each image
    video_url: bool = False  # send the file itself instead of frames; the server then samples

    # requests
    max_tokens: int = 1024  # longest reply
    token_field: str = "max_tokens"  # or max_completion_tokens, as some hosts want it
    request_seed: bool = True  # send "seed", which some hosts reject
    extra: str = ""  # JSON object merged into each request, such as {"top_k": 1}
    stream: bool = False  # have replies streamed
    score: str = "text"  # text (parse the reply) or logprobs (compare the log-probabilities of A and B)
    debias: bool = False  # with logprobs: ask again with swapped options and average; not the paper's protocol
    concurrency: int = 16  # requests in flight a rank
    rate: float = 0.0  # requests a second at most, a rank; 0 = no limit
    retries: int = 6  # tries after the first one, on 429, 5xx, timeouts, cut connections, broken replies
    timeout: float = 120.0  # seconds without a byte of reply

    # scoring
    parser: str = "official"  # which parser gives the headline numbers: official or strict
    stop_at_blank_line: bool = False  # official parser: read up to the first blank line, as some wrappers do

    # run
    seed: int = 0  # seed of the toy set, the random baseline, --limit, the bootstrap and the requests
    out: str = ""  # folder of the run, default runs/mvp_eval, runs/mvp_eval-2, ...
    resume: bool = False  # go on in the run's folder: ask only what has no answer yet
    report: bool = False  # only compute the report of --out again, without any request
    cache: float = 0.25  # GiB of encoded frames kept, since videos occur in several questions
    max_bad: float = 0.01  # share of unreadable videos above which a run stops


PRESETS = {
    "toy": {},
    "mvp": {},
    # what is known of the frame settings behind published numbers
    "qwen2-vl": dict(frames=16, sampling="qwen2vl", size=420),  # official runs: max_pixels 151200 = 360 x 420
    "internvl2.5": dict(frames=32, sampling="segments", size=448, frame_labels=True),
    "llava-onevision": dict(frames=32, sampling="linspace"),
}
DATA_PRESETS = {"toy": "toy", "*": "mvp"}

CONFIGS = {"human_object_interactions": "HOI", "robot_object_interactions": "ROI"}
CONFIGS |= {"intuitive_physics": "IP", "temporal_reasoning": "TR"}
SAMPLINGS = ("uniform", "uniform_last", "linspace", "segments", "openai", "qwen2vl", "center")
TEXT_BASELINES = ("random", "first", "last", "longest", "text")
VIEWS = ("frame", "blind", "shuffle", "reverse")  # what a model can be shown instead of the frames in order

# Pair accuracy in %: (macro, HOI, ROI, IP, TR) on full, the same on mini (table A of the paper; None: not given).
PAPER = {
    "human": ((92.9, 91.3, 91.7, 97.6, 90.9), None),
    "InternVL2.5-8B": ((40.2, 43.7, 40.2, 22.8, 54.4), (39.9, 38.1, 38.7, 23.1, 59.8)),
    "Tarsier-34B": ((38.8, 45.2, 36.3, 21.0, 52.7), (37.4, 38.7, 36.6, 22.1, 52.4)),
    "GPT-4o": (None, (32.5, 36.1, 32.8, 16.2, 45.0)),
    "Qwen2-VL-7B": ((30.0, 27.1, 27.6, 20.0, 45.2), (29.2, 32.28, 21.2, 18.9, 44.5)),
    "Gemini-1.5 Pro": (None, (29.6, 43.1, 15.5, 19.6, 40.2)),
    "one frame: Qwen2-VL-7B": ((16.7, 16.9, 20.1, 3.7, 26.3), (15.7, 13.6, 19.9, 4.4, 24.8)),
    "one frame: LLaVA-OneVision": ((11.8, 14.7, 8.7, 2.0, 21.6), (11.7, 12.2, 10.5, 2.3, 21.9)),
}
# (pair, single) of whatever does not look, in each config: facts of the design, not measurements
CHANCE = {"chance: a coin": (25.0, 50.0), "chance: any text-only rule": (0.0, 50.0)}


def systems_of(config):
    """--baseline -> (names of shortcuts that need no model, views that the model is asked with). Exits with 2."""
    model = bool(config.endpoint or config.fn)
    free = [*TEXT_BASELINES, *([] if model else ["frame"]), "oracle"]
    views = list(VIEWS) if model else []
    default = [*TEXT_BASELINES] if model else free
    names = [name.strip() for name in config.baseline.split(",") if name.strip()]
    names = {"": default, "all": free + views, "none": []}.get(config.baseline, names)
    for name in names:
        if name in VIEWS and name != "frame" and not model:
            fail(f"--baseline {name} shows a model something else: it needs --endpoint or --fn")
        if name not in free + views:
            fail(f"unknown baseline {name!r}{common.old_nearest(name, free + views)} Known: {', '.join(free + views)}.")
    asked = [name for name in names if name in views]
    asked += ["swapped"] if config.debias else []
    return [name for name in names if name in free], (["model"] if model else []) + asked


def check(config):
    """Refuse what cannot work before any work is done; each refusal is one line that says what to type instead."""
    choices = dict(split=("mini", "full"), sampling=SAMPLINGS, order=("images-first", "text-first"))
    choices |= dict(score=("text", "logprobs"), parser=("official", "strict"))
    for name, known in choices.items():
        if getattr(config, name) not in known:
            fail(f"--{name} {getattr(config, name)!r} is not one of {', '.join(known)}")
    for name in ("frames", "size", "concurrency", "max_tokens", "scenes"):
        if getattr(config, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    if not 1 <= config.quality <= 100:
        fail(f"--quality is a JPEG quality from 1 to 100, not {config.quality}")
    if min(config.rate, config.retries, config.limit, config.fps, config.cache, config.max_bad) < 0:
        fail("--rate, --retries, --limit, --fps, --cache and --max-bad cannot be negative")
    if config.timeout <= 0:
        fail(f"--timeout is a number of seconds above 0, not {config.timeout:g}")
    if config.fps and config.sampling not in ("uniform", "uniform_last", "openai"):
        fail(f"--fps works with --sampling uniform, uniform_last or openai, not with {config.sampling}")
    if config.endpoint and config.fn:
        fail("--endpoint and --fn are two models: give one of them")
    if config.score == "logprobs" and not config.endpoint:
        fail("--score logprobs needs an --endpoint that returns log-probabilities")
    if config.debias and config.score != "logprobs":
        fail("--debias averages log-probabilities: add --score logprobs")
    if config.video_url and not config.endpoint:
        fail("--video-url sends files to an --endpoint")
    if config.video_url and {"frame", "shuffle", "reverse"} & set(systems_of(config)[1]):
        fail("--video-url sends whole files: the baselines frame, shuffle and reverse need frames")
    try:
        if not isinstance(json.loads(config.extra or "{}"), dict):
            raise ValueError("not an object")
    except ValueError as error:
        fail(f"--extra must be a JSON object such as '{{\"top_k\": 1}}' ({error})")
    systems_of(config)


# ---------------------------------------------------------------------------------------------------------------------
# Annotations: rows, pairs, and whether they are minimal pairs
# ---------------------------------------------------------------------------------------------------------------------

HUB = "https://datasets-server.huggingface.co/rows?dataset=facebook/minimal_video_pairs"
FIELDS = ("video_id", "video_path", "question", "answer", "candidates", "source")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Question:
    """One row: a video, a question and two candidates. `broken` says why the row cannot be used, '' if it can."""

    subset: str
    video_id: str
    video_path: str
    question: str
    candidates: tuple
    answer: str
    source: str
    broken: str = ""

    @property
    def stem(self):
        """What the two rows of a pair share: the id without the part after its last underscore."""
        return self.video_id.rsplit("_", 1)[0]

    @property
    def answer_idx(self):
        """0 or 1: which candidate is right."""
        return self.candidates.index(self.answer)


def parse_candidates(value):
    """Candidates as the data set writes them (a Python list as text), as JSON text, or as a list -> tuple of str."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = json.loads(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"candidates are no list: {value!r}")
    return tuple(str(item) for item in value)


def make_question(row, subset):
    """A dict with the six fields -> Question; what is wrong with it goes to `broken`."""
    missing = [name for name in FIELDS[:-1] if row.get(name) in (None, "")]
    try:
        candidates = parse_candidates(row.get("candidates"))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # what literal_eval may raise
        candidates = ()
    answer, path = str(row.get("answer")), str(row.get("video_path") or "").lstrip("/")
    broken = f"{', '.join(missing)} missing" if missing else ""
    if not broken and (len(candidates) != 2 or candidates[0] == candidates[1]):
        broken = f"candidates must be two different texts, not {row.get('candidates')!r}"
    if not broken and answer not in candidates:
        broken = f"the answer {answer!r} is none of the candidates"
    if not broken and ".." in path.split("/"):
        broken = f"its path leads out of the folder of videos: {path}"
    source = str(row.get("source") or path.split("/")[0])
    return Question(
        subset, str(row.get("video_id")), path, str(row.get("question")), candidates, answer, source, broken
    )


def read_table(path):
    """Rows (dicts) of a .jsonl, .json, .csv or .parquet file. Exits with 2 if it cannot be read."""
    try:
        if path.suffix == ".parquet":
            return read_parquet(path)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
            if isinstance(rows, dict):  # an object that holds one list
                rows = next((value for value in rows.values() if isinstance(value, list)), None)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("expected a list of objects")
        return rows
    except Exception as error:  # noqa: BLE001  whatever a broken file provokes, the answer is the same sentence
        fail(f"cannot read the annotations {path} ({type(error).__name__}: {error})")


def annotation_files(folder, split):
    """The files of a folder in any layout in use: CONFIG/SPLIT*, CONFIG_SPLIT.*, CONFIG_SPLIT/*, mvp_SPLIT.*."""
    found = []
    for name in CONFIGS:
        patterns = [f"{name}/{split}*", f"{name}_{split}", f"{name}_{split}/{name}_{split}"]
        groups = (sorted(folder.glob(pattern + suffix)) for pattern in patterns for suffix in SUFFIXES)
        found += next((files for files in groups if files), [])
    return found or next((files for s in SUFFIXES if (files := sorted(folder.glob(f"mvp_{split}{s}")))), [])


def read_annotations(path, split):
    """All rows of a folder or file, configs in the paper's order, rows in the files' -> list of Question.

    A row's config is its column `subset`, or stands in the file's folder or name. Exits with 2, saying what is wrong.
    """
    files = [path] if path.is_file() else annotation_files(path, split)
    if not files:
        layout = f"CONFIG/{split}*.jsonl, .json, .csv or .parquet, or CONFIG_{split}.*, or mvp_{split}.jsonl"
        fail(f"no annotations of the split {split} in {path}: expected {layout}; --data hub downloads them")
    questions = []
    for file in files:
        place = f"{file.parent.name}/{file.name}"
        config = next((name for name in CONFIGS if name in place), None)
        for row in read_table(file):
            subset = row.get("subset") or config
            if subset not in CONFIGS:
                fail(f"{file}: which config is this? Give the file or its folder one of the names {', '.join(CONFIGS)}")
            questions.append(make_question(row, subset))
    if not questions:
        fail(f"the annotations in {path} hold no rows")
    return sorted(questions, key=lambda q: list(CONFIGS).index(q.subset))


def download_annotations(folder, split, say=print, pause=2.0):
    """Page the hub's row server into folder/CONFIG/SPLIT.jsonl, 100 rows a request; files that are there stay."""
    for name in CONFIGS:
        path, rows, total = folder / name / f"{split}.jsonl", [], 1
        while not path.exists() and len(rows) < total:
            url = f"{HUB}&config={name}&split={split}&offset={len(rows)}&length=100"
            for attempt in range(6):
                try:
                    with urllib.request.urlopen(url, timeout=60) as response:
                        page = json.load(response)
                    break
                except (OSError, ValueError, http.client.HTTPException) as error:
                    gone = isinstance(error, urllib.error.HTTPError) and error.code not in (429, 500, 502, 503, 504)
                    if gone or attempt == 5:
                        fail(f"cannot download {url}: {error}; put the data set's files into {folder} by hand")
                    time.sleep(pause * 2**attempt)
            total = page["num_rows_total"]
            rows += [item["row"] for item in page["rows"]]
            if not page["rows"]:
                fail(f"{url} ends after {len(rows)} of {total} rows: try again later")
        if rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(temporary, path)
            say(f"{path}: {len(rows)} rows")


def pair_up(questions):
    """{(config, stem): [row numbers]}, in order of first appearance."""
    pairs = {}
    for i, question in enumerate(questions):
        pairs.setdefault((question.subset, question.stem), []).append(i)
    return pairs


def validate(questions):
    """What keeps each pair from being minimal -> {(config, stem): reason}; empty if the set is as the paper says."""
    problems = {}
    for pair, rows in pair_up(questions).items():
        members = [questions[i] for i in rows]
        broken = [f"{q.video_id}: {q.broken}" for q in members if q.broken]
        if broken:
            problems[pair] = "; ".join(broken)
        elif len(members) != 2:
            problems[pair] = f"{len(members)} rows share this stem, not two"
        elif members[0].video_id == members[1].video_id:
            problems[pair] = "the same video_id twice"
        elif members[0].question != members[1].question:
            problems[pair] = "its questions differ"
        elif members[0].candidates != members[1].candidates:
            problems[pair] = "its candidates differ"
        elif members[0].answer == members[1].answer:
            problems[pair] = "both rows have the same answer"
        elif members[0].video_path == members[1].video_path:
            problems[pair] = "both rows have the same video"
    return problems


def data_hash(questions):
    """sha256 of the annotations as they were understood."""
    lines = (json.dumps([q.subset, q.video_id, q.video_path, q.question, q.candidates, q.answer]) for q in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# Parquet, as the hub writes it: string columns, snappy or uncompressed, data pages v1, plain or dictionary.


def varint(data, at):
    """An unsigned LEB128 number at data[at] -> (number, where it ends)."""
    number = shift = 0
    while True:
        byte = data[at]
        number, shift, at = number | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return number, at


def thrift(data, at, kind=12):
    """One value of the Thrift compact protocol -> (value, end): a struct is {field number: value}, binary is bytes."""
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        number, at = varint(data, at)
        return number >> 1 ^ -(number & 1), at
    if kind == 7:
        return struct.unpack_from("<d", data, at)[0], at + 8
    if kind == 8:
        length, at = varint(data, at)
        return bytes(data[at : at + length]), at + length
    if kind in (9, 10):
        size, inner, at = data[at] >> 4, data[at] & 15, at + 1
        if size == 15:
            size, at = varint(data, at)
        values = []
        for _ in range(size):
            value, at = (data[at] == 1, at + 1) if inner in (1, 2) else thrift(data, at, inner)
            values.append(value)
        return values, at
    if kind != 12:
        raise ValueError(f"Thrift type {kind} is not expected in a parquet file of strings")
    values, field = {}, 0
    while data[at]:
        delta, inner, at = data[at] >> 4, data[at] & 15, at + 1
        if delta:
            field += delta
        else:
            field, at = thrift(data, at, 5)
        values[field], at = thrift(data, at, inner)
    return values, at + 1


def unsnappy(data):
    """Decompress a snappy block: literals, and copies of what was already written."""
    size, at = varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag, at = data[at], at + 1
        if tag & 3 == 0:
            length = (tag >> 2) + 1
            if length > 60:
                extra = length - 60
                length, at = int.from_bytes(data[at : at + extra], "little") + 1, at + extra
            out += data[at : at + length]
            at += length
            continue
        if tag & 3 == 1:
            length, offset, at = 4 + (tag >> 2 & 7), (tag >> 5) << 8 | data[at], at + 1
        else:
            extra = 2 if tag & 3 == 2 else 4
            length, offset, at = (tag >> 2) + 1, int.from_bytes(data[at : at + extra], "little"), at + extra
        if not 0 < offset <= len(out):
            raise ValueError("corrupt snappy block")
        start = len(out) - offset
        out += (out[start:] * (length // offset + 1))[:length]  # a copy may overlap what it writes
    if len(out) != size:
        raise ValueError("corrupt snappy block")
    return bytes(out)


def hybrid(data, at, width, count):
    """`count` numbers of the run-length / bit-packed hybrid of this bit width, from data[at] on."""
    values, size = [], (width + 7) // 8
    while len(values) < count:
        head, at = varint(data, at)
        if head & 1:
            length = (head >> 1) * width
            bits = int.from_bytes(data[at : at + length], "little")
            values += [bits >> width * i & (1 << width) - 1 for i in range(min((head >> 1) * 8, count - len(values)))]
            at += length
        else:
            values += [int.from_bytes(data[at : at + size], "little")] * min(head >> 1, count - len(values))
            at += size
    return values


def plain_strings(data, at, count):
    """`count` strings of the PLAIN encoding: length as uint32, then UTF-8."""
    values = []
    for _ in range(count):
        length = struct.unpack_from("<I", data, at)[0]
        values.append(data[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return values


def read_parquet(path):
    """Rows (dicts of str or None) of a parquet file of string columns; other features raise ValueError."""
    data = path.read_bytes()
    if data[:4] != b"PAR1" or data[-4:] != b"PAR1":
        raise ValueError("not a parquet file")
    export = "export it: python -c \"import datasets as d; d.load_dataset('facebook/minimal_video_pairs', 'CONFIG')"
    export += "['mini'].to_json('CONFIG/mini.jsonl')\""
    footer, _ = thrift(data, len(data) - 8 - struct.unpack_from("<I", data, len(data) - 8)[0])
    schema = {column[4].decode(): column for column in footer[2][1:]}
    table = defaultdict(list)
    for group in footer[4]:
        for column in group[1]:
            meta = column[3]
            name, dictionary, values = meta[3][-1].decode(), [], []
            if meta[1] != 6 or len(meta[3]) != 1:
                raise ValueError(f"its column {name} does not hold strings; {export}")
            optional = schema[name].get(3, 0) == 1
            at = min(offset for offset in (meta[9], meta.get(11)) if offset)
            while len(values) < meta[5]:
                header, at = thrift(data, at)
                if header[3] < 0:
                    raise ValueError("corrupt page header")
                page, at = data[at : at + header[3]], at + header[3]
                if meta[4] not in (0, 1) or header[1] not in (0, 2):
                    raise ValueError(f"compressed by another codec than snappy, or data pages v2; {export}")
                page = unsnappy(page) if meta[4] == 1 else page
                if header[1] == 2:
                    dictionary = plain_strings(page, 0, header[7][1])
                    continue
                count, start, present = header[5][1], 0, [1] * header[5][1]
                if optional:  # definition levels: 1 where there is a value
                    start = 4 + struct.unpack_from("<I", page)[0]
                    present = hybrid(page, 4, 1, count)
                if header[5][2] == 0:
                    found = iter(plain_strings(page, start, sum(present)))
                elif header[5][2] in (2, 8):
                    found = (dictionary[i] for i in hybrid(page, start + 1, page[start], sum(present)))
                else:
                    raise ValueError(f"encoding {header[5][2]} of column {name}; {export}")
                values += [next(found) if there else None for there in present]
            table[name] += values
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Prompt, parsers, option scoring
# ---------------------------------------------------------------------------------------------------------------------

INSTRUCTION = "Even when unsure, always answer with a single letter from A or B, format exactly like: 'Answer: A/B'."


def make_prompt(question, candidates):
    """The official prompt, byte for byte: even the space before the last line break."""
    return f"Question: {question}\nOption:\n(A) {candidates[0]}\n(B) {candidates[1]} \n{INSTRUCTION}"


def parse_official(reply, stop_at_blank_line=False):
    """The official parser -> 0 | 1 | None.

    Nothing is asked of what stands before the letter, so any word that ends in a or b counts, and the second match
    wins: "banana" is A, and so is "Answer: B because a ball falls". Kept as it is: published numbers come from it.
    """
    if stop_at_blank_line:
        reply = reply.split("\n\n")[0].strip()
    text = re.sub(r"\s+", " ", reply.lower())  # changes no match, and no reply of blanks can stall the search
    found = re.findall(r"(?:answer|assistant)?:?\s*([ab])\b", text)
    return "ab".index(found[min(1, len(found) - 1)]) if found else None


LETTER = r"(?<!\w)([ab])(?!\w)"  # one that touches no other letter
THOUGHT = r"(?:think|thinking|reasoning)>"
DECLARATION = re.compile(
    r"(?<!\w)(?:answer|assistant|(?:correct|best|right)\s*(?:option|choice))(?!\w)"
    r"\s*(?:(?:is|was|would\s+be|should\s+be)(?!\w))?\s*(?:[:=\-–]\s*)*(?:(?:option|choice)(?!\w))?\s*[(\[]?\s*"
    + LETTER
    + r"(?:[)\].,:;!]|[^\S\n]*(?:\n|$)|\s+(?:because|since|as|for|and|but|so)(?!\w))",
    re.IGNORECASE,
)
LABEL = re.compile(
    r"\W{0,3}(?:(?:([AB])[).:,;\]]|([ab])[)\]])(?!\s*(?:(?:[oO][rR]|[aA][nN][dD])(?!\w)|[/&]))"
    r"|([ABab])\s+(?i:because|since|as)(?!\w))"
)


def plain_words(text):
    """Lower case, anything but letters and digits to single spaces."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def without_markup(text):
    """NFKC, then the signs that models decorate answers with deleted."""
    return re.sub(r'[*_`"#$“”„‟]', "", unicodedata.normalize("NFKC", text)).strip()


def parse_strict(reply, candidates):
    """What the reply says, or None if it does not say it -> 0 | 1 | None. The first rule that decides ends it."""
    if not isinstance(reply, str):
        return None
    text, ignore = unicodedata.normalize("NFKC", reply), re.IGNORECASE
    closed = list(re.finditer("</" + THOUGHT, text, ignore))
    if closed:
        text = text[closed[-1].end() :]
    elif re.search("<" + THOUGHT, text, ignore):  # cut off while thinking
        return None
    tagged = re.findall(r"<answer>(.*?)</answer>", text, ignore | re.DOTALL)
    text = tagged[-1] if tagged else text
    text = re.sub(r"\\boxed\{(?:\\text\{([^{}]*)\}|([^{}]*))\}", r" Answer: \1\2. ", text, flags=ignore)
    text = re.sub(r"\s+", lambda run: "\n" if "\n" in run[0] else " ", without_markup(text))

    # the reply is a letter; or it is both letters, which is none
    if whole := re.fullmatch(r"\W*([ab])\W*", text, ignore):
        return "ab".index(whole[1].lower())
    if not text or re.fullmatch(rf"\W*{LETTER}\W*(?:[/,&]|or|and)\W*{LETTER}\W*", text, ignore):
        return None

    # it declares one: the last declaration counts
    if declared := DECLARATION.findall(text):
        return "ab".index(declared[-1].lower())

    # its first or last line is labelled; two different labels are an echo of the options
    lines, labels = [line.strip() for line in text.split("\n") if line.strip()], set()
    for line in {lines[0], lines[-1]}:
        label = re.fullmatch(r"\W*([AB])\W*", line) or LABEL.match(line)
        labels |= {next(group for group in label.groups() if group).upper()} if label else set()
    if len(labels) == 1:
        return "AB".index(labels.pop())

    # it holds the text of one candidate; of two, one inside the other, the longer
    words, options = plain_words(text), [plain_words(without_markup(c)) for c in candidates]
    held = [bool(o) and (o == words if o in ("yes", "no") else f" {o} " in f" {words} ") for o in options]
    if held == [True, True] and options[0] != options[1]:
        inside = [f" {options[i]} " in f" {options[1 - i]} " for i in (0, 1)]
        held = [not inside[0], not inside[1]] if any(inside) else held
    if sum(held) == 1:
        return held.index(True)

    # a letter in brackets, or after "option"
    pointed = re.findall(rf"\(\s*([ab])\s*\)|\[\s*([ab])\s*\]|(?<!\w)(?:option|choice)\s+{LETTER}", text, ignore)
    letters = {"".join(groups).lower() for groups in pointed}
    if len(letters) == 1:
        return "ab".index(letters.pop())

    # the candidates begin with yes and no, and so does the reply
    firsts = [option.split(" ")[0] for option in options]
    begins = re.match(r"(yes|no)(?:[,.;:!]|$)", text, ignore)
    if set(firsts) == {"yes", "no"} and begins:
        return firsts.index(begins[1].lower())
    return None


def option_scores(content):
    """Log-probabilities of a reply's tokens, as servers return them -> (0 | 1 | None, score(A) - score(B) or None).

    Taken at the first token that is an A or a B itself; every spelling of a letter (" A", "a", "(A") counts to it.
    """

    def label(token):
        return token.strip(' \t\r\n\v\f▁Ġ().:*"').upper()

    for position in content or []:
        if label(position["token"]) in ("A", "B"):
            top = [(label(entry["token"]), float(entry["logprob"])) for entry in position.get("top_logprobs") or []]
            top = top or [(label(position["token"]), float(position["logprob"]))]
            lowest = min(logprob for _, logprob in top)
            scores = []
            for letter in "AB":
                own = [logprob for name, logprob in top if name == letter]
                scores.append(float(np.logaddexp.reduce(own)) if own else lowest)
            return int(scores[1] > scores[0]), scores[0] - scores[1]
    return None, None


# ---------------------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------------------


def frame_indices(rule, total, rate, n, fps=0.0):
    """Which of a clip's `total` frames (at `rate` a second) are shown -> int64 [up to n], by one of SAMPLINGS.

    uniform (ours): n frames from the first to the last, each once. linspace: the same, repeating frames of short clips
    (LLaVA-OneVision). segments: middles of n segments (InternVL2, VideoChat2). openai, qwen2vl: as lmms-eval's wrappers
    of these names. center: the one that single-frame baselines see. fps: at most so many a second.
    """

    def line(count):
        return np.linspace(0, total - 1, count, dtype=int)

    if rule == "center":
        indices = [total // 2]
    elif rule == "linspace":
        indices = line(n)
    elif rule in ("uniform", "uniform_last"):
        m = max(1, min(total, n))
        if fps:
            m = max(1, min(m, int(total / rate * fps)))
        indices = np.unique(line(m))
        if rule == "uniform_last" and indices[-1] != total - 1:
            indices = [total - 1]
    elif rule == "segments":
        length = (total - 1) / n
        indices = [int(length / 2 + np.round(length * i)) for i in range(n)]
    elif rule == "openai":
        indices = range(0, total, max(1, round(rate / fps))) if fps else line(min(n, total))
        indices = sorted({*map(int, indices), total - 1})
        if fps and len(indices) > n:
            indices = sorted({*(indices[i] for i in np.linspace(0, len(indices) - 1, n, dtype=int)), total - 1})
    else:
        even = min(768, total) // 2 * 2
        m = int(min(max(total / rate * 2, 4), even, total)) // 2 * 2
        if m < 2:
            raise ValueError("--sampling qwen2vl needs a clip of two frames or more")
        indices = np.round(np.linspace(0, total - 1, m)).astype(int)
        indices = indices[np.unique(np.linspace(0, m - 1, n, dtype=int))]
    return np.asarray(indices, dtype=np.int64)


def video_frames(container):
    """Decoded frames of the first video stream, in order of presentation; corrupt packets are stepped over."""
    stream = container.streams.video[0]
    stream.thread_type = "NONE"  # clips are decoded side by side, one thread each
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            yield from packet.decode()
        except av.FFmpegError:
            continue


def shrink(image, size):
    """Longer side to `size` pixels, bicubic; smaller images, and all if size is 0, stay as they are."""
    longest = max(image.size)
    if longest <= size or not size:
        return image
    return image.resize([max(1, round(side * size / longest)) for side in image.size], Image.BICUBIC)


def decode(path, choose, size=0):
    """Frames of a video: choose(total, rate) says which -> (list of upright RGB PIL images, their indices).

    size: longest side in pixels, 0 as it is. What headers say about the number of frames is only a guess: where it
    is wrong, the file is decoded again. Raises ValueError or av.FFmpegError if there is nothing to decode.
    """
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    for _ in range(3):
        kept, guess, wanted = {}, total, set(map(int, choose(max(1, total), rate)))
        with av.open(str(path)) as container:
            total = 0
            for total, frame in enumerate(video_frames(container), start=1):
                if total - 1 in wanted:
                    image = shrink(frame.to_image(), size)
                    kept[total - 1] = image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image
        if not total:
            raise ValueError("no frame can be decoded")
        indices = choose(total, rate)
        if all(int(i) in kept for i in indices):
            return [kept[int(i)] for i in indices], indices
    raise ValueError(f"decodes to {guess} frames, and then to {total}")


def encode_jpeg(image, quality):
    """Image -> base64 text of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return base64.b64encode(buffer.getvalue()).decode()


class Frames:
    """Frames ready to be shown, as base64 JPEGs or as images, most recently used clips kept up to --cache GiB."""

    def __init__(self, config, encode):
        self.config, self.encode = config, encode
        self.lock, self.kept, self.bytes = threading.Lock(), OrderedDict(), 0
        self.decoders = threading.Semaphore(os.cpu_count() or 1)  # bounds the memory that decoding takes

    def load(self, path, rule):
        """Path, one of SAMPLINGS -> (frames, indices [n])."""
        key = (path, path.stat().st_mtime_ns, rule)
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key][:2]
        c = self.config
        with self.decoders:
            choose = lambda total, rate: frame_indices(rule, total, rate, c.frames, c.fps)  # noqa: E731
            images, indices = decode(path, choose, c.size)
            frames = [encode_jpeg(image, c.quality) for image in images] if self.encode else images
        size = sum(map(len, frames)) if self.encode else sum(3 * im.width * im.height for im in images)
        with self.lock:
            if key not in self.kept:
                self.kept[key] = (frames, indices, size)
                self.bytes += size
            while self.bytes > c.cache * 2**30 and self.kept:
                self.bytes -= self.kept.popitem(last=False)[1][2]
        return frames, indices


def write_video(path, images, rate, options):
    """Write RGB images (arrays [H, W, 3], PIL images or av frames) as H.264 in mp4, through a temporary file.

    Builds of FFmpeg without libx264 write MPEG-4 at its best quality, each frame by itself.
    """
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = options if codec == "libx264" else {"g": "1", "qmin": "2", "qmax": "2"}
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = None
        for count, image in enumerate(images):
            if isinstance(image, Image.Image):
                image = np.asarray(image.convert("RGB"))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24") if isinstance(image, np.ndarray) else image
            if stream is None:
                stream = container.add_stream(codec, rate=rate)
                stream.width, stream.height = frame.width // 2 * 2, frame.height // 2 * 2  # yuv420p wants even sides
                stream.pix_fmt, stream.options, stream.codec_context.thread_count = "yuv420p", options, 1
            frame = frame.reformat(stream.width, stream.height, "yuv420p")
            frame.pts, frame.time_base = count, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("no frames to write")
        container.mux(stream.encode(None))
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Toy pairs: no shortcut works on them
# ---------------------------------------------------------------------------------------------------------------------

# The answer is the XOR of something seen only before the centre frame (s1) and something seen only after it (s2), and
# the centre frame is the same in all clips of a scene. So the centre frame says nothing, and no single frame can lift
# a model above a coin's 25 %. (toy_ring is no XOR: a frame tells the direction to those who know the start.)
# source: (config, question, candidate if s1 = s2, candidate if not)
TOY = {
    "toy_permanence": ("intuitive_physics", "Could this happen in the real world?",
                       ("Yes, it could happen", "No, it could not happen")),
    "toy_turn": ("temporal_reasoning", "Where does the ball go after it was hidden?",
                 ("It returns to the side it came from", "It passes to the other side")),
    "toy_count": ("human_object_interactions", "How many balls are behind the screen at the end?",
                  ("An even number", "An odd number")),
    "toy_ring": ("robot_object_interactions", "Which way round does the block go?", ("Clockwise", "Counter-clockwise")),
}  # fmt: skip
TOY_FRAMES, TOY_SIDE, TOY_RATE = 25, 64, 10
# Equal frames must decode to equal pixels: every frame by itself, at one quantiser. With rate control, or with frames
# predicted from others, the centre frame carries traces of what came before it, and nearest neighbours find them.
TOY_CODEC = {"g": "1", "bf": "0", "qp": "12", "x264-params": "scenecut=0:aq-mode=0:mbtree=0:rc-lookahead=0"}


def toy_clips(source, scene, seed):
    """All clips of a scene: {(s1, s2): uint8 [25, 64, 64, 3]}; for toy_ring (start 0 to 3, 0 = clockwise)."""
    draw = np.random.default_rng([seed, list(TOY).index(source), scene])
    background = np.kron(draw.integers(30, 100, (8, 8, 3)), np.ones((8, 8, 1), int)).astype(np.uint8)
    screen, colour = draw.integers(90, 160, 3), draw.integers(40, 120, 3)
    colour[draw.integers(3)] = 255  # objects alone are bright in a channel
    y, x = np.mgrid[:TOY_SIDE, :TOY_SIDE]
    place, height, turn = draw.integers(20, 45), draw.integers(24, 41), draw.integers(6)

    def disc(cx, cy, radius):
        return (x - cx) ** 2 + (y - cy) ** 2 <= radius**2

    def render(s1, s2, t):
        image, objects, cover = background.copy(), [], np.zeros_like(x, bool)
        raised = min(1, t / 8, (TOY_FRAMES - 1 - t) / 8) if source == "toy_permanence" else min(1, t / 8)
        seen = s1 if t < TOY_FRAMES // 2 else s2
        if source == "toy_permanence":
            objects = [disc(place, 44, 7)] * seen
            cover = (abs(x - place) <= 11) & (y >= TOY_SIDE - 32 * raised)
        elif source == "toy_turn":
            away = np.clip(1 - t / 10 if t < TOY_FRAMES // 2 else (t - 14) / 10, 0, 1)  # 0 behind the screen, 1 far out
            objects = [disc(32 + 26 * away * (2 * seen - 1), height, 5)]
            cover = (abs(x - 32) <= 10) & (y >= height - 14)
        elif source == "toy_count":
            objects = [disc((14, 26)[i], 46, 4) for i in range(s1 + 1)]
            objects += [disc((14, 26)[i] + 6 * (24 - t), 46, 4) for i in range(s2 + 1) if t > 14]
            cover = (abs(x - 20) <= 14) & (y >= TOY_SIDE - 30 * raised)
        else:
            angle = np.radians(
                15 * ((turn + 6 * s1 + t * (1 - 2 * s2)) % 24)
            )  # so opposite ways meet in the same pixels
            objects = [np.maximum(abs(x - 32 - 20 * np.cos(angle)), abs(y - 32 - 20 * np.sin(angle))) <= 4]
        for mask in objects:
            image[mask] = colour
        image[cover] = screen
        return image

    kinds = [(s1, s2) for s1 in range(4 if source == "toy_ring" else 2) for s2 in range(2)]
    return {kind: np.stack([render(*kind, t) for t in range(TOY_FRAMES)]) for kind in kinds}


def write_toy(folder, scenes, seed):
    """Write toy annotations (folder/CONFIG/mini.jsonl) and clips (folder/videos), 4 pairs a scene and source.

    Half of the pairs list their candidates in the other order, and in half the second row is the even one.
    """
    marker = json.dumps({"scenes": scenes, "seed": seed})
    if (folder / "toy.json").exists() and (folder / "toy.json").read_text() == marker:
        return
    for source, (config, question, candidates) in TOY.items():
        rows = []
        for scene in range(scenes):
            paths = {}
            for kind, clip in toy_clips(source, scene, seed).items():
                paths[kind] = f"{source}/s{scene:03d}_{len(paths)}.mp4"
                write_video(folder / "videos" / paths[kind], clip, TOY_RATE, TOY_CODEC)
            for p in range(4):
                even, odd = ((p, 0), (p, 1)) if source == "toy_ring" else ((p >> 1,) * 2, (p & 1, 1 - (p & 1)))
                swap, odd_first = (p ^ scene) & 1, ((p ^ scene) >> 1) & 1
                members = [(paths[even], candidates[0]), (paths[odd], candidates[1])]
                for number, (path, answer) in enumerate(members[:: -1 if odd_first else 1], start=1):
                    texts = repr(list(candidates[:: -1 if swap else 1]))
                    row = (f"{source}_s{scene:03d}_p{p}_{number}", path, question, answer, texts, source)
                    rows.append(dict(zip(FIELDS, row, strict=True)))
        path = folder / config / "mini.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "toy.json").write_text(marker)


# ---------------------------------------------------------------------------------------------------------------------
# Videos: where they come from, what is missing, and making them from the sources' downloads
# ---------------------------------------------------------------------------------------------------------------------

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")
# folder: where to get it, and what becomes of it. No source is trimmed, resized or resampled in time.
ORIGINS = {
    "pt": "Perception Test, valid_videos.zip; taken as they are",
    "ssv2": "Something-Something v2, two zip parts, joined, unpacked; each ID.webm becomes ID.mp4 (H.264, own rate)",
    "language_table": "gs://gresearch/robotics/language_table/0.0.1, train episodes, each frame saved as N_frame_M.jpg "
    "(or N/M.jpg), N the episode's number; joined at 5 frames a second to video_N.mp4",
    "intphys": "IntPhys dev.tar.gz, unpacked; frames dev/O1/07/3/scene/*.png become _O1_07_3.mp4 (24 frames a second)",
    "inflevel": "InfLevel, inflevel_lab.tar.gz; taken as they are",
    "grasp": "GRASP, one zip; level 2 is used",
    "clevrer": "CLEVRER validation videos; five folders become one",
    "star": "Charades, Charades_v1_480.zip; whole clips",
    "vinoground": "HanSolo9682/Vinoground on the Hugging Face hub (login); unpack the inner zip",
}


def resolve(root, path):
    """The file of an annotation's video_path under root, with another suffix if only that exists, or None."""
    suffixes = ("", *VIDEO_SUFFIXES)
    files = (root / path if not s else (root / path).with_suffix(s) for s in suffixes)
    return next((file for file in files if file.is_file()), None)


def is_broken(path):
    """Decode the first frame and one near the end -> what is wrong, or ''."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            next(container.decode(stream))
            if stream.duration:
                container.seek((stream.start_time or 0) + stream.duration * 9 // 10, stream=stream)
                next(container.decode(stream))
        return ""
    except (av.FFmpegError, StopIteration, IndexError, OSError, ValueError) as error:
        return str(error) or "no frame can be decoded"


def check_videos(questions, root, say=print):
    """Say, per source, which of the needed videos exist, are missing, lie elsewhere, or are broken -> all are fine."""
    needed, fine, elsewhere = defaultdict(set), True, defaultdict(list)
    for question in questions:
        needed[question.video_path.split("/")[0]].add(question.video_path)
    for file in root.rglob("*") if root.is_dir() else ():
        if file.suffix.lower() in VIDEO_SUFFIXES:
            elsewhere[file.stem].append(file.relative_to(root).as_posix())
    for source, paths in sorted(needed.items()):
        files = {path: resolve(root, path) for path in sorted(paths)}
        missing = [path for path, file in files.items() if file is None]
        found = [file for file in files.values() if file is not None]
        other = [file for file in found if file.relative_to(root).as_posix() not in paths]
        results = in_flight(lambda file: (file, is_broken(file)), found, os.cpu_count() or 1)
        broken = sorted((file, reason) for file, reason in results if reason)
        fine = fine and not missing and not broken
        counts = f"{len(found)} of {len(paths)} found, {len(missing)} missing, {len(broken)} broken"
        say(f"{source:<16} {counts}" + (f", {len(other)} with another suffix (used as they are)" if other else ""))
        for path in missing[:3]:
            near = [e for e in elsewhere[Path(path).stem] if e.split("/")[0] == source]
            say(f"    missing {path}" + (f"; there is {near[0]}, in another folder" if near else ""))
        for file, reason in broken[:3]:
            say(f"    broken {file.relative_to(root)}: {reason}")
        if missing and source in ORIGINS:
            say(f"    from {ORIGINS[source]}")
    if not fine:
        say(f"--prepare DOWNLOADS makes {root} from a folder with one folder for each source, named as above")
    return fine


def endings(path):
    """a/b/c.webm -> a/b/c, b/c, c: what annotations may call this file below their first folder."""
    parts = path.with_suffix("").parts
    return ["/".join(parts[i:]) for i in range(len(parts))]


def archive_members(path):
    """(name, file object) of each file in a zip or tar archive."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as file:
                        yield info.filename, file
    else:
        with tarfile.open(path) as archive:
            for info in archive:
                if info.isfile():
                    yield info.name, archive.extractfile(info)


def place_video(file, target, rate):
    """Put a source's video where the annotations expect it: a link or a copy, or encoded to H.264.

    file: a video, or a list of pictures that become one at `rate` frames a second.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(file, list):
        write_video(target, (Image.open(picture) for picture in file), rate, {})
    elif file.suffix.lower() == target.suffix.lower():
        try:
            os.link(file, target)
        except OSError:  # another file system
            temporary = target.with_name(target.name + ".tmp")
            shutil.copyfile(file, temporary)
            os.replace(temporary, target)
    else:
        with av.open(str(file)) as container:
            rate = container.streams.video[0].average_rate or container.streams.video[0].guessed_rate
            write_video(target, video_frames(container), rate, {})


def frame_folders(folder, source):
    """Frames that are still single pictures: {name of the video to be: [picture files in order]}."""
    found = defaultdict(list)
    for file in folder.rglob("*"):
        if file.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            continue
        number = re.search(r"(\d+)$", file.stem)
        if source == "intphys" and number and file.parent.name == "scene":
            place = re.search(r"(O\d)/(\d+)/(\d)/scene/[^/]+$", file.as_posix())
            found[f"_{place[1]}_{place[2]}_{place[3]}" if place else ""].append((int(number[1]), file))
        elif source == "language_table" and number:
            episode = re.search(r"(\d+)_frame_\d+$", file.stem) or re.search(r"(\d+)$", file.parent.name)
            if episode:
                found[f"video_{int(episode[1])}"].append((int(number[1]), file))
    return {name: [file for _, file in sorted(files)] for name, files in found.items()}


def prepare_videos(questions, downloads, root, say=print):
    """Make the needed videos under root from DOWNLOADS/SOURCE (files, folders, zip and tar archives), deleting nothing.

    What exists stays. A file fits if its path ends like the annotation's without its first folder, whatever the suffix;
    several that fit are named, and none is taken. Returns the number of videos made.
    """
    wanted, made = defaultdict(dict), 0
    for path in {q.video_path for q in questions}:
        source, _, rest = path.partition("/")
        if rest and not resolve(root, path):
            wanted[source][str(Path(rest).with_suffix(""))] = root / path

    def place(file, target, rate=None):
        try:
            place_video(file, target, rate)
            return 1
        except (OSError, av.FFmpegError, ValueError) as error:
            say(f"    cannot make {target}: {error}")
            return 0

    for source, targets in sorted(wanted.items()):
        folder, before = downloads / source, made
        if not folder.is_dir():
            say(f"{source:<16} {len(targets)} needed, but there is no folder {folder}")
            continue
        fitting = defaultdict(list)
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in VIDEO_SUFFIXES:
                for name in targets.keys() & endings(file.relative_to(folder)):
                    fitting[name].append(file)
        for name, files in fitting.items():
            if len(files) > 1:
                say(f"    {len(files)} files fit {targets[name]}, none is taken: {', '.join(map(str, files[:3]))}")
            else:
                made += place(files[0], targets[name])
        rate = {"intphys": 24, "language_table": 5}.get(source)
        for name, pictures in frame_folders(folder, source).items() if rate else ():
            if name in targets and not targets[name].exists():
                made += place(pictures, targets[name], rate)
        left = {name for name in targets if name not in fitting and not targets[name].exists()}
        archives = [f for f in sorted(folder.rglob("*")) if f.name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))]
        for archive in archives if left else ():
            try:
                for member, file in archive_members(archive):
                    suffix = Path(member).suffix.lower()
                    for name in left & {*endings(Path(member))} if suffix in VIDEO_SUFFIXES else ():
                        unpacked = targets[name].with_name(f"{targets[name].name}.unpacked{suffix}")
                        unpacked.parent.mkdir(parents=True, exist_ok=True)
                        with open(unpacked, "wb") as copy:
                            shutil.copyfileobj(file, copy)
                        made += place(unpacked, targets[name])
                        unpacked.unlink()
                        left.discard(name)
            except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
                say(f"    cannot read {archive}: {error}")
        missing = sum(not target.exists() for target in targets.values())
        say(f"{source:<16} {made - before} made, {missing} still missing" + (f": {ORIGINS[source]}" if missing else ""))
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Shortcut baselines: answers without a model
# ---------------------------------------------------------------------------------------------------------------------


def coin(text):
    """A bit that depends on the text alone."""
    return hashlib.blake2b(text.encode()).digest()[-1] & 1


def text_baseline(questions, pairs):
    """Naive Bayes on the words of the candidates, right against wrong, learned on all other pairs -> int64 [N].

    pairs: row numbers [P, 2]. Counts of the whole set, less those of the own pair: cross-validation without refitting.
    On minimal pairs each text is right as often as it is wrong, so there is nothing to learn.
    """
    words = [[re.findall("[a-z0-9]+", text.lower()) for text in q.candidates] for q in questions]
    right, wrong = Counter(), Counter()
    for q, (a, b) in zip(questions, words, strict=True):
        right.update((a, b)[q.answer_idx])
        wrong.update((a, b)[1 - q.answer_idx])
    vocabulary, predicted = len(right | wrong), np.zeros(len(questions), int)
    for rows in pairs:
        mine = [Counter(), Counter()]
        for i in rows:
            for side in (0, 1):
                mine[side].update(words[i][questions[i].answer_idx ^ side])
        totals = [math.log(c.total() - m.total() + vocabulary) for c, m in zip((right, wrong), mine)]
        for i in rows:
            odds = []
            for text in words[i]:
                logs = [math.log((right[w] - mine[0][w] + 1) / (wrong[w] - mine[1][w] + 1)) for w in text]
                odds.append(sum(logs) / len(logs) - totals[0] + totals[1] if logs else 0.0)
            predicted[i] = odds[1] > odds[0]
    return predicted


def frame_baseline(questions, pairs, vectors):
    """The 5 nearest centre frames that were asked the same question, own pair aside, vote by 1/distance -> int64 [N].

    vectors: grey 16x16 centre frames, float [N, 256].
    """
    pair_of = np.empty(len(questions), int)
    for number, rows in enumerate(pairs):
        pair_of[list(rows)] = number
    groups, predicted = defaultdict(list), np.zeros(len(questions), int)
    for i, question in enumerate(questions):
        groups[question.question].append(i)
    for text, rows in groups.items():
        rows = np.array(rows)
        for i in rows:
            others = rows[pair_of[rows] != pair_of[i]]
            distance = np.sqrt(((vectors[others] - vectors[i]) ** 2).sum(1))
            nearest, votes = np.argsort(distance, kind="stable")[:5], [0.0, 0.0]
            for j in nearest:
                answer = questions[others[j]].answer
                if answer in questions[i].candidates:
                    votes[questions[i].candidates.index(answer)] += 1 / (distance[j] + 1e-6)
            predicted[i] = coin(text) if votes[0] == votes[1] else votes[1] > votes[0]
    return predicted


def centre_frames(questions, videos):
    """Grey 16x16 centre frames, float64 [N, 256]; videos: {video_path: file}. Raises what `decode` raises."""

    if missing := {q.video_path for q in questions} - videos.keys():
        raise ValueError(f"{len(missing)} videos are missing")

    def load(path):
        image = decode(videos[path], lambda total, rate: frame_indices("center", total, rate, 1))[0][0]
        return path, np.asarray(image.convert("L").resize((16, 16), Image.BOX), float).ravel()

    found = {}
    for result in in_flight(load, sorted({q.video_path for q in questions}), os.cpu_count() or 1):
        if isinstance(result, Exception):
            raise result
        found[result[0]] = result[1]
    return np.stack([found[q.video_path] for q in questions])


def free_baseline(name, questions, pairs, videos, seed):
    """Predictions int64 [N] of a baseline that asks no model."""
    if name == "random":
        return np.array([coin(f"{seed}:{q.video_id}") for q in questions])
    if name == "longest":
        return np.array([int(len(q.candidates[1]) > len(q.candidates[0])) for q in questions])
    if name == "text":
        return text_baseline(questions, pairs)
    if name == "frame":
        return frame_baseline(questions, pairs, centre_frames(questions, videos))
    if name == "oracle":
        return np.array([q.answer_idx for q in questions])
    return np.full(len(questions), int(name == "last"))


# ---------------------------------------------------------------------------------------------------------------------
# Models: an OpenAI-compatible endpoint, or a Python function
# ---------------------------------------------------------------------------------------------------------------------

RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class Stop(Exception):
    """Nothing further should be asked: message, exit code."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


class Failed(Exception):
    """This question got no answer: message, tries."""

    def __init__(self, message, attempts):
        super().__init__(message)
        self.attempts = attempts


def in_flight(function, items, threads, stopped=lambda: False, grace=10.0):
    """function(item) of all items, `threads` at once, as they get done; an exception is yielded, not raised.

    No more items are taken than are at work, so memory is bounded. After stopped() nothing new begins, and what has
    begun gets `grace` seconds. The threads are daemons: what hangs does not keep the process.
    """
    todo, done = queue.Queue(), queue.Queue()

    def work():
        for item in iter(todo.get, todo):
            try:
                done.put(function(item))
            except Exception as error:  # noqa: BLE001  whoever reads the results decides
                done.put(error)

    items, running, deadline = iter(items), 0, math.inf
    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        while time.monotonic() < deadline:
            while running < threads and not stopped():
                item = next(items, todo)
                if item is todo:
                    break
                todo.put(item)
                running += 1
            if not running:
                return
            if stopped() and deadline == math.inf:
                deadline = time.monotonic() + grace
            try:
                result = done.get(timeout=0.2)
            except queue.Empty:
                continue
            running -= 1
            yield result
    finally:
        for _ in range(threads):
            todo.put(todo)


class Gate:
    """Lets at most `concurrency` requests be under way, half of it for a minute after a 429, and `rate` a second."""

    def __init__(self, concurrency, rate):
        self.concurrency, self.interval = concurrency, 1 / rate if rate else 0.0
        self.limit, self.until, self.busy, self.slot = concurrency, 0.0, 0, 0.0
        self.free = threading.Condition()

    def __enter__(self):
        with self.free:
            while self.busy >= (self.limit if time.monotonic() < self.until else self.concurrency):
                self.free.wait(1.0)
            self.busy += 1
            now = time.monotonic()
            self.slot = max(now, self.slot) + self.interval
            wait = self.slot - self.interval - now
        if wait > 0:
            time.sleep(wait)

    def __exit__(self, *_):
        with self.free:
            self.busy -= 1
            self.free.notify()

    def slow_down(self):
        """After a 429; those that come within a second of each other count once."""
        with self.free:
            now = time.monotonic()
            if now > self.until - 59:
                current = self.limit if now < self.until else self.concurrency
                self.limit, self.until = max(1, current // 2), now + 60


def make_payload(config, model, prompt, images=(), video="", top_logprobs=20):
    """The body of a chat completion request. images: base64 JPEGs; video: a data URL that goes instead of them."""
    parts = []
    for i, image in enumerate(images, start=1):
        parts += [{"type": "text", "text": f"Frame {i}:"}] if config.frame_labels else []
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}})
    parts += [{"type": "video_url", "video_url": {"url": video}}] if video else []
    text = [{"type": "text", "text": prompt}]
    content = text + parts if config.order == "text-first" else parts + text
    logprobs = config.score == "logprobs"
    payload = {"model": model, "messages": [{"role": "user", "content": content}]}
    payload |= {config.token_field: 4 if logprobs else config.max_tokens, "temperature": 0}
    payload |= {"seed": config.seed} if config.request_seed else {}
    payload |= {"logprobs": True, "top_logprobs": top_logprobs} if logprobs else {}
    payload |= {"stream": True} if config.stream else {}
    return payload | json.loads(config.extra or "{}")


def read_reply(body):
    """A chat completion -> {reply, finish_reason, usage, logprobs}; ValueError if there is no reply in it."""
    if not isinstance(body, dict) or body.get("error"):
        raise ValueError(f"the server sent an error: {json.dumps(body)[:300]}")
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        if content is None and (finish in ("length", "content_filter") or message.get("refusal")):
            content = message.get("refusal") or ""  # out of tokens while thinking, or refused: a reply without a letter
        if not isinstance(content, str):
            raise ValueError(f"a reply without content: {json.dumps(body)[:300]}")
        logprobs = (choice.get("logprobs") or {}).get("content")
        option_scores(logprobs)  # fails here if it would fail later
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"not a chat completion: {json.dumps(body)[:300]}") from None
    return {"reply": content, "finish_reason": finish, "usage": body.get("usage"), "logprobs": logprobs}


def read_events(response, deadline):
    """A streamed chat completion (server-sent events) -> the body that would have come without streaming."""
    message, logprobs = {"content": None}, []
    choice = {"message": message, "finish_reason": None, "logprobs": {"content": logprobs}}
    body = {"choices": [choice], "usage": None}
    for line in response:
        if time.monotonic() > deadline:
            raise TimeoutError("the stream did not end in time")
        data = line[5:].strip() if line.startswith(b"data:") else b""
        if data == b"[DONE]":
            choice["logprobs"] = {"content": logprobs} if logprobs else None
            return body
        event = json.loads(data) if data else {}
        if not isinstance(event, dict) or event.get("error"):
            return event
        body["usage"] = event.get("usage") or body["usage"]
        for part in event.get("choices") or ():
            for name in ("content", "refusal"):
                text = (part.get("delta") or {}).get(name)
                message[name] = (message.get(name) or "") + text if text is not None else message.get(name)
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            logprobs += (part.get("logprobs") or {}).get("content") or []
    raise ConnectionError("the stream broke off")


class Client:
    """Asks an OpenAI-compatible endpoint, again where that can help. The key leaves this object in a header only."""

    def __init__(self, config):
        self.config, self.local, self.top_logprobs = config, threading.local(), 20
        try:
            url = urllib.parse.urlsplit(config.endpoint)
            self.host, self.port, self.path = url.hostname, url.port, url.path.rstrip("/")
        except ValueError:
            fail(f"--endpoint {config.endpoint} is not a URL")
        if url.scheme not in ("http", "https") or not self.host:
            fail(f"--endpoint {config.endpoint}: expected a URL such as http://localhost:8000/v1")
        if url.username or url.password or url.query:
            fail(f"--endpoint must not hold a key, since it is written to files: put it into ${config.api_key_env}")
        self.tls = ssl.create_default_context() if url.scheme == "https" else None
        self.key = os.environ.get(config.api_key_env, "").strip()
        if not re.fullmatch(r"[!-~]*", self.key):
            fail(f"${config.api_key_env} holds blanks, line breaks or signs that no key has")
        self.headers = {"Content-Type": "application/json", "User-Agent": "mvp_eval"}
        self.headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.gate = Gate(config.concurrency, config.rate)

    def clean(self, text):
        """Text of a server or an exception, without the key, should it repeat it."""
        return str(text).replace(self.key, "***") if self.key else str(text)

    def exchange(self, method, path, body=None):
        """One request on this thread's connection -> (status, headers, bytes, or object if it was streamed)."""
        connection, timeout = getattr(self.local, "connection", None), self.config.timeout
        reused = connection is not None
        if not reused and self.tls:
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=self.tls)
        elif not reused:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        self.local.connection = None
        try:
            connection.request(method, self.path + path, body, self.headers)
            response = connection.getresponse()
            if "text/event-stream" in response.getheader("Content-Type", ""):
                try:
                    answer = read_events(response, time.monotonic() + 10 * timeout)
                except (AttributeError, TypeError) as error:
                    raise ValueError(f"events that are no chat completion ({error})") from None
                connection.close()
            else:
                answer = response.read()
                self.local.connection = connection  # only a connection whose reply was read whole is used again
            return response.status, response.headers, answer
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            connection.close()
            if reused:  # servers close idle connections: that is no failure of this request
                return self.exchange(method, path, body)
            raise
        except BaseException:
            connection.close()
            raise

    def models(self):
        """Names that the server lists, [] if it does not say. Exits with 2 if nobody is there."""
        try:
            status, _, body = self.exchange("GET", "/models")
            return [model["id"] for model in json.loads(body)["data"]] if status == 200 else []
        except (ValueError, KeyError, TypeError, TimeoutError, ConnectionResetError, http.client.HTTPException):
            return []
        except OSError as error:
            fail(f"no server at {self.config.endpoint} ({self.clean(error)}): start it, or correct --endpoint")

    def refuse(self, status, text, model):
        """Raise Stop where a 4xx means that no question will be answered; else return the advice for this one."""
        c, said = self.config, self.clean(text)[:300]
        if 300 <= status < 400:
            raise Stop(f"{c.endpoint} redirects ({status}); give the address that it redirects to as --endpoint")
        if status in (401, 403):
            raise Stop(f"{c.endpoint} refuses the key in ${c.api_key_env} ({status}): {said}")
        if status == 404:
            raise Stop(f"{c.endpoint} knows no such path or model ({status}; --model {model}): {said}")
        if status == 400 and re.search(r"at most \d+ image|limit-mm-per-prompt|too many images", text, re.IGNORECASE):
            raise Stop(
                f"the server takes fewer images: --frames, or vLLM's --limit-mm-per-prompt image=N. It said: {said}"
            )
        if status == 400 and re.search("context length|context window|too long|maximum.*tokens", text, re.IGNORECASE):
            said += " (try fewer --frames or a smaller --size)"
        return said + (" (try a smaller --size, --quality or --frames)" if status == 413 else "")

    def ask(self, prompt, model, images=(), video=""):
        """-> {reply, finish_reason, usage, logprobs, attempts}; raises Failed, or Stop."""
        failure, attempt = "", 0
        while attempt <= self.config.retries:
            attempt, wait = attempt + 1, min(60.0, 2.0**attempt) * random.uniform(0.5, 1)
            payload = make_payload(self.config, model, prompt, images, video, self.top_logprobs)
            try:
                with self.gate:
                    status, headers, body = self.exchange("POST", "/chat/completions", json.dumps(payload).encode())
                if status == 200:
                    return read_reply(json.loads(body) if isinstance(body, bytes) else body) | {"attempts": attempt}
                text = body.decode(errors="replace") if isinstance(body, bytes) else json.dumps(body)
                failure = f"status {status}: {self.clean(text)[:300]}"
                if status == 400 and "top_logprobs" in text and payload.get("top_logprobs", 0) > 5:
                    self.top_logprobs = 5  # as old versions of vLLM have it
                    continue
                if status not in RETRY:
                    raise Failed(f"status {status}: {self.refuse(status, text, model)}", attempt)
                if status == 429:
                    self.gate.slow_down()
                wait = retry_after(headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = f"{type(error).__name__}: {self.clean(error)}"
            if attempt <= self.config.retries:
                time.sleep(wait)
        raise Failed(failure, attempt)


def retry_after(value, otherwise):
    """Seconds that a Retry-After header asks for (a number or a date), at most ten minutes; else `otherwise`."""
    if not value:
        return otherwise
    try:
        return min(600.0, max(0.0, float(value)))
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
        return min(600.0, max(0.0, (date - datetime.now(timezone.utc)).total_seconds()))
    except (ValueError, TypeError):
        return otherwise


def import_function(name):
    """'module:function' -> the function, the working folder on the path. Exits with 2 if there is none."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        fail(f"--fn {name}: {error}; expected module:function, the module in this folder or installed")
    if not callable(function):
        fail(f"--fn {name}: that is a {type(function).__name__}, not a function")
    return function


# ---------------------------------------------------------------------------------------------------------------------
# Asking: every question once, every answer kept
# ---------------------------------------------------------------------------------------------------------------------


def prompt_of(question, view):
    """The prompt; with the view "swapped" the candidates stand in the other order."""
    return make_prompt(question.question, question.candidates[:: -1 if view == "swapped" else 1])


def answer_key(config, model, view, question):
    """What an answer depends on, hashed: a run that resumes asks what has no answer under its key."""
    c = config
    settings = [view, question.subset, question.video_id, question.video_path, prompt_of(question, view), model]
    settings += [c.sampling, c.frames, c.fps, c.size, c.quality, c.order, c.frame_labels, c.video_url, c.score, c.seed]
    settings += [c.max_tokens, c.request_seed, c.extra]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def answer_row(question, view, config, key, **found):
    """A line of an answers file. It holds the reply as it came and no parsed letter: parsers improve, calls stay."""
    row = dict(key=key, system=view, subset=question.subset, split=config.split, video_id=question.video_id)
    row |= dict(source=question.source, candidates=question.candidates, answer_idx=question.answer_idx)
    return row | dict(score=config.score, time=datetime.now(timezone.utc).isoformat(timespec="seconds")) | found


def load_rows(files):
    """{key: row} of answers files: the last line with an answer counts, else the last error. Torn lines are ignored."""
    rows = {}
    for file in files:
        with open(file, "rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    if row["status"] == "ok" or rows.get(row["key"], row)["status"] != "ok":
                        rows[row["key"]] = row
                except (ValueError, KeyError, TypeError):
                    continue
    return rows


class Answers:
    """The answers files of a rank: one for each view, appended to, flushed line by line."""

    def __init__(self, out, rank):
        self.out, self.rank, self.files = out, rank, {}

    def path(self, system):
        """answers.rank0.jsonl for the model itself, answers.blind.rank0.jsonl and so on for other systems."""
        return self.out / f"answers.{'' if system == 'model' else system + '.'}rank{self.rank}.jsonl"

    def append(self, row):
        """Write a row. Exits with 1 if the disk is full: what was written before stays."""
        path = self.path(row["system"])
        try:
            if path not in self.files:
                self.files[path] = file = open(path, "a+b")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    fail(f"another process is writing {path}: wait for it, or choose another --out")
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read(1) == b"\n" else b"\n")  # end a line that a crash tore
            self.files[path].write(json.dumps(row).encode() + b"\n")
            self.files[path].flush()
        except OSError as error:
            fail(f"could not write {path}: {error}; all earlier answers are in it. Free some space, then --resume.", 1)

    def close(self):
        """Close the files, which lets go of their locks."""
        for file in self.files.values():
            file.close()


def show(question, view, frames, videos, config):
    """What is shown for a question: (frames, video data URL or '', indices of the frames as a list)."""
    if view == "blind":
        return [], "", []
    file = videos[question.video_path]
    if config.video_url:
        kind = {".webm": "webm", ".mkv": "x-matroska", ".avi": "x-msvideo"}.get(file.suffix.lower(), "mp4")
        return [], f"data:video/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}", []
    shown, indices = frames.load(file, "center" if view == "frame" else config.sampling)
    order = list(range(len(shown)))
    if view == "reverse":
        order.reverse()
    elif view == "shuffle":
        seed = int.from_bytes(hashlib.blake2b(question.video_id.encode(), digest_size=8).digest(), "little")
        order = np.random.default_rng(seed).permutation(len(shown)).tolist()
    return [shown[i] for i in order], "", [int(indices[i]) for i in order]


def endpoint_answers(work, client, frames, videos, config, model, stopped):
    """Ask an endpoint -> rows as they come, or Stop. work: (question, view, key)."""

    def ask(item):
        question, view, key = item
        try:
            images, video, indices = show(question, view, frames, videos, config)
        except (av.FFmpegError, ValueError, OSError) as error:
            bad = f"{question.video_path}: {error}"
            return answer_row(*item[:2], config, key, status="error", error=f"video {bad}", bad_video=bad)
        begun = time.monotonic()
        try:
            found = client.ask(prompt_of(question, view), model, images, video) | {"status": "ok", "error": None}
        except Failed as error:
            found = {"status": "error", "error": str(error), "attempts": error.attempts}
        latency = round(time.monotonic() - begun, 3)
        return answer_row(question, view, config, key, frame_idx=indices, latency_s=latency, **found)

    return in_flight(ask, work, config.concurrency, stopped)


def function_answers(work, function, frames, videos, config, stopped):
    """Ask a Python function -> rows as they come. Frames are decoded ahead; the function runs in the main thread."""

    def load(item):
        try:
            return item, show(item[0], item[1], frames, videos, config), None
        except (av.FFmpegError, ValueError, OSError) as error:
            return item, None, error

    def call(batch):
        asked, begun = [], time.monotonic()
        for (q, view, _), (images, _, _) in batch:
            row = {name: value for name, value in asdict(q).items() if name not in ("answer", "broken")}
            asked.append((list(images), prompt_of(q, view), row))
        try:
            replies = function(*map(list, zip(*asked))) if size else [function(*asked[0])]
            if len(replies) != len(batch):
                raise ValueError(f"{len(replies)} replies to {len(batch)} questions")
        except Exception as error:  # noqa: BLE001  whatever the user's function raises
            replies = [error] * len(batch)
        for ((question, view, key), (_, _, indices)), reply in zip(batch, replies, strict=True):
            if not isinstance(reply, (str, Exception)) and reply in (0, 1):
                reply = f"Answer: {'AB'[int(reply)]}"
            found = {"status": "ok", "reply": reply, "error": None}
            if not isinstance(reply, str):
                wrong = isinstance(reply, Exception)
                said = f"{type(reply).__name__}: {reply}" if wrong else f"expected a text, 0 or 1, not {reply!r:.100}"
                found = {"status": "error", "error": f"--fn: {said}"}
            latency = round((time.monotonic() - begun) / len(batch), 3)
            yield answer_row(question, view, config, key, frame_idx=indices, latency_s=latency, **found)

    size, batch = int(getattr(function, "batch_size", 0)), []
    for result in in_flight(load, work, config.concurrency, stopped):
        if stopped():
            return
        if isinstance(result, Exception):
            yield result
            return
        (item, shown, error) = result
        if error is not None:
            bad = f"{item[0].video_path}: {error}"
            yield answer_row(*item[:2], config, item[2], status="error", error=f"video {bad}", bad_video=bad)
            continue
        batch.append((item, shown))
        if len(batch) >= max(1, size):
            yield from call(batch)
            batch = []
    if batch:
        yield from call(batch)


def predict(row, stop_at_blank_line=False):
    """A line of an answers file -> (official, strict, margin): indices of the candidate, -1 unparsed; margin or None.

    With --score logprobs the first is what the log-probabilities say.
    """
    if row is None or row["status"] != "ok":
        return -1, -1, None
    swapped, margin = row["system"] == "swapped", None
    strict = parse_strict(row["reply"], row["candidates"][:: -1 if swapped else 1])
    if row["score"] == "logprobs":
        official, margin = option_scores(row.get("logprobs"))
    else:
        official = parse_official(row["reply"], stop_at_blank_line)
    if swapped:
        official, strict = (None if i is None else 1 - i for i in (official, strict))
        margin = None if margin is None else -margin
    return -1 if official is None else official, -1 if strict is None else strict, margin


def ask_all(questions, videos, config, model, asked, views, out, world, log):
    """Ask a Client or a function this rank's share of what has no answer yet.

    Returns the seconds it took, the number of questions asked, and the signal that stopped it or None.
    """
    have = load_rows(sorted(out.glob("answers*.jsonl")))
    pairs = pair_up(questions)
    rank_of = {stem: number % world.size for number, stem in enumerate(sorted(pairs))}
    mine = [questions[i] for pair, rows in pairs.items() if rank_of[pair] == world.rank for i in rows]
    work = [(q, view, answer_key(config, model, view, q)) for q in mine for view in views]
    todo = [item for item in work if have.get(item[2], {}).get("status") != "ok"]
    log.say(f"{len(work) - len(todo)} of {len(work)} questions are answered, {len(todo)} to ask")
    if not todo:
        return 0.0, 0, None
    log = Log(out, world, total=len(todo))
    log.catch_signals()
    if log.bar:
        log.bar.unit = "question"
    answers, frames = Answers(out, world.rank), Frames(config, encode=bool(config.endpoint))
    if isinstance(asked, Client):
        asked.models()  # is anybody there?
        results = endpoint_answers(todo, asked, frames, videos, config, model, lambda: log.stop)
    else:
        results = function_answers(todo, asked, frames, videos, config, lambda: log.stop)
    done = errors = row_errors = 0
    rights, begun, shown = defaultdict(list), time.monotonic(), time.monotonic()
    for row in results:
        if isinstance(row, Stop):
            fail(f"{row} ({done} answers are kept; then: {common.old_resume_command(out)})", row.code)
        if isinstance(row, Exception):
            raise row
        answers.append(row)
        done, failed = done + 1, row["status"] != "ok"
        errors += failed
        if "bad_video" in row:
            log.skip([row["bad_video"]], len(videos), 1.0 if config.allow_missing else config.max_bad)
        else:
            row_errors = row_errors + 1 if failed else 0
        if row_errors == 20:
            kept = f"all answers are kept; then: {common.old_resume_command(out)}"
            fail(f"20 questions in a row got no answer, the last one: {row['error']} ({kept})", 3)
        if row["system"] == "model":
            official, strict, _ = predict(row, config.stop_at_blank_line)
            stem = row["subset"], row["video_id"].rsplit("_", 1)[0]
            rights[stem].append((strict if config.parser == "strict" else official) == row["answer_idx"])
        if time.monotonic() - shown > (0.2 if log.bar else 5.0) or done == len(todo):
            shown, both = time.monotonic(), [all(r) for r in rights.values() if len(r) == 2]
            speed, accuracy = done / (shown - begun), f"{100 * sum(both) / len(both):.1f} %" if both else "-"
            if log.bar:
                log.bar.set_postfix(errors=errors, pair=accuracy, refresh=False)
                log.bar.update(done - log.bar.n)
            else:
                left = f"eta {(len(todo) - done) / speed:.0f} s"
                log.say(f"{done}/{len(todo)} questions, {speed:.1f}/s, {errors} errors, pair {accuracy}, {left}")
    answers.close()
    log.close()
    return time.monotonic() - begun, done, log.stop


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------

REPLICATES = 2000


def bootstrap(scores, generator):
    """Means of REPLICATES samples of the pairs, drawn with replacement: scores [P, K] -> [REPLICATES, K].

    Over pairs and not rows, since the two rows of a pair are not independent. In pieces, for the sake of memory.
    """
    pieces = [generator.integers(0, len(scores), (100, len(scores))) for _ in range(REPLICATES // 100)]
    return np.concatenate([scores[indices].mean(1) for indices in pieces])


def pair_scores(predicted, answers, pairs):
    """Predictions and answers int [N], pairs [P, 2] -> [P, 2]: 1 if both rows are right, and the share that is."""
    right = predicted[pairs] == answers[pairs]
    return np.stack([right.all(1), right.mean(1)], axis=1)


def score(questions, pairs, predictions, ok, config):
    """All numbers of one system -> {"macro", "configs", "sources"}, accuracies in percent.

    pairs: row numbers [P, 2] in order of first appearance; predictions: {"official", "strict": int [N], -1 unparsed};
    ok: bool [N], whether there is a reply. Macro: unweighted mean over the configs that have pairs.
    """
    parsers = [config.parser, *({"official", "strict"} - {config.parser})]
    answers, pairs = np.array([q.answer_idx for q in questions]), np.asarray(pairs).reshape(-1, 2)
    scores = np.concatenate([pair_scores(predictions[parser], answers, pairs) for parser in parsers], axis=1)  # [P, 4]
    subsets = np.array([questions[i].subset for i, _ in pairs])
    sources = np.array([questions[i].source for i, _ in pairs])

    def accuracies(means, replicates):
        low, high = 100 * np.percentile(replicates, [2.5, 97.5], axis=0)
        numbers = [[100 * float(m), [float(a), float(b)]] for m, a, b in zip(means, low, high)]
        values = dict(zip(("pair", "pair_ci", "single", "single_ci"), sum(numbers[:2], [])))
        return values | {parsers[1]: dict(zip(("pair", "pair_ci", "single", "single_ci"), sum(numbers[2:], [])))}

    def counts(chosen):
        rows = pairs[chosen]
        guess, there = predictions[parsers[0]][rows], ok[rows]
        given = guess[there & (guess >= 0)]
        both = scores[chosen, 1]
        return {
            "pairs": len(rows), "rows": 2 * len(rows),
            "unparsed": int((there & (guess < 0)).sum()), "errors": int((~there).sum()),
            "stuck": 100 * float(((guess[:, 0] == guess[:, 1]) & (guess[:, 0] >= 0)).mean()),
            "p_a": 100 * float((given == 0).mean()) if given.size else None,
            "both": int((both == 1).sum()), "one": int((both == 0.5).sum()), "none": int((both == 0).sum()),
        }  # fmt: skip

    result, replicates, generator = {"macro": {}, "configs": {}, "sources": {}}, [], np.random.default_rng(config.seed)
    for name in (name for name in CONFIGS if (subsets == name).any()):
        chosen = subsets == name
        replicates.append(bootstrap(scores[chosen], generator))
        result["configs"][name] = accuracies(scores[chosen].mean(0), replicates[-1]) | counts(chosen)
    for name in dict.fromkeys(sources.tolist()):
        chosen = sources == name
        own = bootstrap(scores[chosen], np.random.default_rng(config.seed))
        values = accuracies(scores[chosen].mean(0), own) | counts(chosen)
        result["sources"][name] = {"config": str(subsets[chosen][0])} | values
    if replicates:
        means = np.mean([scores[subsets == name].mean(0) for name in result["configs"]], axis=0)
        result["macro"] = accuracies(means, np.mean(replicates, axis=0)) | counts(np.ones(len(pairs), bool))
        result["macro"]["configs"] = len(replicates)
    return result


def mcnemar(a, b):
    """Exact two-sided p that two systems, right or not on the same pairs (bool [P]), are equally good."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    term = total = 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, total / 2 ** max(0, n - 1)) if n else 1.0


def compare(first, second, parser="official", seed=0):
    """Two answers files, or folders of runs, on the pairs that both answered -> a dict per config and "macro".

    Each holds pairs, a, b (pair accuracies), difference with its interval (bootstrap, the same pairs drawn for both),
    the same for single accuracy, and McNemar's exact p over pairs.
    """
    runs = []
    for path in map(Path, (first, second)):
        files = sorted(path.glob("answers.rank*.jsonl")) if path.is_dir() else [path] * path.is_file()
        if not files:
            what = "no answers.rank*.jsonl in it" if path.is_dir() else "no such file"
            fail(f"{path}: {what}; compare takes two folders of runs or two answers*.jsonl files")
        rows = load_rows(files).values()
        runs.append({(r["subset"], r["split"], r["video_id"]): r for r in rows if r["status"] == "ok"})
    a, b = runs
    stems = defaultdict(list)
    for key in sorted(a.keys() & b.keys()):
        if (a[key]["candidates"], a[key]["answer_idx"]) == (b[key]["candidates"], b[key]["answer_idx"]):
            stems[key[0], key[1], key[2].rsplit("_", 1)[0]].append(key)
    pairs = {stem: keys for stem, keys in stems.items() if len(keys) == 2}
    if not pairs:
        fail(f"{first} and {second} have no pair in common that both answered")
    which, generator = ("official", "strict").index(parser), np.random.default_rng(seed)
    means, replicates, both = {}, {}, {}
    for name in CONFIGS:
        if keys := [pair for stem, pair in pairs.items() if stem[0] == name]:
            right = [[[predict(run[k])[which] == run[k]["answer_idx"] for k in pair] for pair in keys] for run in runs]
            right = np.array(right)  # [2, P, 2]: run, pair, row
            both[name] = right.all(2)
            scores = np.concatenate([both[name], right.mean(2)]).T  # [P, 4]: pair a, pair b, single a, single b
            means[name], replicates[name] = scores.mean(0), bootstrap(scores, generator)
    means["macro"], replicates["macro"] = np.mean([*means.values()], axis=0), np.mean([*replicates.values()], axis=0)
    both["macro"], result = np.concatenate([*both.values()], axis=1), {}
    for name, mean in means.items():
        result[name] = {"pairs": both[name].shape[1], "p": mcnemar(*both[name])}
        for i, kind in ((0, "pair"), (2, "single")):
            ci = 100 * np.percentile(replicates[name][:, i] - replicates[name][:, i + 1], [2.5, 97.5])
            a, b = 100 * float(mean[i]), 100 * float(mean[i + 1])
            result[name][kind] = {"a": a, "b": b, "difference": a - b, "ci": ci.tolist()}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def as_table(rows, markdown=False):
    """Rows of texts, the first the header -> lines of a table, all columns but the first flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return [lines[0], rule if markdown else "-" * len(lines[0]), *lines[1:]]


def percent(values, key="pair"):
    """'25.0 [20.1, 30.2]' of a dict with key and key_ci."""
    low, high = values[f"{key}_ci"]
    return f"{values[key]:.1f} [{low:.1f}, {high:.1f}]"


def summary_table(systems, config):
    """A row for each system, and under them what the paper reports for the real set."""
    rows = [["pair accuracy, %", "macro", *CONFIGS.values(), "single", "unparsed", "errors"]]
    for name, result in systems.items():
        macro = result["macro"]
        cells = [f"{r['pair']:.1f}" if (r := result["configs"].get(c)) else "-" for c in CONFIGS]
        rows.append([name, percent(macro), *cells, percent(macro, "single"), str(macro["unparsed"])])
        rows[-1].append(str(macro["errors"]))
    for name, (pair, single) in CHANCE.items():
        rows.append([name, *[f"{pair:.1f}"] * 5, f"{single:.1f}", "-", "-"])
    for name, (full, mini) in PAPER.items():
        split = "mini" if mini and (config.split == "mini" or not full) else "full"
        numbers = mini if split == "mini" else full
        label = f"paper: {name}" + ("" if split == config.split else f" ({split} set)")
        rows.append([label, *(f"{value:.1f}" for value in numbers), "-", "-", "-"])
    return rows


def detail_table(name, result, parser):
    """Configs, and under each its sources, with everything that was counted."""
    other = "strict" if parser == "official" else "official"
    header = [name, "pairs", "rows", f"pair % ({parser})", "single %", f"{other} pair %", "unparsed", "errors"]
    rows = [[*header, "stuck %", "A %", "both/one/none"]]

    def line(label, r):
        share = "-" if r["p_a"] is None else f"{r['p_a']:.1f}"
        right = f"{r['both']}/{r['one']}/{r['none']}"
        cells = [str(r["pairs"]), str(r["rows"]), percent(r), percent(r, "single"), percent(r[other])]
        rows.append([label, *cells, str(r["unparsed"]), str(r["errors"]), f"{r['stuck']:.1f}", share, right])

    for config, values in result["configs"].items():
        line(config, values)
        for source, own in result["sources"].items():
            if own["config"] == config:
                line(f"  {source}", own)
    if result["macro"]:
        line(f"macro, {result['macro']['configs']} of 4 configs", result["macro"])
    return rows


def warnings_of(name, rows, predictions, ok):
    """What a reader should know before believing the numbers of a model -> list of sentences."""
    found, answered = [], max(1, int(ok.sum()))
    replies = [row["reply"] for row, there in zip(rows, ok) if there]
    differ = int(((predictions["official"] != predictions["strict"]) & ok).sum())
    if differ > 0.01 * answered:
        share = f"{differ} of {answered} replies ({100 * differ / answered:.1f} %)"
        found.append(f"{name}: the official parser and the strict one differ on {share}: the official number is noise")
    most = Counter(replies).most_common(1)
    if len(replies) >= 20 and most[0][1] > 0.9 * len(replies):
        found.append(f"{name}: {most[0][1]} of {len(replies)} replies are the same text: {most[0][0]!r:.80}")
    cut = sum(there and row.get("finish_reason") == "length" for row, there in zip(rows, ok))
    if cut > 0.01 * answered and rows[0] and rows[0]["score"] == "text":
        found.append(f"{name}: {cut} replies were cut off at --max-tokens")
    unparsed = int(((predictions["official"] < 0) & ok).sum())
    if unparsed and name == "model":
        official = "as the first candidate, as the official code has it"
        found.append(f"{unparsed} unparsed replies stand in submissions/ {official}")
    return found


def write_submissions(folder, questions, predicted, ok, split):
    """The leaderboard's files, one a config: the text of the predicted candidate, the first one where unparsed."""
    folder.mkdir(exist_ok=True)
    name = "mvp_mini" if split == "mini" else "mvp"
    for config in dict.fromkeys(q.subset for q in questions):
        with open(folder / f"{name}_{config}_valid.jsonl", "w", encoding="utf-8") as file:
            for i, q in enumerate(questions):
                if q.subset == config and ok[i]:
                    answer = q.candidates[max(0, int(predicted[i]))]
                    row = dict(data_name=name, row_id=q.video_id, model_answer=answer, task=config)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def list_failures(questions, pairs, rows, predictions, ok, config):
    """Pairs that are not right on both rows, with all that was said -> list of dicts, the lines of failures.jsonl."""
    failures, predicted = [], predictions[config.parser]
    for pair in pairs:
        if all(predicted[i] == questions[i].answer_idx for i in pair):
            continue
        first, lines = questions[pair[0]], []
        for i in pair:
            q, row = questions[i], rows[i] or {"error": "not asked yet"}
            line = dict(video_id=q.video_id, video_path=q.video_path, answer_idx=q.answer_idx)
            line |= dict(predicted=int(predicted[i])) | {name: int(values[i]) for name, values in predictions.items()}
            lines.append(line | dict(reply=row["reply"] if ok[i] else None, error=None if ok[i] else row["error"]))
        failure = dict(subset=first.subset, source=first.source, stem=first.stem, question=first.question)
        failures.append(failure | dict(candidates=first.candidates, rows=lines))
    return failures


def draw_failures(failures, videos, most=24, columns=3, frames=6, tile=72, letters=76, line=14):
    """Contact sheet of failed pairs, spread over the sources: for each video a strip, the candidates (the right one
    green, the given one marked, and red if it is wrong), and how the reply begins. failures: of `list_failures`."""
    by_source = defaultdict(list)
    for failure in failures:
        by_source[failure["source"]].append(failure)
    chosen = [f for i in range(most) for members in by_source.values() for f in members[i : i + 1]][:most]
    width, height = frames * tile + 12, 3 * line + 2 * (tile + 3 * line + 6) + 12
    sheet = Image.new("RGB", (min(columns, len(chosen)) * width, math.ceil(len(chosen) / columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number, failure in enumerate(chosen):
        x, y = number % columns * width + 6, number // columns * height + 6
        question = textwrap.wrap(failure["question"], letters)[:2]
        texts = [(f"{failure['source']}  {failure['stem']}", "gray"), *((part, "black") for part in question)]
        for row in [None, *failure["rows"]]:
            if row is not None:
                images = []
                if row["video_path"] in videos:
                    try:
                        choose = lambda total, rate: frame_indices("linspace", total, rate, frames)  # noqa: E731
                        images = decode(videos[row["video_path"]], choose)[0]
                    except (av.FFmpegError, ValueError, OSError):
                        pass  # the strip stays white, and the error stands below it
                for i, image in enumerate(images):
                    image = image.resize([max(1, round(side * tile / max(image.size))) for side in image.size])
                    sheet.paste(image, (x + i * tile + (tile - image.width) // 2, y + (tile - image.height) // 2))
                y, texts = y + tile + 2, []
                for i, candidate in enumerate(failure["candidates"]):
                    colour = "green" if row["answer_idx"] == i else "red" if row["predicted"] == i else "black"
                    texts.append((f"{'>' if row['predicted'] == i else '  '} ({'AB'[i]}) {candidate}", colour))
                texts.append((f"    {row['error'] or 'said: ' + repr(row['reply'][:120])}", "gray"))
            for text, colour in texts:
                draw.text((x, y), text[:letters].encode("latin-1", "replace").decode("latin-1"), colour, font)
                y += line
            y += 4 if row is not None else 0
    return sheet


def rows_of_systems(questions, pairs, videos, config, model, out, warnings):
    """{system: its row of an answers file, or None, for each question}: what a model was asked, and the baselines.

    Baselines are answered here, and their answers written, so that `compare` can read them.
    """
    free, views = systems_of(config)
    have, found = load_rows(sorted(out.glob("answers*.jsonl"))), {}
    for view in views:
        found[view] = [have.get(answer_key(config, model, view, q)) for q in questions]
    for name in free:
        try:
            predicted = free_baseline(name, questions, pairs, videos, config.seed)
        except (av.FFmpegError, ValueError, OSError) as error:
            warnings.append(f"the baseline {name} could not run: {error}")
            continue
        plain, found[name] = replace(config, score="text"), []
        for q, choice in zip(questions, predicted, strict=True):
            said = dict(status="ok", reply=f"Answer: {'AB'[int(choice)]}", error=None)
            found[name].append(answer_row(q, name, plain, f"{name}:{q.subset}:{q.video_id}", **said))
        Answers(out, 0).path(name).write_text("".join(json.dumps(row) + "\n" for row in found[name]))
    return found


def make_report(questions, pairs, videos, config, model, out, log, interrupted, warnings, timing):
    """Score everything that was asked, and the baselines; write report.json, report.md, failures.jsonl, picture.png,
    submissions/, and print the tables. Returns whether answers of the model are missing."""
    systems, incomplete, failures, headline, margins = {}, {}, [], None, {}
    rows_of = rows_of_systems(questions, pairs, videos, config, model, out, warnings)
    predicted = {}
    for name, rows in rows_of.items():
        official, strict, margins[name] = zip(*(predict(row, config.stop_at_blank_line) for row in rows))
        ok = np.array([row is not None and row["status"] == "ok" for row in rows])
        predicted[name] = {"official": np.array(official), "strict": np.array(strict)}, ok
    if config.debias:
        (_, ok), (_, ok_swapped) = predicted["model"], predicted["swapped"]
        sums = [None if None in both else sum(both) for both in zip(margins["model"], margins["swapped"])]
        chosen = np.array([-1 if total is None else int(total < 0) for total in sums])
        predicted["debiased"] = {"official": chosen, "strict": chosen}, ok & ok_swapped
        warnings.append("debiased (both orders, log-probabilities averaged) is not the paper's protocol")
    if config.video_url:
        warnings.append("--video-url: the server sampled the frames, often 1 or 2 a second")
    for name, (predictions, ok) in predicted.items():
        complete = [pair for pair in pairs if ok[list(pair)].all()]
        missing = [questions[pair[0]].stem for pair in pairs if not ok[list(pair)].all()]
        scored = complete if config.allow_missing or interrupted else pairs
        if missing:
            incomplete[name] = missing
            treated = "left out" if scored is complete else "counted as wrong where there is no answer"
            warnings.append(f"{name}: {len(missing)} pairs are incomplete, {treated}, such as {missing[0]}")
        if not scored:
            continue
        systems[name] = score(questions, scored, predictions, ok, config)
        systems[name]["differ"] = int(((predictions["official"] != predictions["strict"]) & ok).sum())
        known = [abs(margin) for margin in margins.get(name, ()) if margin is not None]
        systems[name] |= {"mean_margin": float(np.mean(known))} if known else {}
        if name in ("model", *VIEWS) and config.endpoint + config.fn:
            warnings += warnings_of(name, rows_of[name], predictions, ok)
        if name == "model" or (name == "frame" and "model" not in predicted) or headline is None:
            headline = name
            failures = list_failures(questions, scored, rows_of.get(name, ()), predictions, ok, config)
    (out / "failures.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failures))
    if failures:
        draw_failures(failures, videos).save(out / "picture.png")
    if "model" in predicted:
        predictions, ok = predicted["model"]
        write_submissions(out / "submissions", questions, predictions["official"], ok, config.split)

    sizes = {c: sum(questions[i].subset == c for i, _ in pairs) for c in CONFIGS}
    data = {"rows": 2 * len(pairs), "pairs": len(pairs), "pairs_by_config": sizes, "sha256": data_hash(questions)}
    data["prompt_sha256"] = hashlib.sha256(make_prompt("{question}", ("{a}", "{b}")).encode()).hexdigest()
    versions = {"python": platform.python_version(), "av": av.__version__, "numpy": np.__version__}
    versions |= {"torch": torch.__version__, "pillow": Image.__version__}
    report = {"config": asdict(config), "model": model, "data": data, **systems.get("model", {}), "systems": systems}
    report |= {"incomplete": incomplete, "warnings": warnings, "versions": versions, "timing": timing}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    where = "the toy set" if config.data == "toy" else f"{config.data}, {config.split}"
    head = [f"{len(pairs)} pairs ({2 * len(pairs)} questions) of {where}; intervals: 95 %, bootstrap over pairs."]
    head += ["The paper's numbers are for the real videos, not for these toy ones."] * (config.data == "toy")
    tables = [summary_table(systems, config)]
    tables += [detail_table(headline, systems[headline], config.parser)] if headline else []
    text, page = head, [f"# Minimal Video Pairs: {model or 'shortcut baselines'}", "", *head]
    for table in tables:
        text, page = text + ["", *as_table(table)], page + ["", *as_table(table, markdown=True)]
    settings = ", ".join(f"{k} {v}" for k, v in asdict(config).items() if v not in ("", None))
    page += ["", *(f"- Warning: {warning}" for warning in warnings), "", f"Settings: {settings}."]
    (out / "report.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    log.say("\n".join(text + [f"warning: {warning}" for warning in warnings]))
    files = f"{out}/report.md, report.json, failures.jsonl"
    log.say(files + (f", picture.png (pairs that {headline} failed: {len(failures)})" if failures else ""))
    log.write(report={name: result["macro"] for name, result in systems.items()})
    return any(name in incomplete for name in ("model", "swapped", *VIEWS))


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def data_place(config, out):
    """(annotations, root of the videos) that --data and --videos mean. Exits with 2 if there are none."""
    store = Path(os.environ.get("DATA", "data"))
    if config.data == "toy":
        path = out / "toy"
    elif config.data == "hub":
        path = store / "mvp"
    else:
        path = Path(config.data).expanduser()
        path = path if path.exists() else store / config.data
        if not path.exists():
            fail(f"no annotations at {config.data}, nor at {path}; --data hub downloads them into {store / 'mvp'}")
    root = Path(config.videos).expanduser() if config.videos else (path.parent if path.is_file() else path) / "videos"
    return path, root


def valid_pairs(questions, config, notes):
    """Leave out invalid pairs if --allow-missing, exit with 2 otherwise; apply --limit -> questions."""
    problems = validate(questions)
    if problems:
        some = "; ".join(f"{stem} ({reason})" for (_, stem), reason in list(problems.items())[:5])
        if not config.allow_missing:
            fail(f"{len(problems)} pairs are no minimal pairs: {some}. --allow-missing leaves them out")
        notes.append(f"{len(problems)} invalid pairs are left out: {some}")
        questions = [q for q in questions if (q.subset, q.stem) not in problems]
    if config.limit:
        kept = set()
        for name in CONFIGS:
            stems = [pair for pair in pair_up(questions) if pair[0] == name]
            order = torch.randperm(len(stems), generator=common.old_generator(config.seed, "limit", name))
            kept |= {stems[i] for i in order[: config.limit]}
        questions = [q for q in questions if (q.subset, q.stem) in kept]
    if not questions:
        fail("no valid pair is left")
    return questions


def find_videos(questions, root, config, notes):
    """{video_path: file}; pairs without their videos are left out if --allow-missing, else exit 2 -> both."""
    videos = {path: resolve(root, path) for path in dict.fromkeys(q.video_path for q in questions)}
    missing = [path for path, file in videos.items() if file is None]
    if missing:
        if not config.allow_missing:
            counts = ", ".join(f"{s} {n}" for s, n in Counter(path.split("/")[0] for path in missing).items())
            ways = "--check says more, --allow-missing runs the pairs that are complete, --videos names another root"
            ways += "" if config.endpoint or config.fn else f"; --baseline {','.join(TEXT_BASELINES)} needs no videos"
            fail(f"{len(missing)} of {len(videos)} videos are not in {root} ({counts}), such as {missing[0]}. {ways}")
        gone = {(q.subset, q.stem) for q in questions if videos[q.video_path] is None}
        questions = [q for q in questions if (q.subset, q.stem) not in gone]
        notes.append(f"{len(gone)} pairs are left out, since {len(missing)} videos are missing")
        if not questions:
            fail(f"no pair has both of its videos in {root}; --check says what is missing")
    return questions, {path: file for path, file in videos.items() if file is not None}


def tend_videos(config):
    """--check and --prepare -> exit code: 0 if all videos are there and can be opened."""
    path, root = data_place(config, Path("runs"))
    if config.data == "toy":
        fail("--check and --prepare are for videos that you downloaded: say which by --data")
    if config.data == "hub":
        download_annotations(path, config.split)
    questions = read_annotations(path, config.split)
    if config.prepare and not Path(config.prepare).is_dir():
        fail(f"--prepare {config.prepare}: no such folder; expected one with folders {', '.join(ORIGINS)}")
    if config.prepare:
        prepare_videos(questions, Path(config.prepare), root)
    return 0 if check_videos(questions, root) else 1


def stored_config(config, given, out):
    """For --report: the settings of the run in `out`, with the flags that were typed now on top."""
    if not (out / "config.json").exists():
        fail(f"--report computes the report of a run again, but {out} holds none")
    known = {f.name for f in fields(Config)}
    stored = {k: v for k, v in json.loads((out / "config.json").read_text()).items() if k in known}
    config = Config(**stored | {name: getattr(config, name) for name in given & known})
    check(config)
    return config


def run(config, given):
    """Ask and report; returns the exit code. given: names of the flags that were typed."""
    check(config)
    # ranks finish at different times: let them wait for days
    world, notes = common.old_start_world("cpu", timedelta(days=30)), []
    function = import_function(config.fn) if config.fn and not config.report else None
    client = Client(config) if config.endpoint and not config.report else None
    if config.check or config.prepare:
        return tend_videos(config)
    out = common.old_choose_out(config.out, Path(__file__).stem, config.resume or config.report, world)
    if config.report:
        config = stored_config(config, given, out)
    free, views = systems_of(config)
    log = Log(out, world)
    path, root = data_place(config, out)
    if world.rank == 0:
        if config.data == "toy":
            write_toy(path, config.scenes, config.seed)
        elif config.data == "hub":
            download_annotations(path, config.split)
    model, earlier = config.fn or (config.model if config.endpoint else ""), out / "config.json"
    if client and model == "auto" and config.resume and earlier.exists():
        model = json.loads(earlier.read_text())["model"]
    if client and model == "auto":
        names = client.models()
        if not names:
            fail(f"{config.endpoint} does not list its models: name one by --model")
        model = names[0]
    if world.size > 1:
        dist.barrier()
    questions = valid_pairs(read_annotations(path, config.split), config, notes)
    videos = {}
    if not config.report and ({"model", "frame", "shuffle", "reverse", "swapped"} & {*views, *free}):
        questions, videos = find_videos(questions, root, config, notes)
    elif config.report:
        videos = {q.video_path: file for q in questions if (file := resolve(root, q.video_path))}
    pairs = list(pair_up(questions).values())
    log.say(f"{len(questions)} questions = {len(pairs)} pairs; {len(videos)} videos; run folder {out}")

    if world.rank == 0 and not config.report:
        stored = asdict(config) | ({"model": model} if config.endpoint else {})
        with common.old_replacing(out / "config.json") as file:  # --resume reads it, and may come after a kill
            file.write(json.dumps(stored, indent=2).encode() + b"\n")
    seconds, asked, stop = 0.0, 0, None
    if views and not config.report:
        seconds, asked, stop = ask_all(questions, videos, config, model, client or function, views, out, world, log)
    interrupted = log.agree(stop)  # waits for all ranks
    if world.rank:
        return 0
    timing = {"questions": asked, "seconds": round(seconds, 2), "memory_gib": round(common.old_memory_gib(world.device), 2)}
    if asked:
        speed = f"{asked} questions in {seconds:.1f} s, {asked / seconds:.1f} a second"
        log.say(f"{speed}; {timing['memory_gib']} GiB of memory at most")
    incomplete = make_report(questions, pairs, videos, config, model, out, log, interrupted, notes, timing)
    if interrupted:
        log.say(f"stopped. To continue: {common.old_resume_command(out)}")
        return 0
    if incomplete and not config.allow_missing:
        log.say(f"some questions have no answer. To ask them again: {common.old_resume_command(out)}")
        return 1
    return 0


def main_compare(argv):
    """python mvp_eval.py compare A B [strict]: the table of `compare`."""
    if len(argv) not in (2, 3) or argv[2:] not in ([], ["strict"], ["official"]):
        fail("compare takes two folders of runs or answers*.jsonl files, and perhaps the word strict")
    rows = [["A - B, %", "pairs", "A", "B", "pair difference", "single difference", "McNemar p (pairs)"]]
    for name, r in compare(*argv[:2], *argv[2:]).items():
        cells = [f"{r[k]['difference']:+.1f} [{r[k]['ci'][0]:+.1f}, {r[k]['ci'][1]:+.1f}]" for k in ("pair", "single")]
        rows.append([name, str(r["pairs"]), f"{r['pair']['a']:.1f}", f"{r['pair']['b']:.1f}", *cells, f"{r['p']:.2g}"])
    print(f"A: {argv[0]}\nB: {argv[1]}")
    print("\n".join(as_table(rows)))
    return 0


def main(argv=None):
    """The command line; see --help."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["compare"]:
            return main_compare(argv[1:])
        about = (
            __doc__.split("\n\n")[0] + "\n\nmvp_eval.py compare A B: two runs' folders or answers files, a paired test."
        )
        config = common.old_parse_config(Config, PRESETS, DATA_PRESETS, argv, about)
        code = run(config, common.old_given_flags(argv))
    except OSError as error:
        common.old_fail_if_full(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
