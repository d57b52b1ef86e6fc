"""A server that speaks the OpenAI protocol as real ones do, faults included, and a model that solves the toy pairs.

python tests/stand_in.py [PORT]      # serve at http://localhost:PORT/v1 until interrupted; answers at once
"""

import base64
import hashlib
import io
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mvp_eval  # noqa: E402


def solve(frames, prompt, row=None):
    """The right answer to a toy question from the 16 default frames: an early one and a late one are compared."""
    question, a, b = re.match(r"Question: (.*)\nOption:\n\(A\) (.*)\n\(B\) (.*) \n", prompt).groups()
    source = next(name for name, toy in mvp_eval.TOY.items() if toy[1] == question)
    first, last = (np.asarray(frames[i], int).max(2) > 200 for i in (0, 15))

    def middle(mask):
        return np.argwhere(mask).mean(0) if mask.any() else np.full(2, 32.0)  # row, column

    def balls(mask):
        columns = mask.any(0).astype(int)
        return int((np.diff(columns, prepend=0) == 1).sum())

    if source == "toy_permanence":
        even = first.any() == last.any()
    elif source == "toy_turn":
        even = (middle(first)[1] < 32) == (middle(last)[1] < 32)
    elif source == "toy_count":
        even = (balls(first) + balls(last)) % 2 == 0
    else:
        even = abs(middle(first)[0] - middle(last)[0]) < 8
    answer = mvp_eval.CANDIDATES[0 if even else 1]
    return f"Answer: {'AB'[[a, b].index(answer)]}"


def solve_request(body):
    """`solve` for the body of a chat completion request."""
    parts = body["messages"][0]["content"]
    images = [p["image_url"]["url"].split(",")[1] for p in parts if p["type"] == "image_url"]
    frames = [Image.open(io.BytesIO(base64.b64decode(image))) for image in images]
    return solve(frames, next(p["text"] for p in parts if p["type"] == "text" and p["text"].startswith("Question")))


class StandIn:
    """with StandIn(answer, fault) as server: server.url is an endpoint.

    answer(body) -> text, or a message as a dict, which may hold finish_reason and error of its choice.
    fault(body, nth) -> None, one of FAULTS, or (status, text, headers); nth counts the requests with
    the same body from 0. listing: what /models says, as such a triple. `asked` lists (digest of the
    body, outcome).
    """

    FAULTS = ("hang", "cut", "half", "garbage", "abort", "error")

    def __init__(
        self,
        answer=lambda body: "Answer: A",
        fault=lambda body, nth: None,
        models=("stand-in",),
        port=0,
        listing=None,
    ):
        self.answer, self.fault, self.models, self.listing = answer, fault, models, listing
        self.asked, self.bodies, self.keys, self.times = [], [], set(), {}
        self.lock = threading.Lock()
        self.hanging = threading.Event()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def log_message(self, *_):
                pass

            def reply(self, status, data, headers=()):
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                models = [{"id": name} for name in stand_in.models]
                listing = stand_in.listing or (200, json.dumps({"data": models}), {})
                self.reply(listing[0], listing[1].encode(), listing[2].items())

            def do_POST(self):
                text = self.rfile.read(int(self.headers["Content-Length"]))
                digest, body = hashlib.sha256(text).hexdigest(), json.loads(text)
                with stand_in.lock:
                    stand_in.keys.add(self.headers.get("Authorization"))
                    nth = stand_in.times[digest] = stand_in.times.get(digest, -1) + 1
                fault = stand_in.fault(body, nth)
                with stand_in.lock:
                    stand_in.asked.append((digest, fault or "ok"))
                    stand_in.bodies.append(body if len(stand_in.bodies) < 10 else None)
                stand_in.serve(self, body, fault)

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        # a client that was killed is no news; and to print a traceback while another thread parses crashes Python 3.11
        self.server.handle_error = lambda *_: None
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def serve(self, handler, body, fault):
        """Answer one request, or go wrong in the way that `fault` names."""
        if isinstance(fault, tuple):
            return handler.reply(fault[0], fault[1].encode(), fault[2].items())
        if fault == "hang":
            self.hanging.wait(20)
        if fault in ("hang", "cut"):
            handler.close_connection = True
            return None
        if fault == "garbage":
            return handler.reply(200, b'{"choices": [{"mess')
        if fault == "error":
            return handler.reply(200, json.dumps({"error": {"message": "overloaded"}}).encode())
        choice = self.answer(body)
        choice = choice if isinstance(choice, dict) else {"content": choice}
        outer = {"finish_reason": choice.pop("finish_reason", "stop")}
        if "error" in choice:
            outer["error"] = choice.pop("error")
        if fault == "abort":
            outer["finish_reason"] = "abort"
        data = {"choices": [{"index": 0, "message": {"role": "assistant", **choice}, **outer}]}
        data = json.dumps(data).encode()
        if fault == "half":  # the connection breaks in the middle of the reply
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
            return None
        return handler.reply(200, data, [("Content-Type", "application/json")])

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.hanging.set()
        self.server.shutdown()
        self.server.server_close()

    def outcomes(self):
        """{digest: [outcomes of its requests]}."""
        found = {}
        with self.lock:
            for digest, outcome in self.asked:
                found.setdefault(digest, []).append(outcome)
        return found


if __name__ == "__main__":
    with StandIn(port=int(sys.argv[1]) if sys.argv[1:] else 0) as running:
        print(running.url, flush=True)
        while True:
            time.sleep(1)
