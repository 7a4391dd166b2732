"""The chain with `runtime: docker`: judged in a container, promoted into one, answering through Caddy.

Real commands in real processes, as in test_chain.py; vLLM is the image's own, and there is no serve environment: the
config names an interpreter for it that isn't there.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.chain import CONFIG, TESTS, House, ask, row
from support.engine import PLAIN, engine, inspect, labelled, pinned

from pipeline.artifacts import Build
from pipeline.digests import digest_folder
from pipeline.environments import interpreters
from pipeline.serving import docker

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]

NOBODY = "http://127.0.0.1:9/v1"
# What the chain asks beside its scorers, and is tested there.
OTHERS = """\
  prompts: prompts.yaml
  tasks: [{{task: ./words.yaml}}]
  judges: [{{against: base, base_url: "{judge}", model: a-judge, max_items: 10}}]
    - {{metric: words/acc, min: 0.2}}
  judges: [{{against: base, min: 0.2}}]
"""
NO_SERVE = "environments: {serve: {interpreter: /nonexistent/python}}\n"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, str]]:
    """A house and an engine's address; the build went through and its version 1 is approved and promoted."""
    folder = tmp_path_factory.mktemp("container")
    made = House(folder, 9900)
    (folder / "train.jsonl").write_text(
        "".join(row(verb, item) for verb in ("Tell me the", "What is the") for item in range(10))
    )
    (folder / "holdout.jsonl").write_text("".join(row("Say the", item) for item in range(10)))
    train = interpreters.find("train")
    subprocess.run(
        [train.interpreter, TESTS / "support" / "tiny.py", folder / "model"],
        env=interpreters.child_environ(train),
        check=True,
    )
    with engine(folder) as host, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", host)
        container = f"runtime: docker, image: '{pinned(host)}', container: {json.dumps(PLAIN)}, "
        config = CONFIG.format(folder=folder, port=made.port, judge=NOBODY)
        for old, new in (
            ("serve: {", f"serve: {{{container}"),
            ("compare: [base]", "compare: []\n  ledger_items: 0"),
            ("    - {metric: exact_match, against: base, margin: -0.3}\n", ""),
            *((line, "") for line in OTHERS.format(judge=NOBODY).splitlines(keepends=True)),
        ):
            assert old in config
            config = config.replace(old, new)
        (folder / "tiny.yaml").write_text(config + NO_SERVE)
        made.said = made.tunegate("run", made.config)
        made.tunegate("approve", "tiny", "--reviewer", "tests")
        assert "is live" in made.tunegate("promote", "tiny")
        yield made, host
        made.tunegate("down")
        assert labelled(host, docker.UNIT_LABEL) == []


def status(house: House) -> dict:
    """What `tunegate status` says."""
    return json.loads(house.tunegate("status", "tiny", "--json"))[0]


def answer(house: House) -> str:
    """What a client is answered through the proxy."""
    response = ask(house)
    assert response.status_code == httpx.codes.OK, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def builds(house: House) -> list[Build]:
    """The finished builds, oldest first."""
    files = sorted((house.folder / "mlruns" / "work").glob("build/*/build.json"), key=lambda file: file.stat().st_mtime)
    return [Build.model_validate_json(file.read_text()) for file in files]


def test_what_was_judged_in_a_container_serves_in_one(house: tuple[House, str]) -> None:
    """The live container is of the image and of the folder that were judged; the proxy answers as the evaluation heard."""
    made, host = house
    build, now = builds(made)[0], status(made)
    assert (now["state"], now["version"], now["unit_digest"]) == ("live", "1", build.unit.digest)
    evaluated = {item.prompt: item.answer for item in build.evaluations["candidate"].items}
    assert answer(made) == evaluated["Say the code of item 3"]
    assert ask(made, "/tokenize").status_code == httpx.codes.NOT_FOUND
    shown = inspect(host, now["container"])
    assert shown["Image"] == build.unit.runtime_digest == build.config["serve"]["image"].rpartition("@")[2]
    mounts = {mount["Destination"]: mount for mount in shown["Mounts"]}
    assert not mounts["/model"]["RW"]
    assert digest_folder(Path(mounts["/model"]["Source"])) == build.artifacts["quantize"].digest
    assert shown["Config"]["User"] == "65532:65532"
    assert shown["HostConfig"]["ReadonlyRootfs"]
    load = build.loadtests["candidate"]
    assert [level.completed for level in load.levels] == [8 * 3]
    assert "vLLM" in made.tunegate("logs", "tiny")


def test_a_second_release_replaces_it_and_a_rollback_brings_it_back(house: tuple[House, str]) -> None:
    """Version 2, measured beside version 1 that has another flag, takes over; its rollback serves the first again.

    There is one container at a time.
    """
    made, host = house
    made.tunegate("run", made.config, "--set", "seed=43", "--set", "serve.max_num_seqs=3")
    assert set(builds(made)[-1].evaluations) == {"candidate", "incumbent"}
    made.tunegate("approve", "tiny", "--reviewer", "tests")
    first = status(made)["container"]
    assert "v2 is live" in made.tunegate("promote", "tiny")
    second = status(made)
    assert (second["version"], second["state"]) == ("2", "live")
    assert second["container"] != first
    assert labelled(host, docker.UNIT_LABEL) == [second["container"]]
    assert answer(made)
    assert "v1 is live" in made.tunegate("rollback", "tiny")
    assert (status(made)["version"], status(made)["unit_digest"]) == ("1", builds(made)[0].unit.digest)
    assert len(labelled(host, docker.UNIT_LABEL)) == 1
    evaluated = {item.prompt: item.answer for item in builds(made)[0].evaluations["candidate"].items}
    assert answer(made) == evaluated["Say the code of item 3"]
