"""Servers with a thread for every peer, of whom there are never more than so many."""

from __future__ import annotations

import socketserver
import sys
import threading
import time
from typing import Any

__all__ = ["BoundedThreads"]

_MAX_PEERS = 32  # at a time; the others wait in the listening socket's queue


class BoundedThreads(socketserver.ThreadingMixIn):
    """ThreadingMixIn, safe from peers that only wait; handlers must bound how long they do."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self._places = threading.BoundedSemaphore(_MAX_PEERS)
        super().__init__(*arguments)

    def get_request(self) -> Any:
        try:
            return super().get_request()  # type: ignore[misc] # of the server that this is mixed into
        except OSError:
            time.sleep(0.1)  # no descriptor is free: without a pause it would be asked for again at once
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a peer that leaves, or says nothing, is no news
            super().handle_error(request, client_address)  # type: ignore[misc] # of the server, too

    def process_request(self, request: Any, client_address: Any) -> None:
        self._places.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()
