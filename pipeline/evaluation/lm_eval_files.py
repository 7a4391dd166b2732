"""Task files of a user's own for lm-eval: read without lm-eval, judged before anything runs, and digested.

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
    found = {str(path): digest_file(path) for file in read(Path(task)) for path in file.files}
    return digest_of(found)


def judged(tasks: Sequence[Mapping[str, Any]], judges: Environment) -> str:
    """One digest for all tasks of a config. Raises ConfigError with all that is wrong with them, also with names."""
    digests: list[str] = []
    problems: list[Problem] = []
    for index, entry in enumerate(tasks):
        key = f"evaluate.tasks[{index}].task"
        try:
            digests.append(digest(entry["task"]))
        except ConfigError as error:
            problems += error.problems
        if not is_path(entry["task"]) and not knows(judges, entry["task"]):
            problems.append(
                Problem(
                    f"lm-eval has no task {entry['task']}",
                    key=key,
                    allowed=_near(entry["task"], judges),
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
    found = [file for place in places if (file := _read(place, problems, alone=place == path))]
    if not found and not problems:
        problems.append(
            Problem("no task file here", file=str(path), allowed="*.yaml with a key task", remedy="correct the path")
        )
    if problems:
        raise ConfigError(problems)
    return found


def knows(judges: Environment, name: str) -> bool:
    """Whether the installed lm-eval may call a task, group or tag so: the word stands in one of its files."""
    word = re.compile(rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w.-])")
    return any(word.search(text) for text in _shipped(judges))


def _near(name: str, judges: Environment) -> str:
    import difflib

    known = {match.decode() for text in _shipped(judges) for match in NAMED.findall(text)}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "what `lm-eval ls tasks` prints in the environment judges"


def _shipped(judges: Environment) -> Iterator[bytes]:
    """The text of each task file that comes with lm-eval, and of what they include under any name."""
    for place in interpreters.places(judges):
        for folder, _, files in os.walk(place / "lm_eval" / "tasks"):
            yield from (Path(folder, file).read_bytes() for file in files if not file.endswith(".py"))


def _read(path: Path, problems: list[Problem], *, alone: bool) -> TaskFile | None:
    """One file as a task; None where it is none, such as a template in a folder."""
    before, seen = len(problems), list[Path]()
    settings = _with_includes(path, seen, problems)
    if len(problems) > before:
        return None
    if not isinstance(settings.get("task"), str) or "class" in settings:
        if alone:
            problems.append(
                Problem(
                    "is no task",
                    file=str(path),
                    allowed="a key task with the task's name",
                    remedy="name each task of a group by itself, or their folder",
                )
            )
        return None
    problems += _code(settings, path)
    data = list(_data_files(settings, path, problems))
    return TaskFile(path, settings, (*seen, *data)) if len(problems) == before else None


def _with_includes(path: Path, seen: list[Path], problems: list[Problem]) -> dict[str, Any]:
    """The settings of a file over those that it includes, as lm-eval merges them; `seen` gets every file read."""
    if path in seen:
        problems.append(Problem("includes itself", file=str(path), key="include", remedy="delete one include"))
        return {}
    seen.append(path)
    try:
        text = path.read_text(encoding="utf-8")
        tagged = list(_tagged(yaml.compose(text, yaml.SafeLoader)))
        settings = yaml.load(text, Loader=_Plain)  # noqa: S506 - a SafeLoader that makes nothing of a tag
    except OSError as error:
        problems.append(Problem(f"can't be read: {error.strerror}", file=str(path), remedy="correct the path"))
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else None
        problems.append(Problem("not YAML", file=str(path), line=line, remedy="correct it"))
        return {}
    for tag, line in tagged:
        what = f"{tag} runs code of the file's author, which is never done"
        problems.append(Problem(what, file=str(path), line=line, allowed="settings and data", remedy=CODE_REMEDY))
    if not isinstance(settings, dict):
        problems.append(
            Problem("holds no keys", file=str(path), allowed="a task's settings", remedy="correct the path")
        )
        return {}
    merged: dict[str, Any] = {}
    includes = settings.pop("include", [])
    for other in includes if isinstance(includes, list) else [includes]:
        merged |= _with_includes((path.parent / str(other)).resolve(), seen, problems)
    return merged | settings


def _tagged(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Every tag that isn't plain YAML, with its line."""
    waiting, done = [node] if node else [], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in done:
            continue
        done.add(id(node))
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
    asked = [
        ("unsafe_code", settings.get("unsafe_code")),
        ("dataset_kwargs.trust_remote_code", (settings.get("dataset_kwargs") or {}).get("trust_remote_code")),
        ("metric_list.hf_evaluate", any(isinstance(each, dict) and each.get("hf_evaluate") for each in metrics)),
    ]
    for key, value in asked:
        if value:
            yield Problem("runs code from elsewhere, which is never done", str(path), key=key, remedy=CODE_REMEDY)


def _data_files(settings: Mapping[str, Any], path: Path, problems: list[Problem]) -> Iterator[Path]:
    """The local files that a task's documents are read from."""
    source, options = str(settings.get("dataset_path", "")), settings.get("dataset_kwargs") or {}
    if HUB_ID.fullmatch(source) and not (path.parent / source).exists():
        return
    asked = options.get("data_files") if source in LOADERS else None
    if not asked:
        problems.append(
            Problem(
                f"dataset_path: {source or 'nothing'} is no data that can be read here",
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
    for name in _flat(asked):
        place = Path(name).expanduser()
        found = sorted(path.parent.glob(name)) if not place.is_absolute() else [place]
        found = [file.resolve() for file in found if file.is_file()]
        if not found:
            problems.append(
                Problem(
                    f"no such data file: {name}",
                    file=str(path),
                    key="dataset_kwargs.data_files",
                    allowed="files beside the task file",
                    remedy="correct the path",
                )
            )
        yield from found


def _flat(asked: Any) -> list[str]:
    """data_files as datasets takes them: a name, a list of names, or either by split."""
    if isinstance(asked, dict):
        return [name for part in asked.values() for name in _flat(part)]
    return [str(name) for name in asked] if isinstance(asked, list) else [str(asked)]
