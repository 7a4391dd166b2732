"""What the terminal prints of a finished build."""

from __future__ import annotations

import json

from support.sample_build import full_build

from flows.commands import tables
from pipeline import store
from pipeline.files import write_json


def test_a_finished_build_prints_broken_prompts_and_ledger(tmp_path, monkeypatch, capsys):
    """First what broke since the champion, then scores, ledger and gate; markup in a model's words stays text."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    build = full_build(tmp_path)
    broken = build.prompts["candidate"][0].model_copy(update={"answer": "[red]30\x1b[2J days[/red]"})
    build = build.model_copy(
        update={"prompts": {**build.prompts, "candidate": (broken, *build.prompts["candidate"][1:])}}
    )
    folder = store.build_folder(build.key)
    folder.mkdir(parents=True)
    write_json(folder / "build.json", json.loads(build.model_dump_json()))
    tables.print_build(build.key)
    said = capsys.readouterr().out
    parts = [
        "2 of 4 must-pass prompts hold; broken since the champion: 1", "since the champion  refund period",
        "[red]30 [2J days[/red]", "also before", "as served by vLLM", "AWQ lost most: json_field_match", "gate: fail",
    ]  # fmt: skip
    places = [said.find(part) for part in parts]
    assert "\x1b" not in said
    assert -1 not in places, said
    assert places == sorted(places)
