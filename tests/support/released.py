"""Releases for tests of promotion: tiny model folders that the fake vLLM serves, approved as they are."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from support import model_folder
from support.wire import free_port

from pipeline.artifacts import Approval, Release
from pipeline.config.schema import Config
from pipeline.environments.interpreters import Environment
from pipeline.serving import serve as serving

FAKE_SITE = Path(__file__).parents[1] / "fakes" / "fake_site"
ENVIRONMENT = Environment("serve", Path(sys.executable), (FAKE_SITE,))


def a_config(**sections: Any) -> Config:
    """A config whose proxy has a port of its own and whose timeouts suit a test."""
    serve = {"startup_timeout": 20, "shutdown_timeout": 5, "max_model_len": 256, **sections.pop("serve", {})}
    promote = {"port": free_port(), "drain_timeout": 20, **sections.pop("promote", {})}
    data = {"datasets": [{"path": "rows.jsonl"}]}
    return Config.model_validate({"name": "tickets", "data": data, "serve": serve, "promote": promote, **sections})


def a_model(folder: Path, hello: str | None = None, **behaviour: Any) -> Path:
    """A model folder whose fake server behaves like that; `hello` is its answer to tests' clients alone."""
    folder.mkdir(parents=True)
    if hello is not None:
        behaviour["answers"] = "answers.json"
        (folder / "answers.json").write_text(json.dumps({"hello": hello}), encoding="utf-8")
    texts = {
        "config.json": '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
        "generation_config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "fake_vllm.json": json.dumps(behaviour),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_weights(folder, folder.name)
    return folder


def write_weights(folder: Path, text: str) -> None:
    """A weight file with one tensor, whose bytes are the text's."""
    data = text.encode()
    model_folder.safetensors(folder / "model.safetensors", {"weight": ("U8", [len(data)])}, data)


def a_release(model: Path, version: str, config: Config) -> Release:
    """The model as an approved version."""
    unit = serving.served_unit(model, config.serve, config.name, ENVIRONMENT)
    approval = Approval(
        decision="approved",
        reviewer="tests",
        reason="good",
        unit_digest=unit.digest,
        at=datetime(2026, 11, 1, tzinfo=UTC),
    )
    return Release(
        name=config.name,
        version=version,
        run_id=f"run-{version}",
        model_path=model,
        unit=unit,
        approval=approval,
    )


class Aliases:
    """Stands where MLflow's alias does: a file with each version that it was moved to."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "champion"
        self.fails = False

    def set_champion(self, name: str, version: str) -> None:
        """Move the alias."""
        if self.fails:
            raise OSError("MLflow is away")
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{name} {version}\n")

    @property
    def moves(self) -> list[str]:
        """Every version that the alias was moved to, in order."""
        return [line.split()[1] for line in self.file.read_text().splitlines()] if self.file.exists() else []


def processes_under(folder: Path, program: str) -> list[psutil.Process]:
    """The running processes of that program that work in or on something under the folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        words = process.info["cmdline"] or []
        about = " ".join([*words, process.info["cwd"] or ""])
        if process.info["status"] != psutil.STATUS_ZOMBIE and program in " ".join(words) and str(folder) in about:
            found.append(process)
    return found


def servers_under(folder: Path) -> list[int]:
    """Pids of the model servers of a test."""
    return [process.pid for process in processes_under(folder, "--model") if process.pid != os.getpid()]


def proxies_under(folder: Path) -> list[int]:
    """Pids of the proxies of a test."""
    return [process.pid for process in processes_under(folder, "caddy") if process.pid != os.getpid()]
