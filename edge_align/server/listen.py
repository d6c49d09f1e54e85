"""The socket and the log of the server."""

from __future__ import annotations

import logging
import os
import socket
import sys


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except BaseException:
        listener.close()
        raise
    return listener


def log_to_stderr() -> None:
    """Errors on stderr, and with EDGE_ALIGN_LOG=info a line per request: method, route, status, time; never a text."""
    level = logging.INFO if os.environ.get("EDGE_ALIGN_LOG", "").lower() == "info" else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("edge_align.server")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    logging.getLogger("uvicorn.error").addHandler(logging.NullHandler())
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # its tracebacks may hold texts; the guard logs
