"""benchmarks/serving_cuda.py, as far as it measures nothing: one table of several commands' sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving_cuda.py"
CONDITIONS = {"device": "a GPU", "concurrency": [1, 8], "input_len": 16, "output_len": 8, "serve": {}, "model": {}}


def measured(folder: Path, side: str, throughputs: list[float], **conditions: object) -> Path:
    """An --out with one side."""
    levels = [
        {"concurrency": size, "output_throughput": throughput, "p95_itl_ms": 2.0}
        for size, throughput in zip((1, 8), throughputs, strict=True)
    ]
    report = {"conditions": CONDITIONS | conditions, "sides": {side: {"starts": {}, "levels": levels, "kernel": None}}}
    folder.mkdir()
    (folder / "serving.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def table(*folders: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """The command."""
    command = [sys.executable, str(SCRIPT), "--table", *map(str, folders), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_sides_of_several_commands_make_one_table_and_picture(tmp_path: Path) -> None:
    """With ratios to transformers, and the level at which AWQ is slower than bf16."""
    folders = [
        measured(tmp_path / name, name, found)
        for name, found in (("transformers", [10, 20]), ("bf16", [40, 100]), ("awq", [60, 90]))
    ]
    done = table(*folders, out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines() if line.startswith(("1 ", "8 "))] == [
        ["1", "10", "(1.0x;", "2.0)", "40", "(4.0x;", "2.0)", "60", "(6.0x;", "2.0)", "1.50"],
        ["8", "20", "(1.0x;", "2.0)", "100", "(5.0x;", "2.0)", "90", "(4.5x;", "2.0)", "0.90"],
    ]
    assert "AWQ stops paying from concurrency 8 on" in done.stdout
    assert (tmp_path / "out" / "serving.png").stat().st_size > 10_000


def test_what_cannot_stand_in_one_table_is_refused(tmp_path: Path) -> None:
    """Other conditions, a side twice, a folder of something else: each with its file."""
    first = measured(tmp_path / "first", "awq", [1, 2])
    other = measured(tmp_path / "other", "bf16", [1, 2], device="another GPU")
    again = measured(tmp_path / "again", "awq", [3, 4])
    for folder, words in ((other, "measured under"), (again, "awq was measured"), (tmp_path, "isn't there")):
        done = table(first, folder, out=tmp_path / "out")
        assert done.returncode == 1
        assert done.stderr.startswith(f"{folder}/serving.json: ")
        assert words in done.stderr
