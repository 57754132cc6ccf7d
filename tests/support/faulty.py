"""A real S3 endpoint on loopback (moto's server) behind a proxy that injects faults, one a GET request, as planned.

`with faulty_s3({"name": body}) as server:` serves the bodies at `server.url`; `server.plan(fault, ...)` says what happens
to the next GETs, in order (None: nothing), and `server.always(choose)` what happens to all after those. `server.requests`
is the log of every GET that arrived. `server.plan_changes` and `server.changes` are the same of PUT, POST and DELETE, whose
answer can be `lost` though what they ask for has been done.
"""

import http.client
import socket
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET, PREFIX = "bucket", "sets/web"
_SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


@dataclass(frozen=True)
class Fault:
    """`status`: answer with it and no body. Otherwise the answer is moto's, where `delay` is seconds of waiting before
    it, `lost` that none of it leaves, `send` the number of body bytes that leave before `cut` closes the connection or
    `gate` is waited for, `shorten` the bytes taken off the body and its declared length, `flip` the place of a byte that
    is changed."""

    status: int = 0
    delay: float = 0.0
    lost: bool = False
    send: int = -1
    cut: bool = False
    gate: threading.Event | None = None
    shorten: int = 0
    flip: int = -1


@dataclass
class Faulty:
    moto: int
    port: int = 0
    requests: list[str] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)  # the client had left when the answer was written
    planned: deque = field(default_factory=deque)
    choose: object = None
    changes: list[str] = field(default_factory=list)
    planned_changes: deque = field(default_factory=deque)
    changed: threading.Condition = field(default_factory=threading.Condition)
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self):
        return f"s3://{BUCKET}/{PREFIX}"

    @property
    def options(self):
        """What a client must be told to find the bucket here."""
        return {
            "endpoint": f"http://127.0.0.1:{self.port}", "region": "us-east-1",
            "access_key_id": "test", "secret_access_key": "test",
        }  # fmt: skip

    def plan(self, *faults):
        self.planned.extend(faults)

    def plan_changes(self, *faults):
        self.planned_changes.extend(faults)

    def always(self, choose):
        """`choose(n)`: the fault of the n-th GET (from 0) among those that were not planned."""
        self.choose = choose

    def forget(self):
        """Begin anew: no plans, no log."""
        with self.changed:
            self.planned.clear()
            self.planned_changes.clear()
            self.choose = None
            self.requests.clear()
            self.changes.clear()
            self.abandoned.clear()

    def put(self, name, body):
        self._straight("PUT", name, body)

    def remove(self, name):
        self._straight("DELETE", name, None)

    def _straight(self, method, name, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.moto, timeout=30)
        connection.request(method, f"/{BUCKET}/{PREFIX}/{name}" if name else f"/{BUCKET}", body, {"Authorization": _SIGNED})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        assert answer.status < 300, (method, name, answer.status)

    def wait_for(self, count, seconds=30):
        """Until `count` GETs have arrived."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.requests) >= count, seconds), f"only {self.requests} arrived"

    def wait_abandoned(self, count, seconds=30):
        """Until `count` requests were given up by their client."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.abandoned) >= count, seconds), f"only {self.abandoned} were"

    def arrived(self, path):
        with self.changed:
            number = len(self.requests)
            self.requests.append(path.rpartition("/")[2])
            self.changed.notify_all()
            if self.planned:
                return self.planned.popleft()
            return self.choose(number) if self.choose else None

    def changing(self, method, path):
        with self.changed:
            self.changes.append(f"{method} {path.partition('?')[0].rpartition('/')[2]}")
            self.changed.notify_all()
            return self.planned_changes.popleft() if self.planned_changes else None

    def left(self, path):
        with self.changed:
            self.abandoned.append(path.rpartition("/")[2])
            self.changed.notify_all()


class _Handler(BaseHTTPRequestHandler):
    """Of a connection to the `faulty` of its server."""

    protocol_version = "HTTP/1.1"

    @property
    def faulty(self):
        return self.server.faulty

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._forward(self.faulty.arrived(self.path) or Fault())

    def do_HEAD(self):
        self._forward(Fault())

    def _change(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._forward(self.faulty.changing(self.command, self.path) or Fault(), body)

    do_PUT = do_POST = do_DELETE = _change

    def _forward(self, fault, body=None):
        if fault.delay:
            self.faulty.stopping.wait(fault.delay)
        if fault.status:
            self._answer(fault.status, [], b"", Fault())
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.faulty.moto, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        kept = ("etag", "last-modified", "content-type") + ("content-length",) * (self.command == "HEAD")
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() in kept]
        self._answer(answer.status, headers, body, fault)

    def _answer(self, status, headers, body, fault):
        if fault.shorten:
            body = body[: -fault.shorten]
        if fault.flip >= 0:
            body = body[: fault.flip] + bytes([body[fault.flip] ^ 1]) + body[fault.flip + 1 :]
        if fault.lost:
            self.close_connection = True
            return
        try:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            sent = len(body) if fault.send < 0 else fault.send
            self.wfile.write(body[:sent])
            if fault.cut:
                self.close_connection = True
                return
            if fault.gate is not None and not self._gate(fault.gate):
                return
            self.wfile.write(body[sent:])
        except OSError:
            self._gone()

    def _gate(self, gate):
        """Wait for it; False where the client or the server goes first."""
        self.connection.settimeout(0.02)
        while not gate.is_set():
            if self.faulty.stopping.is_set():
                self.close_connection = True
                return False
            try:
                if self.connection.recv(1, socket.MSG_PEEK) == b"":
                    self._gone()
                    return False
            except TimeoutError:
                pass
        self.connection.settimeout(None)
        return True

    def _gone(self):
        self.close_connection = True
        self.faulty.left(self.path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, faulty):
        self.faulty = faulty
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request, client_address):
        pass  # a client that was killed


@contextmanager
def faulty_s3(bodies):
    """Serve `bodies` (name to bytes) under the bucket's prefix until the block ends."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    faulty = Faulty(moto.get_host_and_port()[1])
    proxy = _Server(faulty)
    faulty.port = proxy.server_address[1]
    thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        faulty._straight("PUT", "", None)
        for name, body in bodies.items():
            faulty.put(name, body)
        yield faulty
    finally:
        faulty.stopping.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        moto.stop()
