"""A tiny distribution with an entry point, as an installer leaves it, in a folder of a test's own."""

from __future__ import annotations

from pathlib import Path


def install(
    folder: Path, code: str, name: str = "my_safety", module: str = "safety_of_text", version: str = "1.0"
) -> Path:
    """Write the distribution `name`-scorer with one module, whose function `score` is registered as the scorer `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    for old in folder.glob(f"{name}_scorer-*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    info = folder / f"{name}_scorer-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-scorer\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[tunegate.scorers]\n{name} = {module}:score\n")
    (info / "RECORD").write_text(f"{module}.py,,\n{info.name}/METADATA,,\n{info.name}/entry_points.txt,,\n")
    return folder
