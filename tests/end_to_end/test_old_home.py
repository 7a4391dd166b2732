"""A home that version 0.1 made, with a live server of its own, under today's commands.

The old source is taken from the repository's history and makes the home with its own code and its own processes; only vLLM is
a fake, on a real wire.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from support.wire import chat, free_port, said

ROOT = Path(__file__).parents[2]
VERSION_0_1 = "4077034e"  # the last commit of the flat layout
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# Run with the old source: two approved versions, the first promoted, then the second; a third waits for review.
MAKE = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import released
from registered import a_build, opened, registered
from pipeline import deployment, environments, registry
from pipeline.config import Config
from pipeline.deployment_steps import Promotion
import registered as builds
folder, port = Path(sys.argv[2]), int(sys.argv[3])
site = str(folder / "site" / "fake_site")
released.ENVIRONMENT = builds.ENVIRONMENT = environments.Environment("serve", Path(sys.executable), (Path(site),))
setting = {"serve": {"interpreter": sys.executable, "pythonpath": [site]}}
config = released.a_config(promote={"port": port}, gate=builds.EASY.model_dump(), environments=setting)
for number in (1, 2, 3):
    version = registered(a_build(folder, number, config))
    if number < 3:
        registry.decide("tickets", version, "approved", "tests", "good")
        release = registry.release("tickets", version)
        promotion = Promotion(release, config, released.ENVIRONMENT, registry.set_champion, lambda _: None)
        print(deployment.promote(promotion).live.release.version)
"""


@dataclass
class Home:
    """The folder, the proxy's address, and a way to type commands of today's source."""

    folder: Path
    url: str

    @property
    def environ(self) -> dict[str, str]:
        """Of old and new commands alike, but for the source."""
        inherited = {name: text for name, text in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        return {**inherited, "TUNEGATE_HOME": str(self.folder / "home"), "PYTHONPATH": str(ROOT)}

    def tunegate(self, *arguments: str) -> str:
        """Run a command to its end; all that it printed."""
        process = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments], env=self.environ, cwd=self.folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout
        return process.stdout

    def answer(self) -> str:
        """The live version's own words."""
        return said(chat(self.url))


def old_source(folder: Path) -> Path:
    """Version 0.1 as the repository's history has it."""
    archive = subprocess.run(["git", "archive", VERSION_0_1], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip("this clone holds no history of version 0.1")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Version 2 is live on a server and behind a proxy of the old source's, version 1 was before, version 3 waits."""
    folder = tmp_path_factory.mktemp("old")
    source, port = old_source(folder / "source"), free_port()
    (folder / "site").mkdir()
    shutil.copytree(source / "tests" / "fake_site", folder / "site" / "fake_site")
    shutil.copy(source / "tests" / "fake_vllm.py", folder / "site")
    home = Home(folder, f"http://127.0.0.1:{port}")
    try:
        process = subprocess.run(
            [sys.executable, "-c", MAKE, source, folder, str(port)], env={**home.environ, "PYTHONPATH": str(source)},
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.stdout.split() == ["1", "2"], process.stderr
        yield home
    finally:
        subprocess.run([sys.executable, "-m", "flows.cli", "down"], env=home.environ, cwd=folder, check=False)


def test_status_knows_the_server_that_the_old_version_started(home: Home) -> None:
    """Live, with the version, its reviewer and the one before; the process itself is the old source's."""
    status = json.loads(home.tunegate("status", "tickets", "--json"))[0]
    assert (status["state"], status["version"], status["reviewer"]) == ("live", "2", "tests")
    assert status["previous"] == ["1"]
    assert "pipeline.serving_supervisor" in psutil.Process(status["pid"]).parent().cmdline()
    assert home.answer() == "version 2"


def test_review_shows_the_version_that_waits(home: Home) -> None:
    """Its scores and its gate's table, from the old build's record."""
    shown = home.tunegate("review", "tickets")
    assert "v3" in shown
    assert "exact_match" in shown


def test_a_rollback_from_the_old_server_and_a_promotion_after_it(home: Home) -> None:
    """The old processes leave, today's serve the same bytes; a version that waited is approved and promoted."""
    before = json.loads(home.tunegate("status", "tickets", "--json"))[0]["pid"]
    home.tunegate("rollback", "tickets")
    assert home.answer() == "version 1"
    assert not psutil.pid_exists(before)
    home.tunegate("approve", "tickets", "--version", "3", "--reviewer", "tests")
    home.tunegate("promote", "tickets")
    assert home.answer() == "version 3"
    status = json.loads(home.tunegate("status", "tickets", "--json"))[0]
    assert (status["state"], status["version"]) == ("live", "3")


def test_down_and_promote_bring_it_back(home: Home) -> None:
    """Nothing of the old home is left running, and the approved version comes back."""
    home.tunegate("down")
    with pytest.raises(httpx.HTTPError):
        chat(home.url)
    home.tunegate("promote", "tickets")
    assert home.answer() == "version 3"


def test_prefects_old_deployments_still_find_their_flows() -> None:
    """A deployment keeps its entrypoint in Prefect's database: file and function must stay."""
    old = subprocess.run(
        ["git", "show", f"{VERSION_0_1}:prefect.yaml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if old.returncode:
        pytest.skip("this clone holds no history of version 0.1")
    entrypoints = [deployment["entrypoint"] for deployment in yaml.safe_load(old.stdout)["deployments"]]
    assert len(entrypoints) == 3
    for file, _, function in (entrypoint.partition(":") for entrypoint in entrypoints):
        module = import_module(file.removesuffix(".py").replace("/", "."))
        assert callable(getattr(module, function))
