"""Stages as jobs, against an API on a real wire whose pods run the stage program (fake_cluster.py); no cluster proved any of it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from fakes.fake_cluster import Fate, cluster
from support import programs as children
from support.data_samples import conversation, payload, settings, write
from support.released import a_config

from flows import jobs as kubernetes
from flows import stages
from pipeline import hardware, program, store
from pipeline.data.splits import SPLITS
from pipeline.environments import interpreters
from pipeline.errors import ConfigError, DataError, EnvironmentMissing, ResourceError, StageFailed
from pipeline.kubernetes import manifests
from pipeline.plan import steps
from pipeline.plan.steps import Step

IMAGE = f"registry.example.com/tunegate-pipeline@sha256:{'0' * 64}"
# What a stage program does that isn't one of ours: speak the wire, then what the test asks for.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
def emit(**event): print(json.dumps(event), flush=True)
raw = json.loads(Path(sys.argv[1]).read_text())
"""
WELL = (
    PROGRAM
    + """
for number in range(20):
    emit(event="progress", done=number, total=20, unit="steps", metrics={})
    print(f"noise {number}", file=sys.stderr, flush=True)
print("17", flush=True)
Path(raw["folder"], "result.json").write_text(json.dumps({"token": os.environ.get("HF_TOKEN"), "names": sorted(os.environ)}))
"""
)
KILLED = PROGRAM + "print('loading', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
ENDLESS = PROGRAM + "emit(event='message', text='started'); time.sleep(600)"


class World:
    """A flow's pod: its store, its config, and the program that its jobs run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.events: list[program.Event] = []
        self.step = Step("prepare", "pipeline.data.prepare", "control", (), ("data",), (), timeout_hours=2)

    def config(self, **cluster):
        """A resolved config whose stages are jobs."""
        jobs = {"prepare": {"resources": {"limits": {"memory": "2Gi"}}}}
        return a_config(kubernetes={"image": IMAGE, "jobs": jobs, **cluster}).model_dump(mode="json")

    def reach(self, port: int) -> None:
        """Be in a pod of the cluster at this port."""
        self._monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        self._monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))

    def run(self, server, code: str, on_event=None, **chosen):
        """Run a program as the job of a stage; its result."""
        self.reach(server.server_port)
        self._monkeypatch.setattr(interpreters, "command", lambda found, _module: [sys.executable, "-c", code])
        request = program.Request({}, {}, self.folder / "home" / "work")
        return stages.run_program(
            "pipeline.data.prepare",
            "control",
            self.config(**chosen),
            request,
            on_event or self.events.append,
            step=self.step,
        )

    @property
    def log(self) -> str:
        """The stage's log on the volume."""
        return (self.folder / "home" / "work" / "log.txt").read_text(encoding="utf-8")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(manifests.CLAIM, "tunegate")
    monkeypatch.setenv(manifests.IMAGE, IMAGE)
    monkeypatch.setattr(kubernetes, "ACCOUNT", tmp_path / "account")
    monkeypatch.setattr(kubernetes, "POLL_S", 0.02)
    monkeypatch.setattr(kubernetes, "RESULT_S", 0.2)
    return World(tmp_path, monkeypatch)


@pytest.fixture
def cluster_of(tmp_path):
    """Clusters whose account is where the world looks for it."""
    return lambda fate=None, **secrets: cluster(tmp_path / "account", fate, secrets)


def test_a_stage_runs_as_a_job_and_its_result_is_read_from_the_volume(world, cluster_of):
    """Events come in order, the rest is the log, the Secret's value is seen by the program and stands in no manifest."""
    with cluster_of(HF_TOKEN="hf_secret") as server:
        result = world.run(server, WELL)
    assert result["token"] == "hf_secret"
    assert [event["done"] for event in world.events if event["event"] == "progress"] == list(range(20))
    assert world.log.splitlines() == [*(f"noise {number}" for number in range(20)), "17"]
    (job,) = server.made
    assert "hf_secret" not in str(job)
    assert job["spec"]["activeDeadlineSeconds"] == 7200


def test_a_job_goes_with_the_pod_of_its_flow(world, cluster_of, monkeypatch):
    """A flow that can't say goodbye leaves it to the cluster."""
    monkeypatch.setenv(manifests.POD, "tickets-abc")
    monkeypatch.setenv(manifests.POD_UID, "1-2-3")
    with cluster_of() as server:
        world.run(server, WELL)
    (job,) = server.made
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "tickets-abc", "uid": "1-2-3"}
    assert job["metadata"]["ownerReferences"] == [owner]


def test_the_programs_environment_is_the_manifests(world, cluster_of, monkeypatch):
    """A variable of the flow's pod isn't handed on; where the code and mlruns lie is."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "x")
    with cluster_of() as server:
        names = world.run(server, WELL, env={"HF_HUB_OFFLINE": "1"})["names"]
    assert {"HF_HUB_OFFLINE", "PATH", "PYTHONPATH", "TUNEGATE_HOME"} <= set(names)
    assert not {"MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", manifests.CLAIM} & set(names)


@pytest.mark.parametrize("coarse", [False, True])
def test_a_log_that_breaks_off_is_followed_on_without_a_line_twice(world, cluster_of, coarse):
    """Each connection is cut after seven lines; also where many lines have one stamp."""
    with cluster_of(Fate(breaks_after=7, coarse=coarse)) as server:
        world.run(server, WELL)
    assert [event["done"] for event in world.events if event["event"] == "progress"] == list(range(20))
    assert world.log.splitlines() == [*(f"noise {number}" for number in range(20)), "17"]
    assert len([path for _, path in server.asked if path.endswith("/log")]) > 5


def test_a_clock_that_is_set_back_costs_no_line(world, cluster_of):
    """Least of all the last one, which may be the program's error."""
    error = 'emit(event="error", type="DataError", problems=[{"what": "a bad row"}]); sys.exit(2)'
    with cluster_of(Fate(set_back_after=7)) as server, pytest.raises(DataError, match="a bad row"):
        world.run(server, f"{WELL}\n{error}")
    assert [event["done"] for event in world.events if event["event"] == "progress"] == list(range(20))
    assert world.log.splitlines() == [*(f"noise {number}" for number in range(20)), "17"]


def test_an_api_that_is_away_for_a_while_is_asked_again(world, cluster_of):
    """Five answers of 503 cost no stage."""
    with cluster_of(Fate(outages=5)) as server:
        assert world.run(server, WELL)["token"] is None


def test_the_programs_own_error_comes_back_as_it_was(world, cluster_of):
    """Over the log, with its type and problems."""
    error = {"event": "error", "type": "DataError", "problems": [{"what": "a bad row", "file": "x.jsonl", "line": 3}]}
    with cluster_of() as server, pytest.raises(DataError, match=r"x\.jsonl:3: a bad row"):
        world.run(server, f"{PROGRAM}\nprint(json.dumps({error!r}), flush=True); sys.exit(2)")


def test_an_event_behind_a_progress_bar_is_heard(world, cluster_of):
    """A pod's log is one stream: what standard error left without a line's end stands before the event."""
    code = f"""{PROGRAM}
bar = lambda text: (sys.stderr.write(text), sys.stderr.flush())
bar("\\r 50%|# | 1/2"); emit(event="message", text='said {{"event": "message"}}')
bar("\\r100%|##| 2/2"); emit(event="error", type="DataError", problems=[{{"what": "a bad row"}}]); sys.exit(2)
"""
    with cluster_of() as server, pytest.raises(DataError, match="a bad row"):
        world.run(server, code)
    assert [event["text"] for event in world.events] == ['said {"event": "message"}']
    assert [line.strip() for line in world.log.splitlines() if line.strip()] == ["50%|# | 1/2", "100%|##| 2/2"]


def test_a_gpu_too_full_for_bitsandbytes_is_told_as_memory(world, cluster_of):
    """It ends the program with a line and no error; an earlier job's line says nothing of this one."""
    ends = "import os, sys\nsys.stderr.write({!r}); sys.stderr.flush(); os._exit(1)\n"
    with (
        cluster_of() as server,
        pytest.raises(ResourceError, match="ended the program: Error out of memory at line 74"),
    ):
        world.run(server, ends.format("Error out of memory at line 74 in file ops.cu\n"))
    with cluster_of() as server, pytest.raises(StageFailed, match="ended with status 1"):
        world.run(server, ends.format("something else\n"))


@pytest.mark.parametrize(
    ("fate", "kind", "words"),
    [
        (Fate(reason="OOMKilled"), ResourceError, ["OOMKilled", "its limit of 2Gi", "kubernetes.jobs.prepare.resources.limits.memory"]),
        (Fate(pod_reason="Evicted"), StageFailed, ["evicted: The node was low on resource: memory."]),
        (Fate(job_reason="DeadlineExceeded"), StageFailed, ["longer than the stage may take"]),
        (Fate(), StageFailed, ["was killed (status 137)"]),
    ],
)  # fmt: skip
def test_a_killed_program_is_told_by_who_killed_it(world, cluster_of, fate, kind, words):
    """Each names the log and the command that shows more."""
    with cluster_of(fate) as server, pytest.raises(kind) as error:
        world.run(server, KILLED)
    assert type(error.value) is kind
    for word in [*words, "kubectl describe job tunegate-prepare-", "log.txt"]:
        assert word in str(error.value)
    assert world.log == "loading\n"


UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}],
}  # fmt: skip


def test_a_pod_without_a_node_is_given_up_after_its_patience(world, cluster_of):
    """What it waits for is told at once and in the error; the job is deleted."""
    with cluster_of(Fate(waits=UNSCHEDULABLE)) as server, pytest.raises(ResourceError) as error:
        world.run(server, WELL, pod_watch_timeout_seconds=1)
    assert {event["text"] for event in world.events} == {
        "prepare waits for a node: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    }
    for word in ("3 Insufficient nvidia.com/gpu", "kubernetes.pod_watch_timeout_seconds", "kubectl describe job"):
        assert word in str(error.value)
    assert server.pods == {}


@pytest.mark.parametrize(
    ("reason", "kind", "key"),
    [("ImagePullBackOff", EnvironmentMissing, "kubernetes.image"), ("CreateContainerConfigError", StageFailed, "container")],
)  # fmt: skip
def test_a_pod_that_cannot_start_is_not_waited_for(world, cluster_of, reason, kind, key):
    """An image that isn't there and a container that can't be made end the stage at once, and the job."""
    waiting = {"reason": reason, "message": "manifest unknown"}
    fate = Fate(waits={"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]})
    with cluster_of(fate) as server, pytest.raises(kind, match="manifest unknown") as error:
        world.run(server, WELL)
    assert key in str(error.value)
    assert server.pods == {}


def test_a_flow_that_is_stopped_takes_its_job_with_it(world, cluster_of):
    """Ctrl-C, or a cancelled run's signal, while the program works."""
    children_of: list = []

    def stop(event):
        if event["event"] == "message" and event["text"] == "started":
            children_of.extend(pod.child for pod in server.pods.values())
            raise KeyboardInterrupt

    with cluster_of(Fate(waits_for=2)) as server, pytest.raises(KeyboardInterrupt):
        world.run(server, ENDLESS, on_event=stop)
    assert server.pods == {}
    assert [child.returncode for child in children_of] == [-9]


def test_a_job_that_somebody_deletes_is_no_riddle(world, cluster_of):
    """Say so, and how to go on."""
    with cluster_of(Fate(vanishes=True)) as server, pytest.raises(StageFailed, match="was deleted while it ran"):
        world.run(server, ENDLESS)


def test_a_job_that_a_killed_flow_left_is_replaced(world, cluster_of):
    """One folder, one job: the old one is deleted before the new one is made."""
    with cluster_of() as server:
        started, failures = threading.Event(), []

        def first():
            with pytest.raises(StageFailed, match="was deleted while it ran") as error:
                world.run(server, ENDLESS, on_event=lambda _event: started.set())
            failures.append(error)

        left = threading.Thread(target=first)
        left.start()
        assert started.wait(20)
        (old,) = (pod.child for pod in server.pods.values())
        assert world.run(server, WELL)["token"] is None
        left.join(20)
    assert old.returncode == -9
    assert len(failures) == 1
    assert len(server.made) == 2


def test_a_service_account_without_the_right_is_told_what_to_apply(world, cluster_of, tmp_path):
    """The API's own words and the command."""
    with cluster_of() as server:
        (tmp_path / "account" / "token").write_text("another")
        with pytest.raises(EnvironmentMissing, match='cannot create resource "jobs"') as error:
            world.run(server, WELL)
    assert "tunegate manifests CONFIG | kubectl apply" in str(error.value)


def test_a_log_that_may_not_be_read_is_told(world, cluster_of):
    """At once: the program would go on for hours, unheard."""
    with cluster_of(Fate(forbids="/log$")) as server, pytest.raises(EnvironmentMissing, match="may not do this"):
        world.run(server, ENDLESS)
    assert server.pods == {}


def test_a_job_that_may_not_be_deleted_is_told(world, cluster_of):
    """What the flow was ended by stays the error; whoever runs it reads what is left, and the command."""

    def stop(event):
        world.events.append(event)
        if event["text"] == "started":
            raise KeyboardInterrupt

    with cluster_of(Fate(forbids="^DELETE")) as server:
        with pytest.raises(KeyboardInterrupt):
            world.run(server, ENDLESS, on_event=stop)
        assert "prepare's job may go on (the flow's service account may not" in world.events[-1]["text"]
        assert "kubectl delete job tunegate-prepare-" in world.events[-1]["text"]
        with pytest.raises(EnvironmentMissing, match="may not do this"):  # in place of the one that is left
            world.run(server, WELL)


@pytest.mark.parametrize(
    ("why", "kind", "words"),
    [
        ("exceeded quota: gpus, requested: count/jobs.batch=1, used: count/jobs.batch=2, limited: count/jobs.batch=2",
         ResourceError, ["kubernetes.jobs.prepare.resources", "kubectl describe quota -n tunegate", "exceeded quota: gpus"]),
        ('violates PodSecurity "restricted:latest"', StageFailed, ["doesn't admit", "kubectl describe job"]),
    ],
)  # fmt: skip
def test_a_quota_and_a_rule_are_no_missing_right(world, cluster_of, why, kind, words):
    """Each is a 403, too."""
    fate = Fate(forbids="^POST", why=f'jobs.batch "x" is forbidden: {why}')
    with cluster_of(fate) as server, pytest.raises(kind) as error:
        world.run(server, WELL)
    assert type(error.value) is kind
    assert "kubectl apply" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_server_of_another_certificate_gets_no_token(world, cluster_of, tmp_path, monkeypatch):
    """The cluster's own authority alone is trusted."""
    monkeypatch.setattr(kubernetes, "TRIES", 1)
    with cluster_of(), cluster(tmp_path / "other") as other, pytest.raises(StageFailed, match="CERTIFICATE"):
        world.run(other, WELL)
    assert other.asked == []


def test_a_flow_makes_no_job_of_another_image_or_volume_than_its_own(world, cluster_of, monkeypatch):
    """The config was changed, and the pool's template not: code and files would be others than the flow's."""
    other = IMAGE.replace("0" * 64, "1" * 64)
    with cluster_of() as server, pytest.raises(ConfigError) as error:
        world.run(server, WELL, image=other, claim_name="another")
    assert server.asked == []
    assert {problem.key for problem in error.value.problems} == {"kubernetes.image", "kubernetes.claim_name"}
    for word in (other, IMAGE, "another", "tunegate deploy"):
        assert word in str(error.value)


def test_outside_a_pod_with_the_volume_a_stage_is_a_child_process(world, cluster_of, monkeypatch):
    """The same config on a machine makes no job."""
    monkeypatch.delenv(manifests.CLAIM)
    with cluster_of() as server:
        assert world.run(server, WELL)["token"] is None
    assert server.asked == []


def test_a_job_on_another_node_has_a_key_of_its_own(world, monkeypatch):
    """What a CPU pod's flow trains on a GPU isn't taken for what a CPU trained."""
    config = world.config(jobs={"finetune": {"resources": {"limits": {"nvidia.com/gpu": 1, "memory": "9Gi"}}}})
    here = hardware.device().name
    assert manifests.device_of(config, "quantize", here) == here
    assert "nvidia.com/gpu" in manifests.device_of(config, "finetune", here)
    monkeypatch.delenv(manifests.CLAIM)
    assert manifests.device_of(config, "finetune", here) == here


@pytest.mark.slow
def test_the_data_stage_makes_its_artefact_in_a_pod(world, cluster_of, tmp_path):
    """The whole way of a build's step: lock, request, job of the train environment, log, result, store."""
    base = tmp_path / "base"
    children.tiny(base / "payload")
    rows = write(tmp_path / "rows.jsonl", [conversation(number) for number in range(40)])
    config = {**world.config(), **settings(rows, sequence_len=64, max_near_duplicate_rate=1.0)}
    (step,) = (step for step in steps.steps(config) if step.stage == "prepare")
    inputs = {"base": children.artifact(base, "base", {})}
    with cluster_of() as server:
        world.reach(server.server_port)
        key = stages._make.fn(step, config, inputs, "k", {}, {}, world.events.append)
    made = store.find("prepare", key)
    assert made is not None
    assert {split: len(rows) for split, rows in payload(made.path).items()}.keys() == set(SPLITS)
    assert made.detail["rows"]["train"] > 20
    assert [event["state"] for event in world.events if event["event"] == "stage"] == ["running", "done"]
    assert any(event["event"] == "message" and "tokenizer" in event["text"] for event in world.events)
    (job,) = server.made
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][1:4] == ["-P", "-m", "pipeline.data.prepare"]
    assert job["spec"]["activeDeadlineSeconds"] == step.timeout_hours * 3600
