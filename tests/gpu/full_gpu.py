"""A stage program whose process itself holds all of the GPU's memory but so many MiB.

python tests/full_gpu.py STAGE MIB REQUEST.json    (in the train environment)
"""

from __future__ import annotations

import sys
from importlib import import_module

import torch

from pipeline import program


def main() -> None:
    """Fill the GPU, then run the stage."""
    stage, mib, file = sys.argv[1:]
    sys.argv[1:] = [file]
    held = []
    while (free := torch.cuda.mem_get_info()[0] - (int(mib) << 20)) > 2 << 20:
        held.append(torch.empty(free, dtype=torch.uint8, device="cuda"))
    program.main(import_module(stage).run)


if __name__ == "__main__":
    main()
