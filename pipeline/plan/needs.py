"""A config's own needs of this machine, for `tunegate doctor CONFIG`: GPUs, a token, disk for its model, the proxy's port."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import hardware, store
from pipeline.data import sources
from pipeline.environments.install import GB
from pipeline.errors import TunegateError
from pipeline.kubernetes import manifests
from pipeline.plan.doctor import Finding

GATED = ("meta-llama/", "google/gemma")  # known to be; of others only the hub knows
BYTES_A_PARAMETER = 7.0  # the base and the merged model in 16 bits, the quantized one, checkpoints and reports
DOWNLOADED = 2.0  # and the hub's own cache
IN_NAME = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", re.IGNORECASE)  # Llama-3.1-8B


def needs(config: Mapping[str, Any]) -> Iterator[Finding]:
    """A resolved config's needs beyond those of every build, and whether they are met."""
    yield from _gpus(config)
    yield from _token(config)
    yield from _disk(config)
    yield _port(config)


def _gpus(config: Mapping[str, Any]) -> Iterator[Finding]:
    """GPUs that training and serving want; a cluster's pod that asks for its own is taken at its word."""
    cluster, train = config["kubernetes"], config["finetune"]
    if cluster and manifests.devices(cluster["flow"]):
        return
    there, optimizer = hardware.device(), train["optimizer"]
    if there.kind == "cpu":
        if optimizer in hardware.GPU_OPTIMIZERS:
            yield Finding(
                "gpu", ok=False, detail=f"none seen, and finetune.optimizer: {optimizer} needs one",
                remedy="set finetune.optimizer: adamw_torch, or build on a machine with a GPU",
            )  # fmt: skip
        return
    keys = {
        "finetune.num_processes": train["num_processes"],
        "serve.tensor_parallel_size": config["serve"]["tensor_parallel_size"],
    }
    short = [f"{key}: {count}" for key, count in keys.items() if count > there.count]
    yield Finding(
        "gpu", ok=not short, detail=f"{there.count} of {there.name}" + (f"; wanted by {', '.join(short)}" if short else ""),
        remedy="lower it, or show more GPUs in CUDA_VISIBLE_DEVICES" if short else None,
    )  # fmt: skip


def _token(config: Mapping[str, Any]) -> Iterator[Finding]:
    """The hub's token, where something comes from the hub that isn't in its cache."""
    data = config["data"]
    sets = [source["path"] for group in sources.GROUPS for source in data[group]]
    names = [config["base_model"]] if _is_on_hub(config) and not _is_cached(config) else []
    names += [name for name in sets if sources.is_hub_id(name)]
    if not names:
        return
    listing = ", ".join(names)
    if os.environ.get("HF_TOKEN") or (_hub_home() / "token").is_file():
        yield Finding("hub token", ok=True, detail=f"there, for {listing}")
        return
    gated_names = [name for name in names if name.startswith(GATED)]
    yield Finding(
        "hub token",
        ok=False,
        detail=f"HF_TOKEN is not set; {', '.join(gated_names)} is gated"
        if gated_names
        else f"HF_TOKEN is not set, for {listing}",
        remedy=f"accept the terms at https://huggingface.co/{(gated_names or names)[0]}, then export HF_TOKEN=…",
        needed=bool(gated_names),
        when="needed where it is gated or private",
    )


def _disk(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Room in the store for what is made of the base model, where its size is known."""
    parameters = _parameters(config)
    if not parameters:
        return
    need = parameters * (BYTES_A_PARAMETER + DOWNLOADED * _is_on_hub(config)) / GB
    place = next(folder for folder in (store.home(), *store.home().parents) if folder.is_dir())
    have = shutil.disk_usage(place).free / GB
    yield Finding(
        "disk for the model",
        have >= need,
        f"{have:.1f} GB free at {place}, about {need:.1f} GB wanted",
        None if have >= need else "free some, or tunegate gc; set TUNEGATE_HOME and HF_HOME elsewhere",
    )


def _port(config: Mapping[str, Any]) -> Finding:
    """Whether the proxy that a promotion starts may listen, or listens already."""
    from pipeline.config.schema import PromoteConfig
    from pipeline.deployment import (
        proxy,  # here because they bring pydantic and httpx
        state,  # here because they bring pydantic and httpx
    )

    promote = PromoteConfig.model_validate(config["promote"])
    folder = state.proxy_folder(config["name"])
    address = f"{promote.host}:{promote.port}"
    try:
        proxy.preflight(promote, folder)
        has_own_proxy = proxy.find(folder) is not None
    except TunegateError as error:
        problem = error.problems[0]
        return Finding("promote.port", ok=False, detail=f"{address}: {problem.what}", remedy=problem.remedy)
    return Finding("promote.port", ok=True, detail=f"{address}, {'held by its own proxy' if has_own_proxy else 'free'}")


def _is_on_hub(config: Mapping[str, Any]) -> bool:
    return sources.is_hub_id(config["base_model"]) and not config["base_model"].endswith(".gguf")


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()


def _is_cached(config: Mapping[str, Any]) -> bool:
    """Whether the base model's commit is in the hub's cache."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub").expanduser()
    folder = f"models--{config['base_model'].replace('/', '--')}"
    return (cache / folder / "snapshots" / str(config["base_model_revision"])).is_dir()


def _parameters(config: Mapping[str, Any]) -> float:
    """The base model's parameters: by its files where it is a folder, else by the size in its name; 0 where neither says."""
    folder = Path(config["base_model"])
    if folder.is_dir():
        return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2
    match = IN_NAME.search(folder.name)
    return float(match[1]) * {"B": 1e9, "M": 1e6}[match[2].upper()] if match else 0.0
