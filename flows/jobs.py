"""A stage program as a Kubernetes job: made, followed by its log, ended with its flow.

The flow runs in a pod itself and has mlruns on a volume that jobs can mount. It speaks the API with the pod's own service
account. A job's name follows from its folder, so that two never work in one folder: a killed flow's job is deleted first.
"""

from __future__ import annotations

import os
import re
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from pipeline import program, store
from pipeline.config.schema import Config
from pipeline.digests import digest_of
from pipeline.environments import interpreters
from pipeline.environments.interpreters import Environment
from pipeline.errors import StageFailed, TunegateError
from pipeline.kubernetes import diagnosis, manifests
from pipeline.plan.steps import Step

OnEvent = Callable[[program.Event], None]

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_S = 1.0
SILENCE_S = 60.0  # a log connection that is silent for so long is made anew
OVERLAP_S = 10  # then so many seconds of the log are read again
TRIES = 12
GOING_S = 600.0  # a pod on a lost node takes five minutes to go
RESULT_S = 60.0  # a network file system may show a new file so late
DENIED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
POD_LABEL = "batch.kubernetes.io/controller-uid"
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\S+ ")


def run(
    step: Step,
    config: Config,
    interpreter: Environment,
    environ: Mapping[str, str],
    secrets: tuple[str, ...],
    request: program.Request,
    on_event: OnEvent,
) -> dict[str, Any]:
    """Run the step's program as a job to its end and return its result.

    Raises the TunegateError that the program reported, EnvironmentMissing without the image or the right to make jobs,
    ResourceError without a node or memory, StageFailed for every other end.
    """
    assert config.kubernetes is not None  # noqa: S101 - or the stage would have no pod
    cluster = config.kubernetes.model_dump(mode="json")
    file, log = program.write_request(request), request.folder / "log.txt"
    manifest = manifests.stage_job(
        cluster,
        step.stage,
        f"tunegate-{step.stage}-{digest_of(str(request.folder))[:16]}",
        [*interpreters.command(interpreter, step.program), str(file)],
        {name: environ[name] for name in ("PATH", "PYTHONPATH", "TUNEGATE_HOME", "HF_HOME") if name in environ},
        secrets=secrets,
        timeout_s=step.timeout_hours * 3600,
        home=store.home(),
        shm_size=config.serve.container.shm_size,
        owner=_owner(),
    )
    errors: list[program.Event] = []
    with _client() as client, log.open("a", encoding="utf-8") as sink:
        start = sink.tell()
        job = _Job(client, manifest, step.stage)
        job.create()
        try:
            pod = _until_started(job, step.stage, cluster["pod_watch_timeout_seconds"], on_event)
            for line in job.lines(pod):
                program.relay(f"{line}\n", sink, errors, on_event)
            record, pod = job.read(), job.pod() or pod
        finally:
            job.end(on_event)
    result = _result(request) if not errors and diagnosis.went_well(record, pod) else None
    if result is None:
        error = program.error_of(errors, log, start)
        raise error or diagnosis.death(record, pod, step.stage, str(log), job.describe)
    return result


class _Job:
    """One job in the API, and the requests about it; a cluster that doesn't answer is asked again for some minutes."""

    def __init__(self, client: httpx.Client, manifest: manifests.Manifest, stage: str) -> None:
        self._client, self._manifest, self._stage, self._tries = client, manifest, stage, TRIES
        self._uid = ""
        self._namespace, self._name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        self._jobs = f"/apis/batch/v1/namespaces/{self._namespace}/jobs"
        self._pods = f"/api/v1/namespaces/{self._namespace}/pods"
        self.describe = f"kubectl describe job {self._name} -n {self._namespace}"

    def create(self) -> None:
        """Make the job, in place of an earlier job of the same folder."""
        for _ in range(TRIES):
            answer = self._ask("POST", self._jobs, json=self._manifest)
            if answer.status_code != httpx.codes.CONFLICT:
                self._uid = self._must(answer)["metadata"]["uid"]
                return
            self._replace()
        raise StageFailed("another flow makes the same job at the same time", remedy=self.describe)

    def _replace(self) -> None:
        """Delete the job of this name and wait until its pod is gone too, which may still write into the folder."""
        self._delete()
        until = time.monotonic() + GOING_S
        while (answer := self._get()).status_code != httpx.codes.NOT_FOUND:
            self._must(answer)
            if time.monotonic() > until:
                raise StageFailed("an earlier job of the same stage doesn't go away", remedy=self.describe)
            time.sleep(POLL_S)

    def read(self) -> dict[str, Any] | None:
        """The job's record, or None when the job is gone, also when another job has its name by now."""
        answer = self._get()
        record = None if answer.status_code == httpx.codes.NOT_FOUND else self._must(answer)
        return record if record and record["metadata"]["uid"] == self._uid else None

    def pod(self) -> dict[str, Any] | None:
        """The record of the job's pod, or None before it is made and after it is gone."""
        selector = {"labelSelector": f"{POD_LABEL}={self._uid}"}
        pods = self._must(self._ask("GET", self._pods, params=selector))["items"]
        return dict(pods[0]) if pods else None

    def lines(self, pod: Mapping[str, Any] | None) -> Iterator[str]:
        """The log's lines as they come, each once, until the job is over; a broken connection is made anew.

        A node's clock may be set back, and two lines may share a stamp. So only a whole line that was just read is left out.
        """
        recent: deque[tuple[float, str]] = deque()  # when a line came, and the line with its stamp
        failures = 0
        while pod is not None and failures < TRIES:
            over = diagnosis.is_over(self.read(), self.pod())  # asked first: a later line is read next time
            params = {"container": manifests.CONTAINER, "follow": "true", "timestamps": "true"}
            if recent:
                params["sinceSeconds"] = str(int(time.monotonic() - recent[-1][0]) + OVERLAP_S)
            read = Counter(line for _, line in recent)
            try:
                for line in self._follow(f"{self._pods}/{pod['metadata']['name']}/log", params):
                    if read[line]:
                        read[line] -= 1
                        continue
                    recent.append((time.monotonic(), line))
                    while recent[-1][0] - recent[0][0] > 2 * OVERLAP_S:
                        recent.popleft()
                    yield line.partition(" ")[2] if STAMP.match(line) else line
            except httpx.TransportError:
                failures += over  # the end of a finished log is worth some tries
            else:
                if over:
                    return
            time.sleep(POLL_S)

    def end(self, on_event: OnEvent) -> None:
        """Delete the job unless it is over; a job that is over can be looked at until the cluster removes it.

        Asks once: a flow that is being ended has little time, and the user must read the error that ended it. A message tells of
        a job that may go on.
        """
        self._tries = 1
        try:
            if not diagnosis.is_over(self.read(), self.pod()):
                self._delete(preconditions={"uid": self._uid})
        except TunegateError as error:
            remedy = f"kubectl delete job {self._name} -n {self._namespace}"
            on_event(
                {"event": "message", "text": f"{self._stage}'s job may go on ({error.problems[0].what}): {remedy}"}
            )

    def _get(self) -> httpx.Response:
        return self._ask("GET", f"{self._jobs}/{self._name}")

    def _delete(self, **options: Any) -> None:
        options = {"propagationPolicy": "Foreground", **options}
        answer = self._ask("DELETE", f"{self._jobs}/{self._name}", json=options)
        if answer.status_code not in (httpx.codes.NOT_FOUND, httpx.codes.CONFLICT):  # gone, or another's by now
            self._must(answer)

    def _follow(self, path: str, params: Mapping[str, str]) -> Iterator[str]:
        timeout = httpx.Timeout(30, read=SILENCE_S)
        with self._client.stream("GET", path, params=params, timeout=timeout) as response:
            if response.is_success:
                yield from response.iter_lines()
            elif response.status_code in DENIED:
                response.read()
                self._must(response)

    def _ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        for number in range(self._tries):
            try:
                answer = self._client.request(method, path, **content)
            except httpx.TransportError as error:
                cause = str(error) or type(error).__name__
            else:
                if answer.status_code != httpx.codes.TOO_MANY_REQUESTS and not answer.is_server_error:
                    return answer
                cause = _message(answer)
            if number + 1 < self._tries:
                time.sleep(min(30.0, POLL_S * 2**number))
        raise StageFailed(
            f"the cluster's API does not answer: {cause}", remedy=f"kubectl get --raw /readyz; {self.describe}"
        )

    def _must(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code in DENIED:
            raise diagnosis.denial(_message(answer), self._stage, self._namespace, self.describe)
        if not answer.is_success:
            raise StageFailed(
                f"the cluster refused the job {self._name}: {_message(answer)}",
                remedy="tunegate manifests CONFIG --jobs",
            )
        return dict(answer.json())


def _until_started(job: _Job, stage: str, patience_s: float, on_event: OnEvent) -> dict[str, Any] | None:
    """The job's pod once its program runs; None when the job ended without one."""
    began, message = time.monotonic(), ""
    while True:
        pod = job.pod()
        if diagnosis.is_running(pod) or diagnosis.is_over(job.read(), pod):
            return pod
        if error := diagnosis.refusal(pod, stage, job.describe):
            raise error
        waits = diagnosis.waits_for(pod)
        if waits and waits != message:
            on_event({"event": "message", "text": f"{stage} waits for {waits}"})
            message = waits
        if time.monotonic() - began > patience_s:
            raise diagnosis.impatience(pod, stage, patience_s, job.describe)
        time.sleep(POLL_S)


def _result(request: program.Request) -> dict[str, Any] | None:
    until = time.monotonic() + RESULT_S
    while (result := program.result_of(request)) is None and time.monotonic() < until:
        time.sleep(POLL_S)
    return result


def _client() -> httpx.Client:
    """A client of the cluster that this process runs in, as the pod's service account."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    return httpx.Client(base_url=url, verify=context, auth=_signed, timeout=30, trust_env=False)


def _signed(request: httpx.Request) -> httpx.Request:
    """Sign with the token, read anew each time: the cluster renews it every hour."""
    request.headers["Authorization"] = f"Bearer {(ACCOUNT / 'token').read_text(encoding='utf-8').strip()}"
    return request


def _owner() -> tuple[str, str] | None:
    name, uid = os.environ.get(manifests.POD), os.environ.get(manifests.POD_UID)
    return (name, uid) if name and uid else None


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text[:200]}"
