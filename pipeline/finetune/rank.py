"""One process of a training over several GPUs: python -m pipeline.finetune.rank REQUEST.json, started by `launch`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from pipeline import program
from pipeline.errors import TunegateError
from pipeline.finetune import distributed, launch, train
from pipeline.finetune.distributed import Group

PR_SET_PDEATHSIG = 1


def main(share: Callable[[program.Request, Group], dict[str, Any]] = train.train) -> None:
    """Train this process's share; the first process hands the detail to the launcher, and any process its error."""
    end_with_the_launcher()
    request = program.begin()
    try:
        group = distributed.join()
        detail = share(request, group)
        distributed.leave()
    except TunegateError as error:
        program.emit("error", **error.to_json())
        end(error.exit_code)
    except RuntimeError as error:
        if not distributed.is_loss_of_a_partner(error):
            raise
        traceback.print_exc()
        end(launch.LOST)
    if group.rank == 0:
        program.emit("result", detail=detail)
    end(0)


def end_with_the_launcher() -> None:
    """Be killed with the launcher: nothing else could end this process, and it would wait for its partners for ever."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[launch.LAUNCHER]):
        sys.exit(launch.LOST)


def end(status: int) -> None:
    """Exit at once: a communicator's destructor may wait for partners that are gone, or fail after all is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
