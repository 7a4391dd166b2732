"""Run something in a forked process that is killed after the nth thing it changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

Deadly = Callable[[Callable[..., Any]], Callable[..., Any]]


def killed_after(effect: int, run: Callable[[Deadly], object]) -> bool:
    """Whether `run` was killed, after `effect` calls of what it wraps with the function that it is handed; False at its end."""
    child = os.fork()
    if child == 0:
        count = [0]

        def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                result = function(*args, **kwargs)
                count[0] += 1
                if count[0] == effect:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        try:
            run(deadly)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)
