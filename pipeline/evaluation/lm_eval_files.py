"""Task files of a user's own for lm-eval: read without lm-eval, checked before anything runs, and digested.

A task file is settings and data. `!function` and a metric or a dataset from elsewhere would run code, which is never done, so
they are refused; lm-eval's own tasks come with the locked environment and may have code. Data is JSON, CSV, Parquet or text
beside the task file, or a dataset of the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.digests import digest_file, digest_of
from pipeline.environments import interpreters
from pipeline.environments.interpreters import Environment
from pipeline.errors import ConfigError, Problem

LOADERS = ("json", "csv", "parquet", "text")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
NAMED = re.compile(rb"""^["']?(?:task|group|tag)["']?:[ \t]*["']?([\w.-]+)""", re.MULTILINE)
CODE_REMEDY = "say it in a Jinja template, a filter or another metric of lm-eval, or use a task that comes with lm-eval"


@dataclass(frozen=True)
class TaskFile:
    """A task file, its settings with what it includes, and every local file that decides them."""

    path: Path
    settings: Mapping[str, Any]
    files: tuple[Path, ...]


class _Plain(yaml.SafeLoader):
    """YAML without what its tags would make: they are refused, and everything else is still looked at."""


_Plain.add_constructor(None, lambda _loader, _node: None)


def is_path(task: str) -> bool:
    """Whether a resolved config's task is a file or folder of the user's own, and no name of lm-eval."""
    return task.startswith("/")


def digest(task: str) -> str:
    """Digest of all files of a task: its own, those it includes, and its data; of a name, where lm-eval has the files.

    Raises ConfigError with all that is wrong with them.
    """
    if not is_path(task):
        return digest_of(task)
    digests = {str(path): digest_file(path) for file in read(Path(task)) for path in file.files}
    return digest_of(digests)


def tasks_digest(tasks: Sequence[Mapping[str, Any]], environment: Environment) -> str:
    """One digest for all tasks of a config. Raises ConfigError with all that is wrong with them, also with names."""
    digests: list[str] = []
    problems: list[Problem] = []
    for index, entry in enumerate(tasks):
        key = f"evaluate.tasks[{index}].task"
        try:
            digests.append(digest(entry["task"]))
        except ConfigError as error:
            problems += error.problems
        if not is_path(entry["task"]) and not knows(environment, entry["task"]):
            problems.append(
                Problem(
                    f"{entry['task']} is not a task of lm-eval",
                    key=key,
                    allowed=_near(entry["task"], environment),
                    remedy="correct the name; a file of your own is named with a / or .yaml, such as ./task.yaml",
                )
            )
    if problems:
        raise ConfigError(problems)
    return digest_of(digests)


def read(path: Path) -> list[TaskFile]:
    """The task files at a path: the file itself, or those of a folder that name a task.

    Raises ConfigError with every problem of every file.
    """
    problems: list[Problem] = []
    places = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
    task_files = [file for place in places if (file := _read(place, problems, alone=place == path))]
    if not task_files and not problems:
        problems.append(
            Problem("no task file here", file=str(path), allowed="*.yaml with a key task", remedy="correct the path")
        )
    if problems:
        raise ConfigError(problems)
    return task_files


def knows(environment: Environment, name: str) -> bool:
    """Whether the installed lm-eval may call a task, group or tag so: the word stands in one of its files."""
    word = re.compile(rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w.-])")
    return any(word.search(text) for text in _shipped(environment))


def _near(name: str, environment: Environment) -> str:
    import difflib

    names = {match.decode() for text in _shipped(environment) for match in NAMED.findall(text)}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "what `lm-eval ls tasks` prints in the environment judges"


def _shipped(environment: Environment) -> Iterator[bytes]:
    """The text of each task file that comes with lm-eval, and of what they include under any name."""
    for place in interpreters.places(environment):
        for folder, _, files in os.walk(place / "lm_eval" / "tasks"):
            yield from (Path(folder, file).read_bytes() for file in files if not file.endswith(".py"))


def _read(path: Path, problems: list[Problem], *, alone: bool) -> TaskFile | None:
    """One file as a task; None for another file, such as a template in a folder."""
    before, paths = len(problems), list[Path]()
    settings = _with_includes(path, paths, problems)
    if len(problems) > before:
        return None
    if not isinstance(settings.get("task"), str) or "class" in settings:
        if alone:
            problems.append(
                Problem(
                    "is not a task",
                    file=str(path),
                    allowed="a key task with the task's name",
                    remedy="name each task of a group by itself, or their folder",
                )
            )
        return None
    problems += _code(settings, path)
    data = list(_data_files(settings, path, problems))
    return TaskFile(path, settings, (*paths, *data)) if len(problems) == before else None


def _with_includes(path: Path, paths: list[Path], problems: list[Problem]) -> dict[str, Any]:
    """The settings of a file over those that it includes, as lm-eval merges them; `paths` gets every file read."""
    if path in paths:
        problems.append(Problem("includes itself", file=str(path), key="include", remedy="delete one include"))
        return {}
    paths.append(path)
    try:
        text = path.read_text(encoding="utf-8")
        tags = list(_tagged(yaml.compose(text, yaml.SafeLoader)))
        settings = yaml.load(text, Loader=_Plain)  # noqa: S506 - a SafeLoader that makes nothing of a tag
    except OSError as error:
        problems.append(Problem(f"can't be read: {error.strerror}", file=str(path), remedy="correct the path"))
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else None
        problems.append(Problem("not YAML", file=str(path), line=line, remedy="correct it"))
        return {}
    for tag, line in tags:
        fault = f"{tag} runs code of the file's author, which is never done"
        problems.append(Problem(fault, file=str(path), line=line, allowed="settings and data", remedy=CODE_REMEDY))
    if not isinstance(settings, dict):
        problems.append(
            Problem("must hold keys", file=str(path), allowed="a task's settings", remedy="correct the path")
        )
        return {}
    settings_below: dict[str, Any] = {}
    includes = settings.pop("include", [])
    for include in includes if isinstance(includes, list) else [includes]:
        settings_below |= _with_includes((path.parent / str(include)).resolve(), paths, problems)
    return settings_below | settings


def _tagged(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Every tag that isn't plain YAML, with its line."""
    waiting, visited_ids = [node] if node else [], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in visited_ids:
            continue
        visited_ids.add(id(node))
        if node.tag not in yaml.SafeLoader.yaml_constructors:
            yield (
                f"{node.tag} {node.value}" if isinstance(node, yaml.ScalarNode) else node.tag,
                node.start_mark.line + 1,
            )
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in reversed(node.value) for part in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)


def _code(settings: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    """Settings by which lm-eval would run code that isn't its own."""
    metrics = settings.get("metric_list") or []
    switches = [
        ("unsafe_code", settings.get("unsafe_code")),
        ("dataset_kwargs.trust_remote_code", (settings.get("dataset_kwargs") or {}).get("trust_remote_code")),
        ("metric_list.hf_evaluate", any(isinstance(metric, dict) and metric.get("hf_evaluate") for metric in metrics)),
    ]
    for key, setting in switches:
        if setting:
            yield Problem("runs code from elsewhere, which is never done", str(path), key=key, remedy=CODE_REMEDY)


def _data_files(settings: Mapping[str, Any], path: Path, problems: list[Problem]) -> Iterator[Path]:
    """The local files that a task's documents are read from."""
    source, options = str(settings.get("dataset_path", "")), settings.get("dataset_kwargs") or {}
    if HUB_ID.fullmatch(source) and not (path.parent / source).exists():
        return
    data_files = options.get("data_files") if source in LOADERS else None
    if not data_files:
        problems.append(
            Problem(
                f"dataset_path: {source or 'nothing'} is not data that can be read here",
                file=str(path),
                key="dataset_path",
                allowed=f"{', '.join(LOADERS)} with dataset_kwargs.data_files, or a hub dataset OWNER/NAME",
                remedy="such as dataset_path: json, dataset_kwargs: {data_files: {test: test.jsonl}}",
            )
        )
        return
    if options.get("data_dir"):
        problems.append(
            Problem("isn't followed", str(path), key="dataset_kwargs.data_dir", remedy="write it into data_files")
        )
    for name in _flat(data_files):
        place = Path(name).expanduser()
        matches = sorted(path.parent.glob(name)) if not place.is_absolute() else [place]
        paths = [file.resolve() for file in matches if file.is_file()]
        if not paths:
            problems.append(
                Problem(
                    f"no such data file: {name}",
                    file=str(path),
                    key="dataset_kwargs.data_files",
                    allowed="files beside the task file",
                    remedy="correct the path",
                )
            )
        yield from paths


def _flat(data_files: Any) -> list[str]:
    """data_files as datasets takes them: a name, a list of names, or either by split."""
    if isinstance(data_files, dict):
        return [name for part in data_files.values() for name in _flat(part)]
    return [str(name) for name in data_files] if isinstance(data_files, list) else [str(data_files)]
