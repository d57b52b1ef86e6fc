# SPDX-License-Identifier: MIT
"""MVP: shortcut-aware video question answering, measured on minimal pairs of videos.

"A Shortcut-aware Video-QA Benchmark for Physical Understanding via Minimal Video Pairs", Krojer,
Komeili, Ross, Garrido, Sinha, Ballas, Assran, 2025, arXiv 2506.09987.

The idea. On most video benchmarks, models that see no video, or one frame, score far above chance:
the question, the options or one picture give the answer away. MVP asks the same question with the
same two options about two videos that look alike and have opposite answers. A pair counts only if
both answers are right. So whatever does not look at the video, and answers deterministically,
scores exactly 0. A coin scores 25 %, people 93 %.

    annotations -> checked pairs --.
                                   |--> prompt -> model -> reply --> official parser --> accuracy of
    videos -> 16 frames of T ------'     endpoint or function    '-> strict parser       pairs, rows
         '--> shortcuts: a coin, the longest option, one frame, no frame --> the same accuracies

    python mvp_eval.py                                            # toy pairs and shortcuts, seconds
    python mvp_eval.py --data hub --videos ROOT --check           # which videos are missing
    python mvp_eval.py --data hub --videos ROOT --endpoint http://localhost:8000/v1 --baseline blind
    python mvp_eval.py --data hub --videos ROOT --fn mymodel:answer    # any function, or torchrun
    python mvp_eval.py compare runs/a runs/b                      # paired, on the pairs of both

Departures from the official code. A failed request is never an answer: it is asked again. Beside
the official parser, which reads "banana" as A, stands a strict one. A pair with an unanswered row
is named, counts as wrong, and makes the run exit with 1. Intervals come from a bootstrap over
pairs. Frames are counted by decoding, since headers lie.
"""

import ast
import base64
import collections
import contextlib
import functools
import hashlib
import http.client
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

import common
from common import fail, note

# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every field is a flag. The comment beside it is its help."""

    preset: str = ""  # a name of PRESETS, by default the one that fits --data

    # data
    data: str = "toy"  # toy, hub (downloads the annotations), or a folder of CONFIG/SPLIT.jsonl
    split: Literal["mini", "full"] = "mini"  # mini has 9,208 pairs, full 27,414
    videos: str = ""  # root folder of the videos, default DATA/videos
    limit: int = 0  # this many pairs of each config, a seeded choice; 0 = all
    allow_missing: bool = False  # leave out invalid pairs and pairs without their videos
    check: bool = False  # only say which videos are missing or broken, per source
    scenes: int = 6  # toy: scenes a source, each 4 pairs

    # model
    endpoint: str = ""  # base URL of an OpenAI-compatible server, such as http://localhost:8000/v1
    model: str = "auto"  # its model, auto = the first that the server lists
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key
    fn: str = ""  # module:function, called as function(frames, prompt, row) -> reply, or 0 or 1
    baseline: str = "random,first,longest"  # also frame, oracle; with a model blind; or none

    # frames and requests
    frames: int = 16  # frames a video
    sampling: Literal["uniform", "segments", "center", "qwen2vl"] = "uniform"  # which frames
    size: int = 448  # longer side of a frame, pixels; never scaled up
    frame_labels: bool = False  # write "Frame i:" before each image
    video_url: bool = False  # send the file itself instead of frames; the server then samples
    max_tokens: int = 1024  # longest reply
    extra: str = ""  # JSON merged into each request, such as {"top_k": 1}; null removes a field
    concurrency: int = 16  # requests in flight a rank
    retries: int = 6  # tries after the first, on 429, 5xx, timeouts and broken replies
    timeout: float = 120.0  # seconds without a byte of reply

    # run
    seed: int = 0  # seed of toy, coin, --limit, bootstrap and requests
    out: str = ""  # folder of the run, default runs/mvp_eval, runs/mvp_eval-2, ...
    resume: bool = False  # go on in the run's folder: ask only what has no answer yet


# --------------------------------------------------------------------------------------------------
# Annotations: rows, pairs, and whether they are minimal pairs
# --------------------------------------------------------------------------------------------------

HUB = "https://datasets-server.huggingface.co/rows?dataset=facebook/minimal_video_pairs"
# what reading an object raises that is not as it should be
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
SUBSETS = (  # the data set calls them configs
    "human_object_interactions",
    "robot_object_interactions",
    "intuitive_physics",
    "temporal_reasoning",
)


@dataclass(frozen=True)
class Question:
    """One row of the data set: a video, a question about it, two candidates."""

    subset: str
    video_id: str
    video_path: str
    question: str
    answer: str
    candidates: tuple
    source: str

    @property
    def pair(self):
        """What the two rows of a pair share: subset, and the id before its last underscore."""
        return self.subset, self.video_id.rsplit("_", 1)[0]

    @property
    def answer_idx(self):
        """Which candidate is right, 0 or 1."""
        return self.candidates.index(self.answer)


def make_question(row, subset):
    """Return the Question of a row, a dict. What is missing is empty."""
    texts = {name: str(row.get(name) or "") for name in Question.__dataclass_fields__}
    try:  # candidates are a Python list, written as text
        candidates = tuple(map(str, ast.literal_eval(texts["candidates"])))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        candidates = ()
    path = texts["video_path"].lstrip("/")
    texts["source"] = texts["source"] or path.split("/")[0]
    texts.update(subset=subset, candidates=candidates, video_path=path)
    return Question(**texts)


def read_annotations(folder, split):
    """Return the Questions of folder/CONFIG/SPLIT.jsonl. Exit with 2 if there are none."""
    questions = []
    for subset in SUBSETS:
        path = folder / subset / f"{split}.jsonl"
        if path.exists():
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")
                rows = map(json.loads, filter(str.strip, lines))
                questions += [make_question(row, subset) for row in rows]
            except (OSError, *MALFORMED) as error:
                fail(f"cannot read the annotations {path}: {error}; expected an object a line")
    if not questions:
        expected = f"CONFIG/{split}.jsonl, CONFIG one of {', '.join(SUBSETS)}"
        fail(f"no annotations in {folder}: expected {expected}. --data hub downloads them")
    return questions


def fetch_page(url, folder, pause):
    """Return a page of the Hub's rows. Exit with 2 if it does not come."""
    failure = "an empty page"
    for attempt in range(5):
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                page = json.load(response)
            if page["rows"]:
                return page
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            failure = error
        time.sleep(pause * 2**attempt)
    fail(f"cannot download {url}: {failure}; put CONFIG/SPLIT.jsonl into {folder} by hand")


def download_annotations(folder, split, pause=2.0):
    """Page the Hub's rows into folder/CONFIG/SPLIT.jsonl. Files that are there stay."""
    for subset in SUBSETS:
        path = folder / subset / f"{split}.jsonl"
        lines = []
        total = 0 if path.exists() else 1
        while len(lines) < total:
            url = f"{HUB}&config={subset}&split={split}&offset={len(lines)}&length=100"
            page = fetch_page(url, folder, pause)
            total = page["num_rows_total"]
            lines += [json.dumps(item["row"]) + "\n" for item in page["rows"]]
        if lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            with common.replacing(path) as file:
                file.write("".join(lines).encode())


def problem_of(pair, root, looks):
    """Return why these rows are no minimal pair, or "". looks: whether their videos are needed."""
    if len(pair) != 2:
        return f"{len(pair)} rows share its id, not two"
    for q in pair:
        inside = q.video_path and ".." not in q.video_path.split("/")
        if not q.question or not inside or len(q.candidates) != 2 or q.answer not in q.candidates:
            return f"it needs a question, a path below {root}, and an answer of two candidates: {q}"
        if looks and not (root / q.video_path).is_file():
            return f"there is no {root / q.video_path}"
    wanted = {"question": 1, "candidates": 1, "answer": 2, "video_path": 2, "video_id": 2}
    for name, count in wanted.items():
        if len({getattr(q, name) for q in pair}) != count:
            return f"{name} must have {count} values in its rows"
    return ""


# --------------------------------------------------------------------------------------------------
# Prompt and parsers
# --------------------------------------------------------------------------------------------------

INSTRUCTION = (
    "Even when unsure, always answer with a single letter from A or B, "
    "format exactly like: 'Answer: A/B'."
)
LETTER = r"(?<!\w)([ab])(?!\w)"  # one that touches no other letter
ALONE = r"\A\W*([ab])\W*\Z"
BOTH = rf"\A\W*{LETTER}\W*(?:[/,&]|or|and)\W*{LETTER}\W*\Z"
THOUGHT = r"(?:think|thinking|reasoning)>"
BOXED = r"\\boxed\{(?:\\text\{([^{}]*)\}|([^{}]*))\}"
# "answer: a.", "the correct option is (B)", "Answer: A because ..."
DECLARED = (
    r"(?<!\w)(?:answer|assistant|(?:correct|best|right)\s*(?:option|choice))(?!\w)"
    r"\s*(?:(?:is|was|would\s+be|should\s+be)(?!\w))?"
    r"\s*(?:[:=\-–]\s*)*(?:(?:option|choice)(?!\w))?\s*[(\[]?\s*"
    + LETTER
    + r"(?:[)\].,:;!]|[^\S\n]*(?:\n|$)|\s+(?:because|since|as|for|and|but|so)(?!\w))"
)
# "A) ...", "(b) ...", "B because ..." at the start of a line, but not "A) or B)"
LABEL = (
    r"\W{0,3}(?:(?:([AB])[).:,;\]]|([ab])[)\]])"
    r"(?!\s*(?:(?:[oO][rR]|[aA][nN][dD])(?!\w)|[/&]))"
    r"|([ABab])\s+(?i:because|since|as)(?!\w))"
)
POINTED = rf"\(\s*([ab])\s*\)|\[\s*([ab])\s*\]|(?<!\w)(?:option|choice)\s+{LETTER}"


def make_prompt(question):
    """Return the official prompt, byte for byte: even the space before the last line break."""
    a, b = question.candidates
    return f"Question: {question.question}\nOption:\n(A) {a}\n(B) {b} \n{INSTRUCTION}"


def parse_official(reply):
    """Return what the official parser reads: 0, 1 or None.

    Any word that ends in a or b counts, and the second match wins: "banana" is A, and so is
    "Answer: B because a ball falls". Kept as it is, since published numbers come from it.
    """
    text = re.sub(r"\s+", " ", reply.lower())  # changes no match; blanks would stall the search
    letters = re.findall(r"(?:answer|assistant)?:?\s*([ab])\b", text)
    return "ab".index(letters[:2][-1]) if letters else None


def plain(text):
    """Return text without markup signs, NFKC."""
    return re.sub(r'[*_`"#$“”„‟]', "", unicodedata.normalize("NFKC", text)).strip()


def words_of(text):
    """Return letters and digits in lower case, a space around each word."""
    words = re.sub(r"[\W_]+", " ", text.lower()).strip()
    return f" {words} "


def labels_of(text):
    """Return the letters, 0 or 1, that label the first and the last line."""
    lines = text.split("\n")
    labels = set()
    for line in (lines[0], lines[-1]):
        match = re.fullmatch(r"\W*([AB])\W*", line) or re.match(LABEL, line)
        if match:
            labels.add("AB".index(match[match.lastindex].upper()))
    return labels


def held_candidates(text, candidates):
    """Return the candidates, 0 or 1, whose text the reply has; the longer of two nested ones."""
    words = words_of(text)
    options = [words_of(plain(candidate)) for candidate in candidates]

    held = set()
    for i in (0, 1):  # yes and no are too short to be looked for
        short = options[i] in (" yes ", " no ") and options[i] != words
        if options[i].strip() and options[i] in words and not short:
            held.add(i)
    if len(held) == 2:
        held = {i for i in held if options[i] not in options[1 - i]}
    return held


def parse_strict(reply, candidates):
    """Return what a reply says, 0, 1 or None. The first rule that fits decides."""
    if not isinstance(reply, str):
        return None
    text = unicodedata.normalize("NFKC", reply)
    thoughts = re.split("</" + THOUGHT, text, flags=re.I)
    text = thoughts[-1]
    if len(thoughts) == 1 and re.search("<" + THOUGHT, text, re.I):  # cut off while thinking
        return None
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.I | re.S)
    if tagged:
        text = tagged[-1]
    text = plain(re.sub(BOXED, r" Answer: \1\2. ", text, flags=re.I))
    text = re.sub(r"\s+", lambda run: "\n" if "\n" in run[0] else " ", text)

    if not text or re.search(BOTH, text, re.I):
        return None
    # it is a letter; or it declares one, and the last declaration counts
    for pattern in (ALONE, DECLARED):
        letters = re.findall(pattern, text, re.I)
        if letters:
            return "ab".index(letters[-1].lower())

    # its first or last line is labelled, it holds one candidate, or it points to one letter
    pointed = ["".join(groups).lower() for groups in re.findall(POINTED, text, re.I)]
    pointed = {"ab".index(letter) for letter in pointed}
    for found in (labels_of(text), held_candidates(text, candidates), pointed):
        if len(found) == 1:
            return found.pop()

    # the candidates begin with yes and no, and so does the reply
    firsts = [words_of(plain(candidate)).split(" ")[1] for candidate in candidates]
    begins = re.match(r"(yes|no)(?:[,.;:!]|$)", text, re.I)
    if begins and set(firsts) == {"yes", "no"}:
        return firsts.index(begins[1].lower())
    return None


# --------------------------------------------------------------------------------------------------
# Frames
# --------------------------------------------------------------------------------------------------

VIDEO_ERRORS = (av.FFmpegError, OSError, ValueError, IndexError)  # what a broken file raises


def frame_indices(rule, total, rate, n):
    """Return which of a clip's `total` frames are shown, int64 [up to n]; rate: frames a second.

    uniform: n frames from the first to the last, each once. segments: the middles of n segments
    (InternVL2, VideoChat2). qwen2vl: uniform among two frames a second, as lmms-eval shows them.
    center: the one that single-frame baselines see.
    """
    if rule == "center":
        indices = [total // 2]
    elif rule == "segments":
        length = (total - 1) / n
        indices = [int(length / 2 + np.round(length * i)) for i in range(n)]
    elif rule == "qwen2vl":
        count = int(min(max(total / rate * 2, 4), 768, total)) // 2 * 2
        if count < 2:
            raise ValueError("--sampling qwen2vl needs a clip of two frames or more")
        indices = np.round(np.linspace(0, total - 1, count))
        indices = indices[np.unique(np.linspace(0, count - 1, n, dtype=int))]
    else:
        indices = np.unique(np.linspace(0, total - 1, min(total, n), dtype=int))
    return np.asarray(indices, dtype=np.int64)


def decode(path, rule, n, size=10**6, total=0):
    """Return (upright RGB images, their indices) of a video, by a rule of `frame_indices`.

    size: longest side of an image, pixels; total: number of frames, if known. Raises VIDEO_ERRORS.
    """
    images = {}
    count = 0
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        stream.thread_type = "NONE"  # clips are decoded side by side, one thread each
        rate = float(stream.average_rate or 25)
        total = total or stream.frames or 1
        indices = frame_indices(rule, total, rate, n).tolist()
        for packet in video.demux(stream):
            frames = []
            with contextlib.suppress(av.FFmpegError):  # damaged packets are stepped over
                frames = packet.decode()
            for frame in frames:
                if count in indices:
                    image = frame.to_image()
                    image.thumbnail((size, size), Image.BICUBIC, reducing_gap=None)
                    images[count] = image.rotate(frame.rotation, expand=True)
                count += 1
    if not count:
        raise ValueError("no frame can be decoded")
    if count != total:  # headers lie
        return decode(path, rule, n, size, total=count)
    return [images[i] for i in indices], indices


@functools.lru_cache(maxsize=256)  # pairs share videos with the pairs beside them
def load_jpegs(path, rule, n, size):
    """Return the images of `decode` as base64 texts of JPEGs."""
    texts = []
    for image in decode(path, rule, n, size)[0]:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    return texts


def check_videos(questions, root):
    """Say which videos are missing or broken, and how many a source; exit with 1 if any is."""

    def problem(path):
        try:
            decode(root / path, "center", 1)
        except VIDEO_ERRORS as error:
            return f"{path}: {error}"

    paths = sorted({q.video_path for q in questions})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = [line for line in pool.map(problem, paths) if line]
    sources = collections.Counter(line.split("/")[0] for line in problems)
    note("\n".join([*problems, f"missing or broken in {root}: {dict(sources)} of {len(paths)}"]))
    if problems:
        fail("videos are missing or broken; README says how to make them", code=1)


# --------------------------------------------------------------------------------------------------
# Toy pairs: no shortcut works on them
# --------------------------------------------------------------------------------------------------

# The answer is the XOR of something seen only before the centre frame and something seen only
# after it. The centre frame is the same in all clips of a scene, so it says nothing, and no single
# frame lifts a model above a coin's 25 %.
TOY = {  # source: subset, question, where balls are in state 0 and in state 1
    "toy_permanence": (
        "intuitive_physics",
        "Is a ball there both before and after the screen, or neither time?",
        ([], [(28, 36)]),
    ),
    "toy_turn": (
        "temporal_reasoning",
        "Is the ball on the same side before and after the screen?",
        ([(12, 36)], [(44, 36)]),
    ),
    "toy_count": (
        "human_object_interactions",
        "Are there as many balls before as after the screen?",
        ([(16, 36)], [(16, 36), (40, 36)]),
    ),
    "toy_height": (
        "robot_object_interactions",
        "Is the ball as high before as after the screen?",
        ([(28, 36)], [(28, 52)]),
    ),
}
CANDIDATES = ("Yes, it is so", "No, it is otherwise")  # right if before = after, and if not
# a scene's pairs of clips, each named by its states before and after; the first is the equal one
PAIRS = [("00", "01"), ("00", "10"), ("11", "01"), ("11", "10")]


def write_video(path, frames):
    """Write frames, uint8 [T, H, W, 3], as an H.264 mp4 of 10 frames a second."""
    # Equal frames must decode to equal pixels: each frame by itself, at one quantiser. With frames
    # predicted from others the centre frame would carry traces of what came before it.
    options = {"g": "1", "qp": "12"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with common.replacing(path) as file, av.open(file, "w", format="mp4") as video:
        stream = video.add_stream("libx264", 10, options)
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        video.mux(stream.encode(None))


def toy_clip(source, scene, states, seed):
    """Return a clip, uint8 [25, 64, 64, 3]; states: before and after the screen, such as "01"."""
    draws = np.random.default_rng([seed, list(TOY).index(source), scene])
    blocks = draws.integers(30, 100, (8, 8, 3))
    background = blocks.repeat(8, 0).repeat(8, 1)
    colour = draws.permutation([255, 110, 50])  # only balls have a bright channel
    shift = draws.integers(-6, 7)
    clip = np.stack([background] * 25).astype(np.uint8)
    for t, frame in enumerate(clip):
        state = int(states[t // 12 > 0])
        for x, y in TOY[source][2][state]:
            left = x + shift
            frame[y : y + 8, left : left + 8] = colour
        # the screen rises, covers the balls, and falls
        frame[64 - 4 * min(8, t, 24 - t) :] = 128
    return clip


def write_toy(folder, scenes, seed):
    """Write folder/CONFIG/mini.jsonl and clips in folder/videos, 4 pairs a scene and source.

    Half of the pairs list their candidates in the other order.
    """
    for source, (subset, question, _) in TOY.items():
        path = folder / subset / "mini.jsonl"
        if path.exists():
            continue
        lines = []
        for scene, p in itertools.product(range(scenes), range(4)):
            listed = list(CANDIDATES)
            if (p + scene) % 2:
                listed.reverse()
            for number, (states, answer) in enumerate(zip(PAIRS[p], CANDIDATES, strict=True), 1):
                clip = f"{source}/s{scene:03d}_{states}.mp4"
                file = folder / "videos" / clip
                if not file.exists():
                    write_video(file, toy_clip(source, scene, states, seed))
                row = {"video_id": f"{source}_s{scene:03d}_p{p}_{number}", "video_path": clip}
                row.update(question=question, answer=answer, candidates=repr(listed))
                lines.append(json.dumps({**row, "source": source}))
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines))


# --------------------------------------------------------------------------------------------------
# Baselines: answers without a model
# --------------------------------------------------------------------------------------------------


def coin(text):
    """Return a bit that depends on the text alone."""
    return hashlib.blake2b(text.encode()).digest()[-1] & 1


@functools.cache
def centre_frame(path):
    """Return the centre frame of a video as 16 x 16 pixels, float [768]."""
    try:
        images, _ = decode(path, "center", 1)
    except VIDEO_ERRORS as error:
        fail(f"--baseline frame cannot read {path}: {error}; --check says which videos are broken")
    return np.asarray(images[0].resize((16, 16)), float).ravel()


def frame_baseline(questions, root):
    """Answer as the nearest centre frame of another pair with the same question, else by a coin."""
    frames = np.stack([centre_frame(root / q.video_path) for q in questions])
    guesses = []
    for question, frame in zip(questions, frames, strict=True):
        guess = coin(question.question)
        distances = np.linalg.norm(frames - frame, axis=1)
        for i in np.argsort(-distances, kind="stable"):  # the nearest comes last
            other = questions[i]
            same = other.question == question.question and other.answer in question.candidates
            if same and other.pair != question.pair:
                guess = question.candidates.index(other.answer)
        guesses.append(guess)
    return guesses


RULES = {  # (question, seed) -> 0 or 1
    "random": lambda q, seed: coin(f"{seed}:{q.video_id}"),
    "first": lambda q, seed: 0,
    "longest": lambda q, seed: int(len(q.candidates[1]) > len(q.candidates[0])),
    "oracle": lambda q, seed: q.answer_idx,
}


# --------------------------------------------------------------------------------------------------
# Models: an OpenAI-compatible endpoint, or a Python function
# --------------------------------------------------------------------------------------------------

FAILED = re.compile("error|abort|cancel|fail|timeout|insufficient", re.I)  # finish reasons
FILTER = re.compile(
    "content.?(filter|policy|management)|safety|moderation|inspection|guardrail|ResponsibleAI"
    "|prohibited|(?<!case.)sensitive",
    re.I,
)
FILTERED = {"reply": "", "finish_reason": "content_filter"}
# what "status S type: text" looks like if no question can be answered: what to do about it
REFUSALS = {
    "^status 3": "the server redirects: give the new address as --endpoint",
    "^status 40[13]": "the server refuses the key (--api-key-env, by default OPENAI_API_KEY)",
    "^status 404": "no such path or model: correct --endpoint (most end in /v1) or --model",
    r"at most \d+ image|limit-mm-per-prompt|too many images": "the server takes fewer images: "
    "lower --frames, or start vLLM with --limit-mm-per-prompt",
    r"^status 4(00|22).*(max_tokens|temperature|\bseed\b|unrecognized|extra (field|input)"
    r"|(unknown|unsupported|unexpected) (field|param|arg|value|prop))": "a field is refused. "
    'Change it, as by --extra \'{"max_tokens": null, "max_completion_tokens": 1024}\'',
}


def refusal(said):
    """Return what to do if no question will be answered, else ""; said: as in REFUSALS."""
    for pattern, advice in REFUSALS.items():
        if re.search(pattern, said, re.I | re.S):
            return f"{advice}. {said}"
    return ""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key is for one host."""

    def redirect_request(self, *_):
        """Return no request to follow."""


def make_payload(config, model, prompt, images=(), video=""):
    """Return the body of a chat completion request.

    images: base64 texts of JPEGs; video: a data URL that goes instead of them.
    """
    parts = []
    for number, image in enumerate(images, 1):
        if config.frame_labels:
            parts.append(("text", f"Frame {number}:"))
        parts.append(("image_url", {"url": f"data:image/jpeg;base64,{image}"}))
    if video:
        parts.append(("video_url", {"url": video}))
    parts.append(("text", prompt))
    content = [{"type": kind, kind: value} for kind, value in parts]
    payload = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": config.max_tokens,
        "temperature": 0,
        "seed": config.seed,
        **json.loads(config.extra or "{}"),
    }
    return {name: value for name, value in payload.items() if value is not None}


def read_reply(body):
    """Return {reply, finish_reason} of a chat completion; raise one of MALFORMED if it failed.

    A reply without content has no letter: the model only thought, or a content filter stopped it.
    """
    choice = body if body.get("error") else body["choices"][0]
    finish = str(choice.get("finish_reason") or "")
    error = choice.get("error")
    if error and FILTER.search(json.dumps(error)):
        return FILTERED
    message = choice["message"]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    if content is None and (finish or message.get("refusal")):
        content = message.get("refusal") or ""
    if error or FAILED.search(finish) or not isinstance(content, str):
        raise ValueError
    if FILTER.search(finish):
        finish = "content_filter"
    return {"reply": content, "finish_reason": finish}


class Endpoint:
    """An OpenAI-compatible server. The key leaves this object in a header only."""

    def __init__(self, config):
        self.config = config
        self.key = os.environ.get(config.api_key_env, "").strip()
        self.headers = {"Content-Type": "application/json", "User-Agent": "mvp_eval"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.opener = urllib.request.build_opener(NoRedirect)  # it reads the proxy variables
        self.stopped = threading.Event()
        if not re.fullmatch("[!-~]*", self.key):
            fail(f"${config.api_key_env} holds blanks or signs that no key has")

    def fetch(self, path, body=None):
        """Return (status, headers, text, all of it in short); raise OSError or HTTPException."""
        data = body and json.dumps(body).encode()
        url = self.config.endpoint.rstrip("/") + path
        request = urllib.request.Request(url, data, self.headers)
        try:
            response = self.opener.open(request, timeout=self.config.timeout)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            text = response.read().decode(errors="replace")
        text = text.replace(self.key or "\0", "***")  # some servers repeat the key
        kind = response.headers.get("Content-Type")
        said = f"status {response.status} {kind}: {text[:300]}"
        return response.status, response.headers, text, said

    def find_model(self):
        """Return --model, or the first that the server lists. Exit with 2 if nobody is there."""
        said = ""
        try:
            _, _, text, said = self.fetch("/models")
            if self.config.model != "auto":  # some servers list nothing
                return self.config.model
            return json.loads(text)["data"][0]["id"]
        except (OSError, http.client.HTTPException, *MALFORMED) as error:
            reason = refusal(said) or said or error
        advice = "Start the server, or wait for it; correct --endpoint, or name a --model"
        fail(f"{self.config.endpoint}/models: {reason}. {advice}")

    def ask(self, model, prompt, images, video):
        """Return status ok and the reply; status error, or refused if all would be, and why."""
        payload = make_payload(self.config, model, prompt, images, video)
        pause = 0.0
        said = ""
        for attempt in range(1, self.config.retries + 2):
            if self.stopped.wait(pause):
                break
            pause = min(60.0, 2.0**attempt) * random.uniform(0.5, 1)
            try:
                status, headers, text, said = self.fetch("/chat/completions", payload)
                if status == 200:
                    return {"status": "ok", **read_reply(json.loads(text))}
                if status < 500 and FILTER.search(text):
                    return {"status": "ok", **FILTERED}
                if re.search("context|too long|maximum.*tokens|^status 413", said, re.I):
                    said += " (try fewer --frames or a smaller --size)"
                elif refusal(said):
                    return {"status": "refused", "error": refusal(said)}
                if status < 500 and status not in (408, 409, 425, 429):
                    break
                if re.fullmatch(r"[\d.]+", headers.get("Retry-After", "")):
                    pause = min(600.0, float(headers["Retry-After"]))
            except (OSError, http.client.HTTPException) as error:
                said = repr(error)
            except MALFORMED:
                pass  # a failure: `said` shows what came
        return {"status": "error", "error": said}


def import_function(name):
    """Return the function that module:function names, the working folder on the path."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, *MALFORMED) as error:
        fail(f"--fn {name}: {error}; expected module:function, in this folder or installed")


def call_function(function, images, question):
    """Return status ok and the reply, or status error and what the function raised."""
    row = asdict(question)
    del row["answer"]
    try:
        reply = function(images, make_prompt(question), row)
        if not isinstance(reply, str):
            reply = {0: "Answer: A", 1: "Answer: B"}[reply]
        return {"status": "ok", "reply": reply}
    except Exception as error:  # whatever the user's function raises
        return {"status": "error", "error": f"--fn: {error!r}; expected a text, 0 or 1"}


# --------------------------------------------------------------------------------------------------
# Asking: every question once, every answer kept
# --------------------------------------------------------------------------------------------------

SETTINGS = "split sampling frames size frame_labels video_url max_tokens seed extra".split()


def answer_key(config, model, question, view):
    """Return a hash of what an answer depends on. Resuming asks what has no answer under it."""
    settings = [getattr(config, name) for name in SETTINGS]
    return hashlib.sha256(repr((model, question, view, settings)).encode()).hexdigest()


def load_answers(out):
    """Return {key: row} of what a run has answers to. Torn lines and failures are skipped."""
    rows = {}
    for file in Path(out).glob("answers*.jsonl"):
        for line in file.read_bytes().split(b"\n"):
            with contextlib.suppress(*MALFORMED):
                row = json.loads(line)
                if row["status"] == "ok":
                    rows[row["key"]] = row
    return rows


def show(question, view, root, config):
    """Return what a model is shown: (images, video as a data URL)."""
    if view == "blind":
        return [], ""
    path = root / question.video_path
    if config.video_url and view == "model":
        data = base64.b64encode(path.read_bytes()).decode()
        return [], f"data:video/mp4;base64,{data}"
    rule = "center" if view == "frame" else config.sampling
    if config.endpoint:
        return load_jpegs(path, rule, config.frames, config.size), ""
    return decode(path, rule, config.frames, config.size)[0], ""


def in_flight(pool, function, items, most):
    """Yield function(item) as they get done, with at most `most` begun and not yet taken."""
    running = set()
    room = 1  # the first is begun alone: what a server refuses altogether is refused once
    while True:
        running |= {pool.submit(function, item) for item in itertools.islice(items, room)}
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)
        room = most - len(running)


def ask_all(todo, key_of, root, model, asked, config, run):
    """Ask todo [(question, view)] of an Endpoint or a function. Append each answer to a file."""

    def work(item):
        """Load what is shown, and ask an endpoint, in a thread."""
        question, view = item
        row = {"key": key_of(*item), "system": view, "pair": question.pair, **asdict(question)}
        images = ()
        try:
            images, video = show(question, view, root, config)
            if config.endpoint:
                row.update(asked.ask(model, make_prompt(question), images, video))
        except VIDEO_ERRORS as error:
            row.update(status="error", error=f"video {question.video_path}: {error}")
        return question, images, row

    failed_in_row = 0
    kept = f"All answers are kept. To go on: {run.resume_command()}"
    pool = ThreadPoolExecutor(config.concurrency)
    rows = in_flight(pool, work, iter(todo), config.concurrency)
    # None hides the bar where there is no terminal
    bar = tqdm(rows, total=len(todo), unit="question", disable=True if run.world.rank else None)
    try:
        with open(run.out / f"answers.rank{run.world.rank}.jsonl", "a") as file:
            if file.tell():
                file.write("\n")  # end a line that a crash may have torn
            for done, (question, images, row) in enumerate(bar, 1):
                if "status" not in row:  # functions are called here, in the main thread
                    row.update(call_function(asked, images, question))
                file.write(json.dumps(row) + "\n")
                file.flush()
                if row["status"] == "refused":
                    fail(f"{row['error']}. {kept}")
                if row["status"] == "ok":
                    failed_in_row = 0
                else:
                    failed_in_row += 1
                    note(row["error"])
                if failed_in_row == 20:
                    fail(f"20 questions in a row failed, the last: {row['error']}. {kept}", 3)
                if bar.disable and done % 100 == 0:
                    note(f"{done} of {len(todo)} questions asked")
    finally:
        if config.endpoint:
            asked.stopped.set()  # ends threads that wait to try again


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------

UNPARSED = -1  # a reply without a letter
UNANSWERED = -2  # no reply
COLUMNS = ("pair", "single", "strict_pair", "strict_single")  # accuracies, in percent


def parse_rows(rows):
    """Return the candidates that answers [2 P] chose, int [P, 2 rows, 2 parsers]."""
    guesses = []
    for row in rows:
        both = (UNANSWERED, UNANSWERED)
        if row:
            both = (parse_official(row["reply"]), parse_strict(row["reply"], row["candidates"]))
        guesses.append([UNPARSED if guess is None else guess for guess in both])
    return np.reshape(guesses, (-1, 2, 2))


def bootstrap(scores, draws):
    """Return the means of 2,000 samples of the pairs, drawn with replacement: [P, K] -> [2000, K].

    Over pairs, not rows, since the two rows of a pair are not independent.
    """
    samples = (draws.integers(0, len(scores), len(scores)) for _ in range(2000))
    return np.stack([scores[sample].mean(0) for sample in samples])


def score(questions, guesses, seed):
    """Return {group: accuracies in percent with intervals, and counts}.

    Groups are the macro, which is the mean over the configs, each config, and each source.
    questions: [2 P]; guesses: of `parse_rows`.
    """
    right = guesses == np.reshape([q.answer_idx for q in questions], (-1, 2, 1))
    scores = np.stack([right.all(1), right.mean(1)], axis=2)  # [P, parser, (pair, single)]
    scores = scores.reshape(-1, 4)  # as in COLUMNS
    draws = np.random.default_rng(seed)
    chosen = {"macro": np.ones(len(scores), bool)}
    means = {}
    replicates = {}
    for attribute in ("subset", "source"):
        names = np.array([getattr(q, attribute) for q in questions[::2]])
        for name in dict.fromkeys(names.tolist()):
            chosen[name] = names == name
            means[name] = scores[chosen[name]].mean(0)
            replicates[name] = bootstrap(scores[chosen[name]], draws)
    for drawn in (means, replicates):
        drawn["macro"] = np.mean([drawn[name] for name in SUBSETS if name in drawn], axis=0)
    result = {}
    for name in chosen:
        official, strict = np.moveaxis(guesses[chosen[name]], 2, 0)
        row = {
            "pairs": len(official),
            "unparsed": int((official == UNPARSED).sum()),
            "errors": int((official == UNANSWERED).sum()),
            "differ": int((official != strict).sum()),
        }
        intervals = np.percentile(100 * replicates[name], [2.5, 97.5], axis=0).T
        for column, mean, interval in zip(COLUMNS, means[name], intervals, strict=True):
            row[column] = 100 * float(mean)
            row[f"{column}_ci"] = interval.tolist()
        result[name] = row
    return result


def compare(first, second):
    """Print by how much one run is better than another, on the pairs that both answered.

    The interval is a bootstrap over pairs, p is McNemar's exact two-sided one.
    """
    runs = []
    for out in (first, second):
        runs.append(collections.defaultdict(list))
        for row in load_answers(out).values():
            if row["system"] == "model":
                right = row["candidates"].index(row["answer"])
                runs[-1][tuple(row["pair"])].append(parse_official(row["reply"]) == right)
    a, b = runs
    shared = [pair for pair in a if len(a[pair]) == len(b[pair]) == 2]
    if not shared:
        fail(f"{first} and {second}: no pair that both answered; compare takes the folders of runs")
    for name in [*SUBSETS, "all"]:
        chosen = [pair for pair in shared if name in (pair[0], "all")]
        if chosen:
            x, y = np.array([[all(run[pair]) for pair in chosen] for run in runs], float)
            low, high = np.percentile(bootstrap(x - y, np.random.default_rng(0)), [2.5, 97.5])
            n = int(sum(x != y))
            tail = range(1 + min(sum(x > y), sum(x < y)))
            p = min(1.0, sum(math.comb(n, i) for i in tail) / 2 ** (n - 1))
            note(
                f"{name}: {len(chosen)} pairs, {x.mean():.1%} - {y.mean():.1%} = "
                f"{(x - y).mean():+.1%} [{low:+.1%}, {high:+.1%}], McNemar p {p:.2g}"
            )


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------

PAPER = """
In the paper (table A), pair %         macro  human  robot physic tempor
human (full)                            92.9   91.3   91.7   97.6   90.9
InternVL2.5-8B (full)                   40.2   43.7   40.2   22.8   54.4
InternVL2.5-8B (mini)                   39.9   38.1   38.7   23.1   59.8
Tarsier-34B (full)                      38.8   45.2   36.3   21.0   52.7
Tarsier-34B (mini)                      37.4   38.7   36.6   22.1   52.4
GPT-4o (mini)                           32.5   36.1   32.8   16.2   45.0
Qwen2-VL-7B (full)                      30.0   27.1   27.6   20.0   45.2
Qwen2-VL-7B (mini)                      29.2   32.3   21.2   18.9   44.5
Gemini-1.5 Pro (mini)                   29.6   43.1   15.5   19.6   40.2
one frame, Qwen2-VL-7B (full)           16.7   16.9   20.1    3.7   26.3
one frame, Qwen2-VL-7B (mini)           15.7   13.6   19.9    4.4   24.8
one frame, LLaVA-OneVision-7B (full)    11.8   14.7    8.7    2.0   21.6
one frame, LLaVA-OneVision-7B (mini)    11.7   12.2   10.5    2.3   21.9
a coin                                  25.0   25.0   25.0   25.0   25.0
any rule that reads only the text        0.0    0.0    0.0    0.0    0.0
Intervals: 95 %, bootstrap over pairs. The paper's numbers are for the real videos.
differ: replies that the two parsers read otherwise; if many, the official number is noise.
unparsed: replies without a letter; submissions/ has the first candidate there, as officially.
"""


def table_of(systems):
    """Return the table of all systems and groups."""
    line = "{:<36}{pairs:>6}{pair:>22}{single:>22}{strict_pair:>22}"
    line += "{unparsed:>10}{errors:>8}{differ:>8}"
    lines = []
    for system, result in systems.items():
        for name, values in result.items():
            cells = dict(values)
            for column in COLUMNS:
                low, high = values[f"{column}_ci"]
                cells[column] = f"{values[column]:.1f} [{low:.1f}, {high:.1f}]"
            lines.append(line.format(f"{system}, {name}", **cells))
    header = line.format("accuracies in percent", **{name: name for name in values})
    return "\n".join([header, *lines])


def warnings_of(system, rows):
    """Return how the replies of a model ended, where not as they should."""
    ends = collections.Counter(row.get("finish_reason") for row in rows if row)
    counts = {
        "were cut off at --max-tokens": ends["length"],
        "were stopped by a content filter": ends["content_filter"],
        "have no text: filtered, or only reasoning": sum(not row["reply"] for row in rows if row),
    }
    return [f"warning: {system}: {n} replies {text}" for text, n in counts.items() if n]


def write_submissions(folder, questions, guesses, split):
    """Write the leaderboard's files: the text of the chosen candidate, the first if unparsed."""
    folder.mkdir(exist_ok=True)
    data_name = "mvp_mini" if split == "mini" else "mvp"
    for subset in {question.subset for question in questions}:
        with open(folder / f"{data_name}_{subset}_valid.jsonl", "w") as file:
            for question, guess in zip(questions, guesses, strict=True):
                if question.subset == subset and guess != UNANSWERED:
                    row = {"data_name": data_name, "row_id": question.video_id, "task": subset}
                    row["model_answer"] = question.candidates[max(0, guess)]
                    file.write(json.dumps(row) + "\n")


def draw_failures(path, drawn, root):
    """Draw [(question, reply)]: six frames, and beside them the right answer and the reply."""
    sheet = Image.new("RGB", (1000, 80 * len(drawn)), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (question, reply) in enumerate(drawn):
        with contextlib.suppress(*VIDEO_ERRORS):  # without a video the strip stays white
            images, _ = decode(root / question.video_path, "segments", 6, 72)
            for column, image in enumerate(images):
                sheet.paste(image, (72 * column, 80 * i))
        right = f"{'AB'[question.answer_idx]}, {question.answer}"
        text = f"{question.source}: {question.question}\nright: {right}\nsaid: {reply!r}"
        canvas.text((440, 80 * i), text, "black")
    sheet.save(path)


def make_report(questions, rows, views, root, config, run, warnings, model):
    """Score all systems, print the table, write files; rows: {system: [2 P] answers or None}."""
    guesses = {system: parse_rows(rows[system]) for system in rows}
    systems = {system: score(questions, guesses[system], config.seed) for system in rows}
    for system in views:
        warnings += warnings_of(system, rows[system])
    first = next(iter(rows))  # the model, if there is one
    official = guesses[first][:, :, 0].ravel()
    if views:
        write_submissions(run.out / "submissions", questions, official, config.split)
    wrong = sorted({i // 2 for i, q in enumerate(questions) if official[i] != q.answer_idx})
    drawn = []
    for pair in wrong[:: len(wrong) // 24 + 1]:  # at most 24, spread over the sources
        for i in (2 * pair, 2 * pair + 1):
            row = rows[first][i] or {"reply": None}
            drawn.append((questions[i], row["reply"]))
    if drawn:
        draw_failures(run.out / "picture.png", drawn, root)
    report = {"config": asdict(config), "model": model, "systems": systems, "warnings": warnings}
    (run.out / "report.json").write_text(json.dumps(report, indent=2))
    text = "\n".join([table_of(systems), PAPER, *warnings])
    (run.out / "report.md").write_text(f"```\n{text}\n```\n", encoding="utf-8")
    note(f"{text}\n{run.out}: report.md, report.json, picture.png of failed pairs")


# --------------------------------------------------------------------------------------------------
# Presets and main
# --------------------------------------------------------------------------------------------------

PRESETS = {"toy": {"baseline": "random,first,longest,frame,oracle"}, "mvp": {}}
DATA_PRESETS = {"toy": "toy", "*": "mvp"}


def check(config):
    """Refuse what would fail late or silently (exit 2).

    Return (baselines that ask no model, what a model is shown: model, frame, blind).
    """
    names = config.baseline.split(",")
    views = ["model"] if config.endpoint or config.fn else []
    views += [name for name in ("frame", "blind") if views and name in names]
    free = [name for name in names if name not in (*views, "none")]
    if set(free) - {*RULES, "frame"} or not free + views:
        fail(f"--baseline: {', '.join(RULES)}, frame or none; with --endpoint or --fn also blind")
    if config.fn and (config.endpoint or config.video_url):
        fail("--fn is a model of its own: leave out --endpoint and --video-url")
    if config.endpoint and not re.fullmatch(r"https?://[^/@?]+(/[^@?]*)?", config.endpoint):
        fail(f"--endpoint: expected http://HOST/v1 or the like, the key in ${config.api_key_env}")
    try:
        dict(**json.loads(config.extra or "{}"))
    except (ValueError, TypeError) as error:
        fail(f"--extra must be a JSON object such as '{{\"top_k\": 1}}' ({error})")
    return free, views


def find_data(config, world):
    """Return (folder of the annotations, root of the videos); make or download what is needed."""
    store = Path(os.environ.get("DATA", "data"))
    folder = Path(config.data).expanduser()
    if config.data == "toy":
        folder = store / f"mvp_toy_{config.scenes}_{config.seed}"
        if world.rank == 0:
            write_toy(folder, config.scenes, config.seed)
    elif config.data == "hub":
        folder = store / "mvp"
        if world.rank == 0:
            download_annotations(folder, config.split)
    if dist.is_initialized():
        dist.barrier()
    return folder, Path(config.videos or folder / "videos")


def choose_questions(questions, root, looks, config):
    """Return (the Questions to ask, the rows of a pair beside each other, and warnings).

    looks: whether their videos are needed.
    """
    pairs = {}
    for question in questions:
        pairs.setdefault(question.pair, []).append(question)
    problems = []
    usable = {subset: [] for subset in SUBSETS}
    for (subset, stem), pair in pairs.items():
        problem = problem_of(pair, root, looks)
        if problem:
            problems.append(f"{stem} ({problem})")
        else:
            usable[subset].append(pair)
    said = f"{len(problems)} of {len(pairs)} pairs are left out: {'; '.join(problems[:5])}"
    if not any(usable.values()) or (problems and not config.allow_missing):
        fail(f"{said}. This needs --allow-missing. --check names the missing videos")
    chosen = []
    for members in usable.values():
        if config.limit:
            random.Random(config.seed).shuffle(members)
        chosen += itertools.chain(*members[: config.limit or None])
    return chosen, [said] if problems else []


@common.command_line
def main(argv=None):
    """Ask and report; see --help."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"] and len(argv) == 3:
        return compare(*argv[1:])
    config, typed = common.parse_config(Config, PRESETS, DATA_PRESETS, argv)
    free, views = check(config)
    world = common.start_world("cpu", "fp32")
    asked = Endpoint(config) if config.endpoint else config.fn and import_function(config.fn)
    folder, root = find_data(config, world)
    questions = read_annotations(folder, config.split)
    if config.check:
        return check_videos(questions, root)
    looks = {"frame", "model"} & {*free, *views}
    questions, warnings = choose_questions(questions, root, looks, config)
    run = common.Run(config, world)
    logged = (run.out / "log.jsonl").read_text().split("\n")[0]
    model = config.fn
    if config.endpoint and config.resume and logged and "model" not in typed:
        model = json.loads(logged)["model"]  # without a request
    elif config.endpoint:
        model = asked.find_model()
    run.write(model=model, config=asdict(config))
    key_of = functools.partial(answer_key, config, model)
    answers = load_answers(run.out)
    items = list(itertools.product(questions, views))[world.rank :: world.size]
    todo = [item for item in items if key_of(*item) not in answers]
    note(f"{len(questions)} questions = {len(questions) // 2} pairs; {len(todo)} to ask; {run.out}")
    signal.signal(signal.SIGINT, run.leave)
    signal.signal(signal.SIGTERM, run.leave)
    if todo:
        ask_all(todo, key_of, root, model, asked, config, run)
    if dist.is_initialized():
        dist.barrier()
    if world.rank:
        return
    answers = load_answers(run.out)
    rows = {view: [answers.get(key_of(q, view)) for q in questions] for view in views}
    missing = sum(view.count(None) for view in rows.values())
    for name in free:
        if name == "frame":
            guesses = frame_baseline(questions, root)
        else:
            guesses = [RULES[name](question, config.seed) for question in questions]
        rows[name] = [{"reply": "AB"[guess], "candidates": ()} for guess in guesses]
    make_report(questions, rows, views, root, config, run, warnings, model)
    if missing:
        again = f"their pairs count as wrong. To ask them again: {run.resume_command()}"
        fail(f"{missing} questions have no answer, and {again}", code=1)


if __name__ == "__main__":
    main()
