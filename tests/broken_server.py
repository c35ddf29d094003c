"""A server on this machine that breaks connections, ignores ranges and answers nonsense, as it is told."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HDF5 = b"\x89HDF\r\n\x1a\n"
CONTENT = HDF5 + bytes(range(256)) * 4096  # a little more than 1 MiB


class Server:
    """What the server does, and what it was asked."""

    def __init__(self):
        self.content = CONTENT
        self.etag = '"v1"'
        self.ranges = True
        self.break_after = []  # bytes after which the connection of each coming request is cut
        self.statuses = []  # answers of the coming requests in place of the file
        self.statuses_after_break = []  # the same, of those that come after a connection was cut
        self.wait_for = None  # a barrier that each request waits at
        self.headers = {}
        self.honours_if_range = True
        self.redirects = {}  # path to where it leads
        self.paths = []
        self.requests = []
        self.url = ""

    def asked(self, header):
        return [request.get(header) for request in self.requests]


@contextmanager
def running() -> Iterator[Server]:
    """Run a server; yields what tells it what to do."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(dict(self.headers))
            server.paths.append(self.path)
            if server.wait_for is not None:
                server.wait_for.wait()
            if self.path in server.redirects:
                self.send_response(302)
                self.send_header("Location", server.redirects[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if server.statuses:
                self.send_response(server.statuses.pop(0))
                self.send_header("Content-Length", "0")
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            start, content = 0, server.content
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range") in (None, server.etag) or not server.honours_if_range
            if asked and server.ranges and same:
                start = int(asked[1])
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            headers = {"Content-Length": str(len(content) - start), **server.headers}
            if server.etag:
                headers["ETag"] = server.etag
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            end = len(content)
            if server.break_after:
                end = start + server.break_after.pop(0)
                server.statuses, server.statuses_after_break = server.statuses_after_break, []
            self.wfile.write(content[start:end])
            self.close_connection = True

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/screen.h5ad"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
