"""Questions a second of mvp_eval.py with a server that answers at once, beside a sequential loop.

The whole command is timed: starting, decoding, asking, scoring, the report.

python tests/bench_mvp_eval.py                  # 2,016 questions; prints a table in Markdown
"""

import argparse
import base64
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mvp_eval  # noqa: E402


def sequential(questions, videos, url):
    """What one writes first: decode, sample, encode, ask, one question after the other -> questions a second."""
    begun = time.monotonic()
    for q in questions:
        with av.open(str(videos / q.video_path)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        content = []
        for i in np.linspace(0, len(frames) - 1, 16, dtype=int):
            buffer = io.BytesIO()
            frames[i].save(buffer, "JPEG", quality=90)
            data = base64.b64encode(buffer.getvalue()).decode()
            content.append(
                {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
            )
        content.append({"type": "text", "text": mvp_eval.make_prompt(q)})
        body = {
            "model": "stand-in",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            json.load(response)["choices"][0]["message"]["content"]
    return len(questions) / (time.monotonic() - begun)


def bench_mvp_eval(scenes=63, sample=300):
    """Print the table: mvp_eval.py on all questions, the loop on `sample` of them, both against the same server."""
    with tempfile.TemporaryDirectory() as folder:
        mvp_eval.write_toy(Path(folder) / "toy", scenes, 0)
        questions = mvp_eval.read_annotations(Path(folder) / "toy", "mini")
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "stand_in.py")], stdout=subprocess.PIPE, text=True
        )
        try:
            url = server.stdout.readline().strip()
            flags = ["--data", f"{folder}/toy", "--endpoint", url, "--out", f"{folder}/run"]
            command = [sys.executable, str(ROOT / "mvp_eval.py"), *flags, "--baseline", "none"]
            begun = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            speed = len(questions) / (time.monotonic() - begun)
            memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            plain = sequential(
                questions[:: max(1, len(questions) // sample)], Path(folder) / "toy" / "videos", url
            )
        finally:
            server.terminate()
    print("| | questions | questions/s | peak memory |\n|---|---|---|---|")
    print(f"| mvp_eval.py, 16 in flight | {len(questions)} | {speed:.0f} | {memory:.2f} GiB |")
    print(f"| sequential loop | {sample} | {plain:.0f} | |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=63)
    bench_mvp_eval(parser.parse_args().scenes)
