"""A cluster's API on a real wire (TLS, a service account's token), whose pods are child processes of the job's own command.

It speaks what the runner asks for: make, read and delete a job, list its pods, follow a pod's log with stamps. A manifest that
Kubernetes' own schema refuses is refused here. A pod sees the variables of its manifest and no others; its volume is the same
folder at the same path, and everything else a node does (mounts, users, limits) is left out.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import re
import signal
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.wire import listening

ROOT = Path(__file__).parents[2]
TOKEN = "the-flow's-token"


@dataclass
class Fate:
    """The fates of a cluster's pods; each word is one that kubelet, scheduler or job controller writes."""

    waits: Mapping[str, Any] | None = None  # a status that a pod never leaves
    waits_for: int = 0  # how often it is asked for before it starts
    reason: str = ""  # why a program that didn't end well is said to have ended
    pod_reason: str = ""
    job_reason: str = ""
    vanishes: bool = False  # somebody deletes the job at the first line of its log
    breaks_after: int = 0  # lines after which each follow of a log is cut off
    set_back_after: int = 0  # lines after which the node's clock is an hour behind
    coarse: bool = False  # a clock of whole seconds
    outages: int = 0  # answers with 503 before the next good one
    forbids: str = ""  # what method and path must match to be answered with 403
    why: str = 'jobs.batch "x" is forbidden: User "system:serviceaccount:tunegate:tunegate" cannot do this'


@dataclass
class Pod:
    """A job, its process and what that has printed."""

    manifest: dict[str, Any]
    child: subprocess.Popen[bytes] | None = None
    lines: list[str] = field(default_factory=list)
    asked: int = 0
    sent: int = 0
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    reader: threading.Thread | None = None

    @property
    def container(self) -> dict[str, Any]:
        """The one container."""
        return dict(self.manifest["spec"]["template"]["spec"]["containers"][0])

    def start(self, secrets: Mapping[str, str], fate: Fate) -> None:
        """Run the container's command, with its variables alone."""
        env = {entry["name"]: entry["value"] for entry in self.container["env"] if "value" in entry}
        for entry in self.container["env"]:
            key = entry.get("valueFrom", {}).get("secretKeyRef", {}).get("key")
            if key in secrets:
                env[entry["name"]] = secrets[key]
        self.child = subprocess.Popen(
            self.container["command"], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, args=(fate,))
        self.reader.start()

    def _read(self, fate: Fate) -> None:
        assert self.child
        assert self.child.stdout
        for line in self.child.stdout:
            behind = fate.set_back_after and len(self.lines) >= fate.set_back_after
            now = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1 if behind else 0)
            part = 0 if fate.coarse else now.microsecond * 1000 + len(self.lines) % 1000
            stamp = f"{now:%Y-%m-%dT%H:%M:%S}.{part:09d}Z"
            self.lines.append(f"{stamp} {line.decode()}")
        self.child.wait()

    @property
    def ended(self) -> bool:
        """Whether its program did, and all that it said was read."""
        return self.reader is not None and not self.reader.is_alive()

    def kill(self) -> None:
        """As kubelet ends what is deleted."""
        if self.child:
            if self.child.poll() is None:
                self.child.send_signal(signal.SIGKILL)
            self.child.wait()
            assert self.reader
            self.reader.join()

    def status(self, fate: Fate) -> dict[str, Any]:
        """The pod's status, as its node would write it."""
        if self.child is None:
            return dict(fate.waits or {"phase": "Pending"})
        if not self.ended:
            return {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}
        code = self.child.returncode if self.child.returncode >= 0 else 128 - self.child.returncode
        terminated = {"exitCode": code, "reason": "Completed" if code == 0 else fate.reason or "Error"}
        more = (
            {"reason": fate.pod_reason, "message": "The node was low on resource: memory."} if fate.pod_reason else {}
        )
        phase = "Succeeded" if code == 0 else "Failed"
        return {"phase": phase, "containerStatuses": [{"state": {"terminated": terminated}}], **more}


class Cluster(ThreadingHTTPServer):
    """The state that all requests share; `asked` are their methods and paths."""

    daemon_threads = True

    def __init__(self, fate: Fate, secrets: Mapping[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fate, self.secrets = fate, secrets
        self.pods: dict[str, Pod] = {}
        self.made: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []

    def remove(self, name: str) -> None:
        """Delete a job with its pod."""
        self.pods.pop(name).kill()


class Handler(BaseHTTPRequestHandler):
    """The few requests."""

    server: Cluster
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, {"kind": "Status", "status": "Failure", "message": message, "code": status})

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.server.asked.append((self.command, url.path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(403, 'jobs.batch is forbidden: User "system:anonymous" cannot create resource "jobs"')
            return
        if self.server.fate.forbids and re.search(self.server.fate.forbids, f"{self.command} {url.path}"):
            self._refuse(403, self.server.fate.why)
            return
        if self.server.fate.outages:
            self.server.fate.outages -= 1
            self._refuse(503, "the server is currently unable to handle the request")
            return
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("POST", r"/apis/batch/v1/namespaces/[\w-]+/jobs", lambda: self._make(json.loads(body))),
            ("GET", r"/apis/batch/v1/namespaces/[\w-]+/jobs/([\w.-]+)", self._job),
            (
                "DELETE",
                r"/apis/batch/v1/namespaces/[\w-]+/jobs/([\w.-]+)",
                lambda name: self._delete(name, json.loads(body)),
            ),
            ("GET", r"/api/v1/namespaces/[\w-]+/pods", lambda: self._pods(asked["labelSelector"])),
            ("GET", r"/api/v1/namespaces/[\w-]+/pods/([\w.-]+)-pod/log", lambda name: self._log(name, asked)),
        ]
        for method, pattern, answer in routes:
            found = re.fullmatch(pattern, url.path)
            if found and method == self.command:
                answer(*found.groups())
                return
        self._refuse(404, f"the server could not find {self.path}")

    do_GET = do_POST = do_DELETE = _handle  # noqa: N815

    def _make(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        if name in self.server.pods:
            self._refuse(409, f'jobs.batch "{name}" already exists')
            return
        try:
            kubernetes_validate.validate(manifest, "1.34", strict=True)
        except kubernetes_validate.ValidationError as error:
            self._refuse(422, f'Job "{name}" is invalid: {error.message}')
            return
        self.server.made.append(manifest)
        self.server.pods[name] = Pod(manifest)
        self._answer(201, self._record(name))

    def _record(self, name: str) -> dict[str, Any]:
        pod = self.server.pods[name]
        return {**pod.manifest, "metadata": {**pod.manifest["metadata"], "uid": pod.uid}}

    def _job(self, name: str) -> None:
        pod = self.server.pods.get(name)
        if pod is None:
            self._refuse(404, f'jobs.batch "{name}" not found')
            return
        conditions = []
        if pod.ended:
            assert pod.child
            kind = "Complete" if pod.child.returncode == 0 else "Failed"
            reason = {} if kind == "Complete" else {"reason": self.server.fate.job_reason or "BackoffLimitExceeded"}
            conditions = [{"type": kind, "status": "True", **reason}]
        self._answer(200, {**self._record(name), "status": {"conditions": conditions}})

    def _delete(self, name: str, options: Mapping[str, Any]) -> None:
        pod = self.server.pods.get(name)
        if pod and options.get("preconditions", {}).get("uid", pod.uid) != pod.uid:
            self._refuse(409, "the UID in the precondition does not match the UID in record")
            return
        if pod:
            self.server.remove(name)
        self._answer(200, {"kind": "Status", "status": "Success"})

    def _pods(self, selector: str) -> None:
        label, _, uid = selector.partition("=")
        assert label == "batch.kubernetes.io/controller-uid"
        found = next(((name, pod) for name, pod in self.server.pods.items() if pod.uid == uid), None)
        if found is None:
            self._answer(200, {"items": []})
            return
        name, pod = found
        pod.asked += 1
        if pod.child is None and self.server.fate.waits is None and pod.asked > self.server.fate.waits_for:
            pod.start(self.server.secrets, self.server.fate)
        record = {"metadata": {"name": f"{name}-pod"}, "spec": pod.manifest["spec"]["template"]["spec"],
                  "status": pod.status(self.server.fate)}  # fmt: skip
        self._answer(200, {"items": [record]})

    def _log(self, name: str, asked: Mapping[str, str]) -> None:
        pod, fate = self.server.pods.get(name), self.server.fate
        if pod is None or asked["container"] != pod.container["name"]:
            self._refuse(404, f'pods "{name}-pod" not found')
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        since = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=int(asked.get("sinceSeconds", 10**6)))
        already, place = pod.sent, 0
        while True:
            over = pod.ended or name not in self.server.pods
            while place < len(pod.lines):
                line = pod.lines[place]
                place += 1
                if line < since.strftime("%Y-%m-%dT%H:%M:%S"):
                    continue
                if fate.breaks_after and place > already + fate.breaks_after:
                    self.close_connection = True  # in the middle of a chunked answer
                    return
                self._chunk(line.encode())
                pod.sent = max(pod.sent, place)
                if fate.vanishes:
                    self.server.remove(name)
                    over = True
            if over:
                self._chunk(b"")
                return
            time.sleep(0.01)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1's own, its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fake cluster")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "server.pem"
    file.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    (folder / "ca.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return file


@contextmanager
def cluster(account: Path, fate: Fate | None = None, secrets: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster that listens while the block runs; `account` gets what a pod finds of its service account."""
    account.mkdir(parents=True, exist_ok=True)
    (account / "token").write_text(f"{TOKEN}\n", encoding="utf-8")
    server = Cluster(fate or Fate(), secrets or {})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(account))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    try:
        with listening(server):
            yield server
    finally:
        for pod in server.pods.values():
            pod.kill()
