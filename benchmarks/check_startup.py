"""How long `tunegate check CONFIG` takes against a bare `python -c pass`, both in turn, as whole processes.

    python benchmarks/check_startup.py [CONFIG] [--data-dir DIR] [--runs 15]

Prints medians and the ratio pair by pair, once for a config seen before (what everybody has after the first time) and once
for a config never seen, which pays for pydantic; for comparison, what importing pydantic alone takes. Byte code is kept.
Exits with 1 when the first ratio is above 10 or the second above 15.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {"seen before": 10.0, "never seen": 15.0}
COMMAND = "from flows.cli import main; main()"  # as the console script has it


def main() -> None:
    """Run both sides in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / "demo.yaml"))
    parser.add_argument("--data-dir", default=str(ROOT / "mlruns" / "demo"))
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    check = [sys.executable, "-c", COMMAND, "check", options.config, "--data-dir", options.data_dir]
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(
        os.pathsep
    )
    seen = compare(check, options.runs, environ)
    with tempfile.TemporaryDirectory() as folder:
        fresh = compare([*check, "--set", "seed={n}"], options.runs, {**environ, "TUNEGATE_HOME": folder})
    alone = compare([sys.executable, "-c", "import pydantic; pydantic.BaseModel"], options.runs, environ)
    print(f"{'config':<16}{'bare python':>14}{'check':>12}{'ratio':>10}")
    sides = {"seen before": seen, "never seen": fresh, "(pydantic alone)": alone}
    for name, (bare, whole, ratio) in sides.items():
        print(f"{name:<16}{bare * 1000:>11.0f} ms{whole * 1000:>9.0f} ms{ratio:>10.1f}")
    over = [name for name, (_, _, ratio) in sides.items() if ratio > LIMITS.get(name, ratio)]
    sys.exit(f"above the limit: {', '.join(over)}" if over else 0)


def compare(command: list[str], runs: int, environ: dict[str, str]) -> tuple[float, float, float]:
    """Median seconds of bare Python and of the command, and the median of their ratios pair by pair; one warm-up."""
    pairs = []
    for n in range(runs + 1):
        numbered = [part.format(n=n) if "{n}" in part else part for part in command]
        pairs.append((seconds([sys.executable, "-c", "pass"], environ), seconds(numbered, environ)))
    pairs = pairs[1:]
    bare, whole = (statistics.median(side) for side in zip(*pairs, strict=True))
    return bare, whole, statistics.median(command_s / bare_s for bare_s, command_s in pairs)


def seconds(command: list[str], environ: dict[str, str]) -> float:
    """Wall time of one process that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
