"""A server that speaks the OpenAI protocol, faults included, and a solver of the toy pairs.

python tests/stand_in.py    # prints an address, and answers at once what is asked there
"""

import base64
import collections
import hashlib
import io
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mvp_eval  # noqa: E402


def solve(frames, prompt, row=None):
    """Return the right answer to a toy question: the first frame is compared with the last."""
    question, a, b = re.match(
        r"Question: (.*)\nOption:\n\(A\) (.*)\n\(B\) (.*) \n", prompt
    ).groups()
    source = next(name for name, toy in mvp_eval.TOY.items() if toy[1] == question)
    seen = []
    for frame in (frames[0], frames[-1]):
        balls = np.asarray(frame).max(2) > 200  # only balls have a bright channel
        height, place = np.argwhere(balls).mean(0) if balls.any() else (32, 32)
        edges = np.diff(balls.any(0), prepend=False).sum()  # two a ball
        signs = {"toy_permanence": edges > 0, "toy_turn": place < 32, "toy_count": edges}
        seen.append(signs.get(source, height > 46))
    answer = mvp_eval.CANDIDATES[int(seen[0] != seen[1])]
    return f"Answer: {'AB'[[a, b].index(answer)]}"


def solve_request(body, nth=0):
    """Return `solve` of the body of a chat completion request."""
    *images, text = body["messages"][0]["content"]
    images = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in images]
    return solve([Image.open(io.BytesIO(image)) for image in images], text["text"])


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_):
        """Print nothing."""

    def send(self, status, text, headers={}):  # noqa: B006
        """Send a reply; headers win over those that would be right."""
        self.send_response(status)
        for name, value in {"Content-Length": len(text), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        """Answer a request for the list of models."""
        self.send(*self.server.listing)

    def do_POST(self):
        """Answer a request for a chat completion."""
        text = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(text)
        self.server.bodies.append(body)
        self.server.keys.add(self.headers["Authorization"])
        asked = self.server.asked[hashlib.sha256(text).digest()]
        asked.append("asked")
        nth = len(asked) - 1
        reply = asked[nth] = self.server.reply(body, nth)
        if isinstance(reply, str):
            reply = {"message": {"content": reply}, "finish_reason": "stop"}
        if isinstance(reply, dict):
            reply = (200, json.dumps({"choices": [reply]}))
            asked[nth] = "answered"
        if reply:
            self.send(*reply)
        else:
            self.close_connection = True


class StandIn(ThreadingHTTPServer):
    """with StandIn(reply) as server: server.url is an endpoint.

    reply(body, nth) returns the text of an answer; or a choice, a dict; or (status, text, headers),
    where headers can be left out; or None, to break the connection. nth counts the requests with
    the same body from 0. listing: what /models says, as such a tuple.
    asked: {digest of a body: "answered" or the fault, for each request}. bodies, keys: what came.
    """

    daemon_threads = True

    def __init__(self, reply=lambda body, nth: "Answer: A", listing=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.reply = reply
        self.listing = listing or (200, '{"data": [{"id": "stand-in"}]}')
        self.asked = collections.defaultdict(list)
        self.bodies = []
        self.keys = set()

    def handle_error(self, *_):
        """Print nothing: clients are killed; beside a parser, tracebacks crash Python 3.11."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


if __name__ == "__main__":
    with StandIn() as server:
        print(server.url)
        threading.Event().wait()
