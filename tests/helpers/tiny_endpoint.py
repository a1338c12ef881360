"""An OpenAI-compatible endpoint in this process that does as it is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers each request with what `script` returns for (its body, how often this body came).

    That is a dict, a (status, headers, bytes) triple, a function that writes to the connection itself, or None to close
    it. The default answers with the prompt and the seed.
    """

    def __init__(self):
        self.seen: list[tuple[str, dict, dict]] = []
        self.script = self.answer
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                data = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(data)
                with outer.lock:
                    times = sum(seen == body for _, _, seen in outer.seen)
                    outer.seen.append((self.path, dict(self.headers), body))
                made = outer.script(body, times)
                if made is None:
                    self.close_connection = True
                    return
                if callable(made):
                    self.close_connection = True
                    try:
                        made(self.wfile)
                    except OSError:
                        return  # the client had enough
                    return
                status, headers, text = made if isinstance(made, tuple) else (200, {}, json.dumps(made).encode())
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    @staticmethod
    def answer(body, times=0):
        chat = "messages" in body
        said = (body["messages"][-1]["content"] if chat else body["prompt"]) + f" {body.get('seed', 0) % 1000}"
        choice = {"index": 0, "finish_reason": "stop"}
        if chat:
            choice |= {"message": {"content": said}, "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}]}}
        else:
            choice |= {"text": said, "logprobs": {"token_logprobs": [-1.0, -2.0]}}
        return {"choices": [choice], "usage": {"completion_tokens": 2}}

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def error(message):
    return json.dumps({"error": {"message": message}}).encode()
