"""Health probes of a node: an HTTP server in the launcher's process."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cnsdiff_dist.errors import UserError

_STUCK_SECONDS = 60.0


class Health:
    """Answers probes: /healthz unless the agent is stuck, /ready while this node's ranks run.

    It does not judge what has its own timeout: waiting for other nodes, ending, and the progress
    of the ranks, which watch each other (``heartbeat.py``).
    """

    def __init__(self) -> None:
        self._last_round: float | None = None

    @classmethod
    def listening_on(cls, port: str) -> "Health":
        """Serve the probes at a port from another thread; serve nothing if the port is empty.

        Raises:
            UserError: the port is not a port number, or is taken.
        """
        health = cls()
        if port:
            try:
                server = ThreadingHTTPServer(("", int(port)), health._handler())
            except (OSError, ValueError, OverflowError) as error:
                raise UserError(f"CNSDIFF_HEALTH_PORT={port}: {error}") from None
            threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
        return health

    def set_last_round(self, now: float | None) -> None:
        """Record the monotonic time of the agent's last look at its ranks, None if none run."""
        self._last_round = now

    def answers(self, path: str) -> bool | None:
        """Return the answer to a probe, or None for an unknown path."""
        last = self._last_round
        alive = last is None or time.monotonic() - last < _STUCK_SECONDS
        return {"/healthz": alive, "/ready": alive and last is not None}.get(path)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        health = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = health.answers(self.path)
                self.send_response(404 if answer is None else 200 if answer else 503)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Log nothing: probes come every few seconds."""

        return Handler
