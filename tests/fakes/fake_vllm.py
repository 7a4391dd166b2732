"""A stand-in for vLLM's API server that speaks its HTTP for real: same command line, same endpoints, no model.

`python tests/fakes/fake_vllm.py --model FOLDER --port N …`, or as `vllm.entrypoints.openai.api_server` with tests/fakes/fake_site on
PYTHONPATH. How it behaves is told by `--fake-NAME VALUE` flags, or by the same names in FOLDER/fake_vllm.json
(`{"startup_delay": 2}`), which the flags override:

    startup_delay S      seconds before it listens
    fail TEXT            print a traceback that ends in TEXT and exit 1 instead of listening
    hang                 never listen
    broken_generation    /health says 200, every generation says 500
    die_after N          exit 1 in the middle of the generation that follows the Nth (readiness asks for one, too)
    die_at S             exit 1 S seconds after it began to listen
    error_every N        every Nth generation is a 500
    ignore_sigterm       only SIGKILL ends it
    delay S              seconds before an answer's first token
    token_delay S        seconds between tokens
    answers FILE         JSON object: text of the last user message -> answer
    answer TEXT          the answer to everything else (default "ok")
    template NAME        how a conversation becomes text: chatml, or headers (another model's)
    bos N                how many BOS bytes stand in front of it (default 0)
    stop TEXT            what ends an answer (default <|im_end|>)

Tokens: an answer's are its words with the space before them; a prompt's ids are the UTF-8 bytes of its ChatML text.
Like vLLM it drains on SIGTERM when --shutdown-timeout is above 0 and aborts what is in flight otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VERSION = "0.0.0"
VALUE_FLAGS = (
    "--host", "--dtype", "--tokenizer", "--generation-config", "--load-format", "--chat-template", "--seed", "--revision",
    "--kv-cache-memory-bytes", "--max-num-seqs", "--max-num-batched-tokens", "--tensor-parallel-size", "--block-size",
    "--gpu-memory-utilization", "--uvicorn-log-level", "--quantization", "--kv-cache-dtype", "--api-server-count",
    "--compilation-config", "--optimization-level", "--max-logprobs",
)  # fmt: skip
BARE_FLAGS = (
    "--enforce-eager", "--disable-log-stats", "--disable-uvicorn-access-log", "--no-enable-prefix-caching",
    "--enable-prefix-caching", "--no-enable-log-requests", "--disable-log-requests", "--async-scheduling",
    "--no-async-scheduling", "--no-enable-chunked-prefill", "--disable-fastapi-docs",
)  # fmt: skip
BEHAVIOUR: dict[str, type] = {
    "startup_delay": float, "fail": str, "hang": bool, "broken_generation": bool, "die_after": int, "die_at": float,
    "error_every": int, "ignore_sigterm": bool, "delay": float, "token_delay": float, "answers": str, "answer": str,
    "template": str, "bos": int, "stop": str,
}  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """Read vLLM's command line and ours; an unknown flag is an error, as in vLLM."""
    parser = argparse.ArgumentParser(prog="api_server.py", allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--shutdown-timeout", type=int, default=0)
    for flag in VALUE_FLAGS:
        parser.add_argument(flag)
    for flag in BARE_FLAGS:
        parser.add_argument(flag, action="store_true")
    for name, kind in BEHAVIOUR.items():
        option: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument("--fake-" + name.replace("_", "-"), **option)
    return parser.parse_args(argv)


def behaviour(args: argparse.Namespace) -> dict[str, Any]:
    """The behaviour that the model folder's fake_vllm.json asks for; flags override it."""
    file = Path(args.model) / "fake_vllm.json"
    chosen: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if unknown := set(chosen) - set(BEHAVIOUR):
        raise SystemExit(f"{file}: unknown {sorted(unknown)}; allowed: {sorted(BEHAVIOUR)}")
    for name in BEHAVIOUR:
        value = getattr(args, f"fake_{name}")
        if value is not None and value is not False:
            chosen[name] = value
    return chosen


def chatml(messages: list[dict[str, Any]], generation_prompt: bool) -> str:
    """The conversation as the text whose bytes are its token ids."""
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    return turns + ("<|im_start|>assistant\n" if generation_prompt else "")


def headers(messages: list[dict[str, Any]], generation_prompt: bool) -> str:
    """The conversation as another model's template has it."""
    turns = "".join(f"### {turn['role']}:\n{turn['content']}\n" for turn in messages)
    return turns + ("### assistant:\n" if generation_prompt else "")


TEMPLATES = {"chatml": chatml, "headers": headers}
BOS = "\x01"


class FakeServer(ThreadingHTTPServer):
    """The state that all requests share."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, args: argparse.Namespace, does: dict[str, Any]) -> None:
        super().__init__((args.host or "127.0.0.1", args.port), Handler)
        self.does = does
        self.names: list[str] = args.served_model_name or [args.model]
        self.max_model_len: int = args.max_model_len
        self.shutdown_timeout: int = args.shutdown_timeout
        self.answers: dict[str, str] = {}
        if "answers" in does:
            self.answers = json.loads(Path(args.model, does["answers"]).read_text(encoding="utf-8"))
        self.lock = threading.Lock()
        self.generations = 0
        self.running = 0
        self.draining = False

    def drain(self) -> None:
        """Refuse what is new, let what is in flight finish, then exit as vLLM does."""
        self.draining = True
        until = time.monotonic() + self.shutdown_timeout
        while self.running and time.monotonic() < until:
            time.sleep(0.02)
        print("[shutdown] API server: shutting down FastAPI HTTP server", file=sys.stderr, flush=True)
        os._exit(0)


class Handler(BaseHTTPRequestHandler):
    """vLLM's endpoints."""

    server: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Log to standard output, as uvicorn does."""
        print(f"INFO:     {self.address_string()} - {format % args}", flush=True)

    def do_GET(self) -> None:
        """Answer /health, /version, /v1/models and /metrics."""
        server = self.server
        if self.path in ("/health", "/ping"):
            self._send(200, b"", "text/plain")
        elif self.path == "/version":
            self._json({"version": VERSION})
        elif self.path == "/v1/models":
            cards = [
                {"id": name, "object": "model", "owned_by": "vllm", "max_model_len": server.max_model_len}
                for name in server.names
            ]
            self._json({"object": "list", "data": cards})
        elif self.path == "/metrics":
            self._send(200, self._metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")
        else:
            self._error(404, "Not Found")

    def do_POST(self) -> None:  # noqa: PLR0911 - one return an answer
        """Answer chat, completions, tokenize and detokenize."""
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            body = json.loads(raw)
        except ValueError:
            return self._error(400, "JSON decode error")
        if body.get("model", self.server.names[0]) not in self.server.names:
            return self._error(404, f"The model `{body['model']}` does not exist.")
        if self.path == "/v1/chat/completions":
            return self._generate(body, chat=True)
        if self.path == "/v1/completions":
            return self._generate(body, chat=False)
        if self.path == "/tokenize":
            return self._tokenize(body)
        if self.path == "/detokenize":
            return self._json({"prompt": bytes(body["tokens"]).decode(errors="replace")})
        return self._error(404, "Not Found")

    def _tokenize(self, body: dict[str, Any]) -> None:
        ids = list(self._prompt(body, body.get("add_generation_prompt", True)).encode())
        answer = {"count": len(ids), "max_model_len": self.server.max_model_len, "tokens": ids}
        self._json({**answer, "token_strs": [chr(i) for i in ids] if body.get("return_token_strs") else None})

    def _prompt(self, body: dict[str, Any], generation_prompt: bool = True) -> str:
        if "messages" not in body:
            return str(body["prompt"])
        does = self.server.does
        render = TEMPLATES[does.get("template", "chatml")]
        return BOS * does.get("bos", 0) + render(body["messages"], generation_prompt)

    def _answer(self, body: dict[str, Any]) -> str:
        asked = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
        return self.server.answers.get(asked, str(self.server.does.get("answer", "ok")))

    def _generate(self, body: dict[str, Any], *, chat: bool) -> None:
        server = self.server
        if server.draining:
            return self._error(503, "The server is shutting down")
        with server.lock:
            server.generations += 1
            server.running += 1
            number = server.generations
        try:
            every = server.does.get("error_every")
            if server.does.get("broken_generation") or (every and number % every == 0):
                return self._error(500, "EngineCore encountered an issue")
            words = re.findall(r"\s*\S+|\s+$", self._answer(body))
            limit = (
                body.get("max_completion_tokens") or body.get("max_tokens") or (server.max_model_len if chat else 16)
            )
            prompt = self._prompt(body)
            if len(prompt.split()) + limit > server.max_model_len and (body.get("max_tokens") or not chat):
                return self._error(400, f"This model's maximum context length is {server.max_model_len} tokens.")
            reply = Reply(
                body, chat, server.names[0], words[:limit], "length" if len(words) > limit else "stop", prompt,
                str(server.does.get("stop", "<|im_end|>")),
            )  # fmt: skip
            if body.get("stream"):
                return self._stream(reply, number)
            for _ in self._paced(reply, number):
                pass
            return self._json(reply.whole())
        finally:
            with server.lock:
                server.running -= 1

    def _paced(self, reply: Reply, number: int) -> Iterator[str]:
        """The answer's tokens at the speed asked for."""
        does = self.server.does
        time.sleep(does.get("delay", 0.0))
        dies = number > does["die_after"] if "die_after" in does else False
        for index, word in enumerate(reply.words):
            if dies and index == len(reply.words) // 2:
                print("RuntimeError: Engine core initialization failed: worker died", file=sys.stderr, flush=True)
                os._exit(1)
            yield word
            time.sleep(does.get("token_delay", 0.0))

    def _stream(self, reply: Reply, number: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        words = list(reply.words)
        for index, word in enumerate(self._paced(reply, number)):
            if reply.chat and index == 0:
                self._chunk(reply.piece("", first=True))  # vLLM sends the role when the first token is there
            self._chunk(reply.piece(word, last=index == len(words) - 1))
        if not words:
            self._chunk(reply.piece("", last=True))
        if (reply.body.get("stream_options") or {}).get("include_usage"):
            self._chunk({**reply.head(chunk=True), "choices": [], "usage": reply.usage()})
        self._raw_chunk(b"data: [DONE]\n\n")
        self._raw_chunk(b"")

    def _chunk(self, value: Any) -> None:
        self._raw_chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _raw_chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _metrics(self) -> str:
        labels = f'{{engine="0",model_name="{self.server.names[0]}"}}'
        return (
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{labels} {float(self.server.running)}\n"
            "# TYPE vllm:num_requests_waiting gauge\n"
            f"vllm:num_requests_waiting{labels} 0.0\n"
            f"vllm:request_success_total{labels} {float(self.server.generations)}\n"
        )

    def _error(self, code: int, message: str) -> None:
        self._json({"error": {"message": message, "type": "FakeError", "param": None, "code": code}}, code)

    def _json(self, value: Any, code: int = 200) -> None:
        self._send(code, json.dumps(value).encode(), "application/json")

    def _send(self, code: int, data: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Reply:
    """One answer in the shapes that OpenAI's API gives it."""

    def __init__(
        self, body: dict[str, Any], chat: bool, model: str, words: list[str], finish: str, prompt: str, stop: str
    ) -> None:
        self.body, self.chat, self.model, self.words = body, chat, model, words
        self.finish, self.prompt, self.stop = finish, prompt, stop
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """Id, object, time and model."""
        kind = ("chat.completion" + (".chunk" if chunk else "")) if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}

    def usage(self) -> dict[str, int]:
        """Token counts."""
        prompt, answer = len(self.prompt.encode()), len(self.words)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def whole(self) -> dict[str, Any]:
        """The answer at once."""
        text = "".join(self.words)
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice: dict[str, Any] = {
            "index": 0,
            **said,
            "logprobs": None,
            "finish_reason": self.finish,
            "stop_reason": None,
        }
        ids = list(self.prompt.encode())
        if self.body.get("return_token_ids"):
            choice["token_ids"] = list((text + (self.stop if self.finish == "stop" else "")).encode())
        extra = {"prompt_token_ids": ids} if self.body.get("return_token_ids") else {}
        return {**self.head(chunk=False), "choices": [choice], "usage": self.usage(), **extra}

    def piece(self, word: str, *, first: bool = False, last: bool = False) -> dict[str, Any]:
        """One event of a stream."""
        said: dict[str, Any] = {"delta": {"content": word}} if self.chat else {"text": word}
        if first:
            said = {"delta": {"role": "assistant", "content": ""}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": self.finish if last else None}
        return {**self.head(chunk=True), "choices": [choice]}


def main(argv: list[str] | None = None) -> None:
    """Serve until told to stop."""
    args = parse(sys.argv[1:] if argv is None else argv)
    does = behaviour(args)
    if does.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(does.get("startup_delay", 0.0))
    if "fail" in does:
        print(
            f'Traceback (most recent call last):\n  File "api_server.py", line 1, in main\n{does["fail"]}',
            file=sys.stderr,
        )
        raise SystemExit(1)
    while does.get("hang"):
        time.sleep(1)
    try:
        server = FakeServer(args, does)
    except OSError as error:
        print(f"OSError: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None
    if not does.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.drain).start())
    if "die_at" in does:
        threading.Timer(does["die_at"], lambda: os._exit(1)).start()
    print(f"INFO:     Uvicorn running on http://{args.host}:{args.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
