"""The `tunegate` command: each command's options, and the function that answers it.

Nothing heavy is imported before the command is known, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flows import surroundings
from pipeline.errors import TunegateError

OURS = ("127.0.0.1", "localhost")
READERS = (  # these need no store that can be written
    "flows.commands.check:check",
    "flows.commands.check:schema",
    "flows.commands.check:doctor",
    "flows.commands.setup:setup",
    "flows.deployments:show",
)
DESCRIPTION = (
    "From a base model and your data to an approved model that serves: byte for byte the model that was evaluated."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a TunegateError is printed with its remedy and sets the exit code."""
    options = parser().parse_args(arguments)
    if options.answer in READERS:
        be_quick()
    pass_proxies_by()
    surroundings.set_environment()
    module, function = options.answer.split(":")
    try:
        if _writes(options):
            from pipeline import store

            store.raise_for_unwritable_home()
        code = getattr(importlib.import_module(module), function)(options)
    except TunegateError as error:
        sys.exit(_print(error))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    sys.exit(code or 0)


def _writes(options: argparse.Namespace) -> bool:
    """Whether a command needs a store that can be written; the plan of a build doesn't."""
    return options.answer not in READERS and not (options.answer == "flows.commands.run:run" and options.dry_run)


def be_quick() -> None:
    """Spare a command that ends in a second what only long ones need: garbage collection, pydantic's plugins.

    On a config never seen that is a fifth of its time (benchmarks/check_startup.py). No plugin takes part in reading a config.
    """
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def pass_proxies_by() -> None:
    """Keep HTTP_PROXY away from our own servers: Prefect, MLflow and vLLM on this machine, here and in children."""
    listing = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in listing.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += [host for host in OURS if host not in hosts]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


def _print(error: TunegateError) -> int:
    count = len(error.problems)
    print(f"{type(error).__name__}: {count} problems" if count > 1 else type(error).__name__, file=sys.stderr)
    for problem in error.problems:
        print(problem, file=sys.stderr)
    return error.exit_code


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser("tunegate", description=DESCRIPTION)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _build_commands(commands)
    _review_commands(commands)
    _serving_commands(commands)
    _house_commands(commands)
    return top


Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


def _command(commands: Commands[argparse.ArgumentParser], name: str, answer: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(answer=answer)
    return command


def _build_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    check = _command(
        commands, "check", "flows.commands.check:check", "print the resolved plan: stages, environments, cache, memory"
    )
    run = _command(commands, "run", "flows.commands.run:run", "build: data to a gated, registered model version")
    for command in (check, run):
        command.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as configs/demo.yaml")
        command.add_argument("--data-dir", type=Path, help="where relative dataset paths start; default: beside CONFIG")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a key, such as finetune.max_steps=10",
        )
    check.add_argument("--resolved", action="store_true", help="print every setting as well, defaults included")
    run.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    run.add_argument("--again", action="store_true", help="measure again and decide anew although nothing changed")
    gate = _command(
        commands,
        "gate",
        "flows.commands.gate:gate_again",
        "the verdict on a build's stored reports by another policy; runs nothing",
    )
    _named(gate, version=False)
    gate.add_argument("--policy", type=Path, metavar="FILE", help="a config, or a file of gate keys; default: its own")
    gate.add_argument("--build", metavar="KEY", help="a build by the beginning of its key; default: the newest")
    gate.add_argument("--json", action="store_true", help="for programs")
    _command(commands, "schema", "flows.commands.check:schema", "print the config's JSON Schema, for editors")


def _review_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    review = _command(
        commands,
        "review",
        "flows.commands.review:review",
        "show the version that waits for a decision, with the gate's table",
    )
    _named(review)
    for name, text in (("approve", "approve a version for promotion"), ("reject", "reject a version")):
        decide = _command(commands, name, f"flows.commands.review:{name}", text)
        _named(decide)
        decide.add_argument("--reviewer", default=os.environ.get("USER"), help="who decides; default: $USER")
        decide.add_argument("--reason", default="", help="why; needed to reject")


def _serving_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    promote = _command(
        commands,
        "promote",
        "flows.commands.promote:promote",
        "put an approved version behind the proxy, dropping no request",
    )
    _named(promote)
    promote.add_argument(
        "--dry-run", action="store_true", help="verify the digests and print the steps, change nothing"
    )
    rollback = _command(commands, "rollback", "flows.commands.promote:rollback", "put the release before this one back")
    _named(rollback, version=False)
    rollback.add_argument("--dry-run", action="store_true", help="print the release that would serve, change nothing")
    status = _command(
        commands,
        "status",
        "flows.commands.housekeeping:status",
        "the live releases, running builds and waiting versions",
    )
    _named(status, version=False)
    status.add_argument("--json", action="store_true", help="for programs")
    logs = _command(
        commands, "logs", "flows.commands.housekeeping:logs", "print a log: of the live server, or of a build's stage"
    )
    _named(logs, version=False)
    logs.add_argument("--stage", help="a stage of the last build instead of the server")
    logs.add_argument("-n", "--lines", type=int, default=50)
    logs.add_argument("-f", "--follow", action="store_true")
    chat = _command(
        commands, "chat", "flows.commands.chat:chat", "talk to the live release, or to a candidate before approval"
    )
    _named(chat, version=False)
    chat.add_argument(
        "--candidate", action="store_true", help="start the version that waits for review, for this chat only"
    )
    chat.add_argument("--message", "-m", help="one message instead of a conversation")
    chat.add_argument("--system", "-s", help="the system prompt in front, such as the one that the training rows have")


def _house_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    cancel = _command(
        commands,
        "cancel",
        "flows.commands.housekeeping:cancel",
        "stop a running build; the next run goes on where it was",
    )
    _named(cancel, version=False)
    gc = _command(
        commands,
        "gc",
        "flows.commands.housekeeping:gc",
        "delete artefacts that no release, candidate or recent build needs",
    )
    gc.add_argument(
        "--dry-run", action="store_true", help="print the folders and how much disk they take, delete nothing"
    )
    gc.add_argument("--keep-days", type=_days, default=7.0, help="keep younger folders; default 7")
    doctor = _command(
        commands, "doctor", "flows.commands.check:doctor", "list what is missing on this machine and how to get it"
    )
    doctor.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="also check the needs of this config")
    demo = _command(
        commands, "demo", "flows.commands.demo:demo", "the whole chain on a small model, with a visible approval"
    )
    demo.add_argument("--reviewer", default="demo", help="the name under which the demo approves")
    demo.add_argument("--data-only", action="store_true", help="write the demo's data and stop")
    setup = _command(commands, "setup", "flows.commands.setup:setup", "make the locked environments, or update them")
    setup.add_argument(
        "names", nargs="*", metavar="NAME", help="such as judges or autoawq; default: control train serve"
    )
    setup.add_argument("--device", choices=("cpu", "cuda"), help="default: as installed, or cpu")
    up = _command(
        commands,
        "up",
        "flows.commands.services:up",
        "start Prefect's and MLflow's pages, the worker and the deployments",
    )
    up.add_argument(
        "config",
        type=Path,
        nargs="?",
        metavar="CONFIG",
        help="the config that the deployments build; default: the demo's",
    )
    up.add_argument("--data-dir", type=Path, help="where relative dataset paths start; default: beside CONFIG")
    deploy = _command(
        commands,
        "deploy",
        "flows.deployments:deploy_config",
        "tell the Prefect server of PREFECT_API_URL a config's deployments; starts no worker",
    )
    deploy.add_argument("config", type=Path, metavar="CONFIG", help="the config that the deployments build")
    deploy.add_argument(
        "data_dir", type=Path, nargs="?", metavar="DATA_DIR", help="where its runs find relative datasets"
    )
    deploy.add_argument(
        "--pool",
        choices=("process", "kubernetes"),
        default="process",
        help="where its runs are: a worker, or a cluster",
    )
    manifests = _command(
        commands,
        "manifests",
        "flows.deployments:show",
        "print the Kubernetes manifests for builds of a config; applies nothing",
    )
    manifests.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file with a section `kubernetes`")
    manifests.add_argument("--jobs", action="store_true", help="print the jobs of its flow runs and stages instead")
    _command(commands, "down", "flows.commands.services:down", "stop everything that tunegate started on this machine")


def _days(text: str) -> float:
    """A number of days of at least 0; argparse prints the error."""
    days = float(text) if text.replace(".", "", 1).isdecimal() else -1.0
    if days < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of days, such as 7 or 0.5")
    return days


def _named(command: argparse.ArgumentParser, *, version: bool = True) -> None:
    command.add_argument(
        "name", nargs="?", metavar="NAME", help="registered model; may be left out when there is only one"
    )
    if version:
        command.add_argument("--version", help="a version; default: the newest one that fits")


if __name__ == "__main__":
    main()
