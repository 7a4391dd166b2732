"""Prefect's server for one run in a terminal where no other answers: `python -m flows.temporary_server SOCKET`.

It listens on the socket that it inherits by that number. It runs in a session of its own: Ctrl-C reaches the run alone, which can
then still tell the server how it ended. The server ends when the run does: the other end of its standard input is closed then.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

STOP_S = 5


def main() -> None:
    """Serve until the run is gone."""
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=STOP_S)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])


def _end_with_the_run() -> None:
    """End this process, politely at first, once nobody holds the other end of standard input."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * STOP_S)
    os._exit(1)


if __name__ == "__main__":
    main()
