"""HTTP requests with a deadline for the whole answer, which follow no redirect."""

from __future__ import annotations

import functools
import http.client
import io
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any


class DeadlineRequest(urllib.request.Request):
    """A request whose whole answer has to be there before `deadline`, a time of the monotonic clock."""

    deadline: float


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args, **kwargs):
        return None


class _Until(io.RawIOBase):
    """What a socket receives until a deadline. The socket's own time limit would start anew with each packet."""

    def __init__(self, sock: socket.socket, deadline: float):
        self.sock, self.deadline = sock, deadline
        patience = sock.gettimeout()
        assert patience is not None  # as urllib was given one
        self.patience = patience
        self.raw = sock.makefile("rb", buffering=0)  # holds the socket open, which urllib closes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self.sock.settimeout(min(left, self.patience))
            return self.raw.readinto(buffer)
        except TimeoutError:
            if left > self.patience:
                raise
            raise TimeoutError("the answer still came after the time for a whole one") from None

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """A response whose status, headers and body all have to arrive before `deadline`."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **options: Any):
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Until(sock, deadline))


def _connected(kind: type[http.client.HTTPConnection], request: urllib.request.Request) -> Any:
    """Makes a connection whose response keeps to the request's deadline."""
    assert isinstance(request, DeadlineRequest)
    deadline = request.deadline

    def connect(host: str, **options: Any) -> http.client.HTTPConnection:
        connection = kind(host, **options)
        # pyrefly: ignore[bad-assignment]  # it is called as the class would be
        connection.response_class = functools.partial(_Response, deadline=deadline)
        return connection

    return connect


class DeadlineHttp(urllib.request.HTTPHandler):
    def http_open(self, req):
        return self.do_open(_connected(http.client.HTTPConnection, req), req)


class DeadlineHttps(urllib.request.HTTPSHandler):
    def https_open(self, req):
        # pyrefly: ignore[missing-attribute]  # which urllib's own passes on too
        return self.do_open(_connected(http.client.HTTPSConnection, req), req, context=self._context)
