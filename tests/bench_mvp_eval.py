"""Questions a second of mvp_eval.py with a server that answers at once, beside a plain loop.

The whole command is timed: starting, decoding, asking, scoring, the report.

python tests/bench_mvp_eval.py    # 2,016 questions; prints a table in Markdown
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stand_in import StandIn, mvp_eval


def one_by_one(questions, videos, url):
    """Return the questions a second of a loop: decode, encode, ask, and the next."""
    endpoint = mvp_eval.Endpoint(mvp_eval.Config(endpoint=url))
    load = mvp_eval.load_jpegs.__wrapped__  # without its cache
    begun = time.monotonic()
    for q in questions:
        images = load(videos / q.video_path, "uniform", 16, 448)
        endpoint.ask("stand-in", mvp_eval.make_prompt(q), images, "")
    return len(questions) / (time.monotonic() - begun)


def main():
    """Print the table: mvp_eval.py on all questions, the loop on every seventh."""
    with tempfile.TemporaryDirectory() as folder, StandIn() as server:
        toy = Path(folder, "toy")
        mvp_eval.write_toy(toy, 63, 0)
        questions = mvp_eval.read_annotations(toy, "mini")
        flags = f"--data {toy} --endpoint {server.url} --baseline none --out {folder}/run"
        command = [sys.executable, mvp_eval.__file__, *flags.split()]
        begun = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        speed = len(questions) / (time.monotonic() - begun)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        plain = one_by_one(questions[::7], toy / "videos", server.url)
    print("| | questions | questions/s | peak memory |\n|---|---|---|---|")
    print(f"| mvp_eval.py, 16 in flight | {len(questions)} | {speed:.0f} | {memory:.2f} GiB |")
    print(f"| one after the other | {len(questions[::7])} | {plain:.0f} | |")


if __name__ == "__main__":
    main()
