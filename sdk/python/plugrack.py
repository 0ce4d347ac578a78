"""Write a plugrack plugin in Python: one file, standard library only (but for licences), Python 3.8 and later.

Copy this file beside your plugin. A whole plugin, the executable file `plugin`:

    #!/usr/bin/env python3
    import plugrack

    plugin = plugrack.Plugin(id="hello", name="Hello", version="1.0.0", icon="👋", route="/hello")

    @plugin.http
    def hello(request):
        visits = plugin.store.incr("visits")
        return f"Hello {request.params.get('name', 'world')}, visit {visits}\\n"

    plugin.run()

A stream is a generator; each piece reaches the client as it is yielded:

    @plugin.http
    def clock(request):
        def events():
            while not request.cancelled.wait(1):
                yield f"data: {time.ctime()}\\n\\n"
        return plugrack.Response(events(), content_type="text/event-stream")

`request.cancelled` is set once nobody waits for the answer any more. Wait on it in place of a sleep: a silent stream then
ends as soon as its client has gone.

Threads: every connection of the host is served by a thread of its own, one request after the other. There are up to 16
connections, so handlers run side by side, and what they share needs a lock. `plugrack.Plugin(…, concurrency=1)` runs one
handler at a time: an open stream then keeps every other request waiting. A request that the host has given up makes room
for another, also while its handler still runs, so at most twice `concurrency` handlers run. With 1 the next handler is
called once the one before has returned; only a stream that was given up may still run beside it, up to its next `yield`.

A WSGI or ASGI application, such as one of Flask or FastAPI, is the plugin's handler by `wsgi` or `asgi`:

    plugin.http(plugrack.wsgi(app))

A WebSocket is an object to send to. Each message of its client calls the handler:

    @plugin.websocket
    def said(socket, message):
        plugin.broadcast(f"{socket.params.get('name')}: {message}")

The handlers of one socket run one after the other, those of several side by side, at most `concurrency` of them beside the
handlers of requests. With `concurrency` 1 no two handlers run at the same time, whatever they handle; only the stream of an
answer may run beside them. `socket.send` waits while the client reads slowly, and its handler with it; `plugin.broadcast`
waits for nobody.

A proprietary plugin is given the public keys of its vendor, and its own release date. Its licence is then checked before
the `init` handler runs, which finds in `context.granted` what the licence grants; where it does not hold, the plugin
says what to do and ends. This, and only this, needs the package `cryptography`:

    plugin = plugrack.Plugin(id="report", …, license_keys={"acme-2026a": "k4.public.…"}, release_date="2026-11-02")

Standard output and standard error are the plugin's log; the SDK logs there as `logging.getLogger("plugrack")`.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import errno
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import resource
import select
import socket
import struct
import sys
import threading
import time
from contextlib import closing
from datetime import datetime, timezone
from typing import (TYPE_CHECKING, Any, Awaitable, Callable, Deque, Dict, FrozenSet, Generator, Iterable, Iterator, List, Mapping,
                    MutableMapping, NamedTuple, NoReturn, Optional, Pattern, Set, Tuple, TypeVar, Union)
from urllib.parse import parse_qsl, unquote, unquote_to_bytes, urlsplit

if TYPE_CHECKING:
    import asyncio

__all__ = ["Plugin", "Context", "Request", "Response", "Headers", "WebSocket", "Store", "Entry", "License", "verify_license",
           "wsgi", "asgi", "Error", "Conflict", "Refuse", "LicenseError", "HTTPError", "Disconnected", "SocketClosed"]

_LENGTHS = struct.Struct(">II")
_MAX_HEAD = 65_536
_MAX_BODY = 1_048_576
_MAX_REFUSAL = 65_536  # body of a response that refuses a WebSocket
_MAX_ID = 2**53 - 1
_MAX_ERROR_MESSAGE = 4096  # bytes
_SOCKET_CREDIT = 65_536  # bytes of messages that each side may send on a new WebSocket, as the protocol has it
_MESSAGE_COST = 64  # bytes of credit that a message takes beside its length
_MAX_REASON = 123  # bytes of the reason in a close frame
_RECEIVE = 98_304  # what a request with a body of 64 KiB comes in at once
_STORE_CONNECTIONS = 32  # of the 64 that the host allows a plugin
_CONCURRENCY = 16  # requests at once unless told otherwise, so that a few streams leave room for others
_STACK = 8_388_608  # bytes of a thread's stack where the system does not say: of a bounded memory it counts whole
_MEMORY_KEPT = 50_331_648  # bytes of a bounded memory that the stacks leave for everything else
_SHORTAGE_PAUSE = 0.1  # seconds until the next try where files, memory or threads have run out
_THREAD_TIME = 1.0  # seconds a connection waits for a thread; then it is closed, and the host takes another
_ABANDONED_PATIENCE = 0.5  # seconds that new connections wait for abandoned handlers before the log says so
_ABANDONED_TIME = 1.0  # seconds the exit waits for abandoned handlers: a third of the time the host gives a plugin to stop
_LIFESPAN_TIME = 1.5  # seconds for an application's shutdown: the host gives a plugin 3 to stop, and abandoned handlers take 1
_BACKGROUND_TIME = 0.5  # seconds of these for what applications still do after their answers
_MAX_CALLS = 1000  # calls of an ASGI application at once, which go on after their answers: beyond that requests get 503
_SAY_EVERY = 60.0  # seconds between two lines in the log about the same shortage
# What accept() fails with while the machine or the process is short of something, or for a peer that has gone.
_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED, errno.EPROTO,
                        errno.EAGAIN, errno.EINTR))
_EXIT_USAGE = 64
_EXIT_TEMPORARY = 75
_EXIT_REFUSED = 78

_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_decode_json = json.JSONDecoder().raw_decode
_log = logging.getLogger("plugrack")

_Handler = TypeVar("_Handler", bound=Callable[..., Any])
_Parts = Generator[Tuple[bytes, bool], None, None]


# ---- Errors ----------------------------------------------------------------------------------------------------------

class Error(Exception):
    """A failure with a code: what the store raises, and what a `kv` handler raises to refuse an operation.

    The codes of the host are those of the protocol: `bad_request`, `bad_key`, `conflict`, `quota`, `busy`, `no_space` and
    `internal`. The SDK adds `too_large`, for what no frame holds and is not sent, and `disconnected`: the host did not
    answer, and whether a write was made is not known.

    A code that is raised for an operator has the form [a-z][a-z0-9_]{0,63}; another one reaches the operator as `internal`.
    """

    def __init__(self, code: str, message: str, index: Optional[int] = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.index = index  #: the place of the write that failed, for `Store.txn`

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Conflict(Error):
    """A precondition (`if_rev`, `if_absent`) does not hold; nothing was written."""


class Refuse(Exception):
    """Raised by the `init` handler: the plugin cannot run with this configuration or licence, so do not try again.

    The operator is shown the message, and the process exits 78.
    """

    exit_code = _EXIT_REFUSED

    def __init__(self, message: str, code: str = "config") -> None:
        super().__init__(message)
        self.code = code


class LicenseError(Refuse):
    """The licence does not let the plugin run. Its text is one line, `licence: CODE: WHAT TO DO`.

    The codes are those of docs/licensing.md. After `clock_not_set` the process exits 75, so that the host tries again.
    """

    def __init__(self, code: str, what: str) -> None:
        super().__init__(f"licence: {code}: {what}", code)
        self.what = what  #: what the operator is to do, one sentence
        if code == "clock_not_set":
            self.exit_code = _EXIT_TEMPORARY


class HTTPError(Exception):
    """Raised by an `http` handler to answer with this status and the message as plain text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Disconnected(ConnectionError):
    """The client or the host went away while a request was being read or answered. Clean up and let it pass."""


class _ProtocolError(Exception):
    """The peer sent something the protocol does not allow; the connection is closed."""


# ---- Frames ----------------------------------------------------------------------------------------------------------

def _encode_before(head: Mapping[str, Any], body: bytes) -> bytes:
    """What stands before a frame's body."""
    text = _to_json(head).encode()
    if len(text) > _MAX_HEAD:
        raise Error("too_large", f"a head of {len(text)} bytes; a frame holds {_MAX_HEAD}")
    if len(body) > _MAX_BODY:
        raise Error("too_large", f"a body of {len(body)} bytes; a frame holds {_MAX_BODY}")
    return _LENGTHS.pack(len(text), len(body)) + text


def _from_json(text: str) -> Any:
    """As json.loads, which looks for white space first: a head has none around it, as a rule."""
    try:
        value, end = _decode_json(text)
    except ValueError:
        end = -1
    return value if end == len(text) else json.loads(text)


def _error_head(number: int, code: str, message: str) -> Dict[str, Any]:
    if not _is_code(code):
        _log.warning("%r is no code of an error, and is sent as internal: a code is [a-z][a-z0-9_]{0,63}", code)
        code = "internal"
    # The text may be anybody's: cut to what the protocol allows, and without lone surrogates, which UTF-8 cannot carry.
    text = message.encode("utf-8", "replace")[:_MAX_ERROR_MESSAGE].decode("utf-8", "ignore")
    return {"type": "error", "id": number, "code": code, "message": text or code}


def _is_code(code: Any) -> bool:
    return isinstance(code, str) and _CODE.fullmatch(code) is not None


def _whole(number: Any) -> Any:
    """A number in the form in which it is handled and sent: 200.0 and 2e2 are the integer 200."""
    return int(number) if type(number) is float and number.is_integer() else number


def _is_integer_within(number: Any, least: int, most: int) -> bool:
    return type(number) is int and least <= number <= most


def _named(head: Mapping[str, Any]) -> str:
    """A message as it is called in a sentence."""
    kind = head["type"]
    what = {"data": "data", "http": "an http request", "kv": "a kv request", "init": "an init message",
            "ready": "a ready message", "shutdown": "a shutdown message", "error": "an error"}.get(kind, f"a {kind}")
    return f"{what} with id {head['id']}"


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str) for pair in value)


def _is_http(head: Mapping[str, Any]) -> bool:
    """Whether the fields of an http request are all of their form."""
    get = head.get
    if not (type(get("method")) is type(get("path")) is type(get("mount")) is type(get("query", "")) is type(get("remote", ""))
            is str and type(get("more", False)) is bool and type(get("headers", [])) is list):
        return False
    try:
        for pair in get("headers", ()):
            name, value = pair
            if not type(name) is type(value) is str or type(pair) is not list:
                return False
    except (TypeError, ValueError):
        return False
    return True


# The fields of the messages that a plugin is sent, with whether they must be there, whether a value is of their form, and what
# that form is.
_TEXT = (lambda value: isinstance(value, str), "a string")
_FLAG = (lambda value: value is True or value is False, "true or false")
_COUNT = (lambda value: _is_integer_within(value, 0, 2**64 - 1), "an integer from 0 to 18446744073709551615")
_SIGNED = (lambda value: _is_integer_within(value, -2**63, 2**63 - 1), "an integer of 64 bits")
_CREDIT = (lambda value: _is_integer_within(value, 0, _MAX_ID), f"an integer from 0 to {_MAX_ID}")
_PAIRS = (_is_pairs, "an array of [name, value] pairs")
_FIELDS: Dict[str, Tuple[Tuple[str, bool, Callable[[Any], bool], str], ...]] = {
    "init": (("config", True, lambda value: isinstance(value, dict), "an object"),
             ("instance_id", True, *_TEXT), ("plugin_id", True, *_TEXT), ("license", False, *_TEXT)),
    "http": (("method", True, *_TEXT), ("path", True, *_TEXT), ("query", False, *_TEXT), ("mount", True, *_TEXT),
             ("headers", False, *_PAIRS), ("remote", False, *_TEXT), ("more", False, *_FLAG)),
    "data": (("more", False, *_FLAG), ("aborted", False, *_FLAG)),
    "kv": (("op", True, *_TEXT),),
    "result": (("found", False, *_FLAG), ("rev", False, *_COUNT), ("value", False, *_SIGNED),
               ("expires_in_ms", False, *_COUNT), ("next", False, *_TEXT)),
    "error": (("code", True, _is_code, "a string of the form [a-z][a-z0-9_]{0,63}"),
              ("message", True, lambda value: isinstance(value, str) and 0 < len(value.encode()) <= _MAX_ERROR_MESSAGE,
               "a string of 1 to 4096 bytes"),
              ("index", False, *_COUNT)),
    "ws_open": (("path", True, *_TEXT), ("query", False, *_TEXT), ("mount", True, *_TEXT), ("headers", False, *_PAIRS),
                ("remote", False, *_TEXT), ("credit", False, *_CREDIT)),
    "ws_message": (("text", False, *_FLAG),),
    "ws_credit": (("bytes", True, *_CREDIT),),
    "ws_close": (("code", False, lambda value: _is_integer_within(value, 1000, 4999), "an integer from 1000 to 4999"),
                 ("reason", False, lambda value: isinstance(value, str) and len(value.encode()) <= _MAX_REASON,
                  f"a string of at most {_MAX_REASON} bytes")),
}
_INTEGERS = {"result": ("rev", "value", "expires_in_ms"), "error": ("index",), "ws_open": ("credit",), "ws_credit": ("bytes",),
             "ws_close": ("code",)}


def _check_message(head: Dict[str, Any], body_size: int) -> None:
    """Raises _ProtocolError where a field is not of its form, or there is a body beside a message that has none."""
    kind = head["type"]
    if kind == "http" and _is_http(head):  # at once, for the sake of speed
        return
    for name in _INTEGERS.get(kind, ()):
        if name in head:
            head[name] = _whole(head[name])
    for name, required, is_of_form, form in _FIELDS.get(kind, ()):
        if name not in head:
            if required:
                raise _ProtocolError(f"{kind}.{name} is missing: it must be {form}")
        elif not is_of_form(head[name]):
            raise _ProtocolError(f"{kind}.{name} must be {form}, got {_to_json(head[name])[:40]}")
    if body_size and kind not in ("http", "data", "response", "result", "ws_message"):
        if kind != "kv":
            raise _ProtocolError(f"{kind} must have no body, got {body_size} bytes")
        if head["op"] in ("get", "delete", "incr", "list"):
            raise _ProtocolError(f"kv {head['op']} must have no body, got {body_size} bytes")


def _check_result(op: str, head: Mapping[str, Any], body: bytes) -> None:
    """Raises _ProtocolError where a result is not what this operation has."""
    wanted = {"get": "found", "delete": "found", "incr": "value", "set": "rev"}.get(op)
    if wanted and wanted not in head:
        raise _ProtocolError(f"result.{wanted} is missing")
    if body and (op in ("set", "delete", "incr") or op == "get" and not head["found"]):
        nothing = " that found nothing" if op == "get" else ""
        raise _ProtocolError(f"the result of a {op}{nothing} must have no body, got {len(body)} bytes")
    if op == "get" and head["found"] and "rev" not in head:
        raise _ProtocolError("result.rev is missing")


class _Wire:
    """Frames over one socket, received through a buffer so that frames sent together cost one system call."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()  # of what is to be sent, and of sending it
        self._unsent = bytearray()
        self.watched = False  # whether the flusher has been told of it
        self._buffer = bytearray()
        self._seen = 0  # how far shutdown_waits() has looked ahead
        self.cancelled = threading.Event()  # for the requests on this connection
        self.ended = False  # whether `_notice_ends` has counted it as abandoned
        self.on_end: Optional[Callable[[], None]] = None  # called when that happens; never waits
        self.is_new = True  # whether no message has come
        self.carries_sockets = False  # whether it carries WebSockets in place of requests

    def send(self, head: Mapping[str, Any], body: bytes = b"") -> None:
        """Puts a frame behind those to be sent. They go out together: before anything more is waited for, or in a moment."""
        start = _encode_before(head, body)
        with self._lock:
            self._unsent += start
            fits = len(self._unsent) + len(body) <= _RECEIVE
            if fits:
                self._unsent += body
        if not fits:
            self.flush(body)

    def flush(self, last: bytes = b"") -> None:
        """Sends what there is to send, and what is better not copied behind it."""
        with self._lock:
            unsent, self._unsent = self._unsent, bytearray()
            try:
                sent = self._sock.sendmsg((unsent, last)) if last else 0
                for data in (memoryview(unsent)[sent:], memoryview(last)[max(sent - len(unsent), 0):]):
                    if data:
                        self._sock.sendall(data)
            except OSError as error:
                raise Disconnected(str(error)) from None

    def read(self) -> Tuple[Dict[str, Any], bytes]:
        """The next frame. Raises Disconnected at the end of the stream."""
        while True:
            found = self._parse(0)
            if found:
                return self._take(*found)
            self.flush()
            self._receive()

    def read_now(self) -> Optional[Tuple[Dict[str, Any], bytes]]:
        """The next frame, or None while it is not all there. Never blocks. Raises Disconnected at the end of the stream."""
        while True:
            found = self._parse(0)
            if found:
                return self._take(*found)
            if not self._receive(socket.MSG_DONTWAIT):
                return None

    def shutdown_waits(self) -> bool:
        """Whether a `shutdown` stands behind what is under way. Never blocks, and looks at each frame once."""
        if len(self._buffer) <= _RECEIVE:
            self._receive(socket.MSG_DONTWAIT)
        while True:
            found = self._parse(self._seen)
            if not found:
                return False
            head, _, end = found
            if head["type"] == "shutdown":
                return True
            self._seen = end

    def has_frame(self) -> bool:
        """Whether `read` gives a frame at once. Never blocks, and receives what there is until there is a whole frame."""
        while not self._parse(0):
            if not self._receive(socket.MSG_DONTWAIT):
                return False
        return True

    def idle(self) -> bool:
        """Whether the stream is open and holds nothing unread."""
        try:
            return not self._receive(socket.MSG_DONTWAIT) and not self._buffer
        except Disconnected:
            return False

    def flush_last(self) -> None:
        """Sends what there is to send, if anybody takes it."""
        try:
            self.flush()
        except Disconnected:
            pass

    def close(self) -> None:
        self.flush_last()
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def _take(self, head: Dict[str, Any], start: int, end: int) -> Tuple[Dict[str, Any], bytes]:
        """Head and body of the first frame of the buffer, which is removed."""
        body = b""
        if end > start:
            with memoryview(self._buffer) as buffer, buffer[start:end] as part:
                body = bytes(part)
        del self._buffer[:end]
        self._seen = 0
        if self._unsent:
            _flusher.watch(self)
        return head, body

    def send_now(self, data: bytearray) -> None:
        """Send from the beginning of the data what the socket takes at once, and remove it. Raises Disconnected."""
        try:
            del data[:self._sock.send(data, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Disconnected(str(error)) from None

    def end(self) -> None:
        """End the stream in both directions, for the host to see. `close` still follows."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended by itself

    def _receive(self, flags: int = 0) -> bool:
        try:
            data = self._sock.recv(_RECEIVE, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Disconnected(str(error)) from None
        if not data:
            raise Disconnected("the connection has ended")
        self._buffer += data
        return True

    def _parse(self, at: int) -> Optional[Tuple[Dict[str, Any], int, int]]:
        """The frame at this place of the buffer: head, start and end of its body. None while it is not all there."""
        buffer = self._buffer
        if len(buffer) < at + _LENGTHS.size:
            return None
        head_size, body_size = _LENGTHS.unpack_from(buffer, at)
        if not 1 <= head_size <= _MAX_HEAD or body_size > _MAX_BODY:
            raise _ProtocolError(f"a frame of lengths {head_size} and {body_size}")
        begin = at + _LENGTHS.size
        start = begin + head_size
        end = start + body_size
        if len(buffer) < end:
            return None
        try:
            head = _from_json(buffer[begin:start].decode())
        except (ValueError, RecursionError):
            raise _ProtocolError("a head that is not JSON in UTF-8") from None
        if not isinstance(head, dict) or not isinstance(head.get("type"), str):
            raise _ProtocolError("a head without a type")
        if None in head.values():  # null is the same as no field
            head = {name: value for name, value in head.items() if value is not None}
        number = head.get("id")
        if type(number) is float:
            number = head["id"] = _whole(number)
        if type(number) is not int or not 0 <= number <= _MAX_ID:
            raise _ProtocolError("a head without a valid id")
        _check_message(head, body_size)
        return head, start, end


class _Flusher:
    """Sends replies that are held back for the next one's sake when that takes its time."""

    _HOLD = 0.002  # seconds; those that are quick are done by then

    def __init__(self) -> None:
        self._held: Deque[_Wire] = collections.deque()
        self._came = threading.Event()
        self._start = threading.Lock()
        self._started = False

    def watch(self, wire: _Wire) -> None:
        if wire.watched:
            return
        wire.watched = True
        self._held.append(wire)
        if not self._came.is_set():
            with self._start:
                if not self._started:
                    try:
                        threading.Thread(target=self._run, daemon=True).start()
                    except RuntimeError:  # no thread can be had: nothing is held back, and the next one tries again
                        self._send_held()
                        return
                    self._started = True
            self._came.set()

    def _run(self) -> None:
        try:
            while True:
                self._came.wait()
                time.sleep(self._HOLD)
                self._came.clear()
                self._send_held()
        except BaseException:
            # A plugin whose answers are held for ever must not seem to run: the host starts another.
            _log.exception("answers cannot be sent any more")
            os._exit(1)

    def _send_held(self) -> None:
        while True:
            try:
                wire = self._held.popleft()
            except IndexError:
                return
            wire.watched = False
            try:
                wire.flush()
            except Disconnected:
                pass  # its own thread finds out likewise


_flusher = _Flusher()


# ---- HTTP ------------------------------------------------------------------------------------------------------------

class Headers(List[Tuple[str, str]]):
    """Header pairs in order, repeats kept. Names compare without regard to case."""

    def get(self, name: str, default: Optional[str] = None) -> Optional[str]:
        """The first value of this name."""
        return next(iter(self.get_all(name)), default)

    def get_all(self, name: str) -> List[str]:
        """Every value of this name."""
        name = name.lower()
        return [value for key, value in self if key.lower() == name]


class Request:
    """An HTTP request. Its body is read on demand, and must be read before the answer begins.

    Reading raises Disconnected where the client goes away: let it pass, there is nobody left to answer.
    """

    method: str  #: as the client sent it
    path: str  #: what follows the mount, not decoded; begins with "/"
    query: Optional[str]  #: what follows the "?", not decoded; None where there is no "?"
    mount: str  #: the plugin's route, "" for a request by host name; links are made with it
    headers: Headers
    remote: str  #: the client's address, "" when it is not known
    #: Set once nobody waits for the answer: the client has gone, its time has passed, or the plugin is to stop. `wait` on it
    #: in place of a sleep. Do not set it.
    cancelled: threading.Event

    def __init__(self, wire: _Wire, head: Mapping[str, Any], body: bytes) -> None:
        self.method = head["method"]
        self.path = head["path"]
        self.mount = head["mount"]
        self.headers = Headers(map(tuple, head.get("headers", ())))
        self.query = head.get("query")
        self.remote = head.get("remote", "")
        self.cancelled = wire.cancelled
        self._id = head["id"]
        self._wire = wire
        self._unread = body
        self._more = bool(head.get("more"))
        self._aborted = False
        self._whole: Optional[bytes] = None

    @property
    def params(self) -> Dict[str, str]:
        """The query's parameters, decoded; of a repeated one the first."""
        return _first_values(self.query or "")

    def chunks(self) -> Iterator[bytes]:
        """The body in the pieces in which it arrives, however large it is."""
        while True:
            piece = self.read(_MAX_BODY)
            if not piece:
                return
            yield piece

    def read(self, size: int) -> bytes:
        """The next bytes of the body: at least one and at most `size`, or b"" at the end."""
        while self._more and not self._unread:
            self._unread = self._next()
        if self._aborted:
            raise RuntimeError("the request's body was given up: it must be read before the answer begins")
        piece, self._unread = self._unread[:size], self._unread[size:]
        return piece

    def body(self, limit: Optional[int] = 16 * _MAX_BODY) -> bytes:
        """The whole body. One over `limit` bytes (None: no limit) raises HTTPError 413."""
        if self._whole is None:
            pieces, size = [], 0
            for piece in self.chunks():
                pieces.append(piece)
                size += len(piece)
                if limit is not None and size > limit:
                    raise HTTPError(413, f"the request's body is over {limit} bytes")
            self._whole = b"".join(pieces)
        return self._whole

    def text(self, limit: Optional[int] = 16 * _MAX_BODY) -> str:
        """The whole body as UTF-8, with U+FFFD for what is none."""
        return self.body(limit).decode("utf-8", "replace")

    def json(self, limit: Optional[int] = 16 * _MAX_BODY) -> Any:
        """The whole body as JSON. Raises HTTPError 400 where it is none."""
        try:
            return json.loads(self.body(limit))
        except (ValueError, RecursionError):
            raise HTTPError(400, "the request's body is not JSON") from None

    def form(self, limit: Optional[int] = 16 * _MAX_BODY) -> Dict[str, str]:
        """The fields of an HTML form (application/x-www-form-urlencoded); of a repeated one the first."""
        return _first_values(self.text(limit))

    def _next(self) -> bytes:
        head, body = self._wire.read()
        if head["type"] != "data" or head["id"] != self._id:
            raise _ProtocolError(f"{_named(head)} came where data with id {self._id} was due")
        self._more = bool(head.get("more"))
        self._aborted = bool(head.get("aborted"))
        return body

    def _drop_rest(self) -> None:
        """Once the answer has begun: what is left of the body stands before the next request."""
        unfinished = self._more
        while self._more:
            self._next()
        self._aborted = self._aborted or unfinished


def _first_values(text: str) -> Dict[str, str]:
    values: Dict[str, str] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        values.setdefault(name, value)
    return values


class Response:
    """An answer.

    `body` is bytes, text (sent as UTF-8), a dict or list (sent as JSON), or any other iterable of bytes or text, which
    is streamed: each piece is sent as it is produced. A stream's head goes out with its first piece, so yield b"" to
    send it at once, and yield something at least every 60 s. The iterable's `close()`, where it has one, is called when
    the stream ends and also when the client goes away.

    `headers` is a mapping or pairs. `content_type` defaults to text/plain for text, application/json for JSON and
    application/octet-stream otherwise, unless the headers have one or there is no body.
    """

    def __init__(self, body: Any = b"", status: int = 200,
                 headers: Union[Mapping[str, Any], Iterable[Tuple[str, Any]], None] = None,
                 content_type: Optional[str] = None) -> None:
        self.status = _whole(status)
        pairs = () if headers is None else headers.items() if isinstance(headers, Mapping) else headers
        self.headers = Headers([(str(name), str(value)) for name, value in pairs])
        usual = "application/octet-stream"
        if isinstance(body, str):
            body, usual = body.encode(), "text/plain; charset=utf-8"
        elif isinstance(body, (dict, list)):
            body, usual = _to_json(body).encode(), "application/json"
        elif isinstance(body, (bytearray, memoryview)):
            body = bytes(body)
        elif not isinstance(body, Iterable):
            raise TypeError(f"a response's body cannot be {type(body).__name__}")
        self.body: Union[bytes, Iterable[Union[bytes, str]]] = body
        if content_type or (body and (not self.headers or self.headers.get("content-type") is None)):
            self.headers.append(("content-type", content_type or usual))

    def _parts(self, method: str) -> _Parts:
        """The body in pieces that fit a frame, each with whether more follow."""
        if isinstance(self.body, bytes):
            yield from _split(self.body, False)
            return
        try:
            if method == "HEAD":  # the body goes nowhere; it stays a stream, for its length is not 0 but unknown
                yield b"", True
            else:
                for piece in self.body:
                    yield from _split(piece.encode() if isinstance(piece, str) else piece, True)
            yield b"", False
        finally:
            close = getattr(self.body, "close", None)
            if close:
                close()


def _split(data: bytes, more: bool) -> _Parts:
    for at in range(0, len(data) or 1, _MAX_BODY):
        yield data[at:at + _MAX_BODY], more or at + _MAX_BODY < len(data)


def _begin(result: Any, method: str) -> Tuple[Response, Tuple[bytes, bool], Optional[_Parts]]:
    """What a handler returned: the response, its first part and the others, None where there can be none.

    A stream that fails at once fails here.
    """
    if isinstance(result, tuple):
        status, body = result
        result = Response(body, status)
    elif not isinstance(result, Response):
        result = Response(result)
    if isinstance(result.body, bytes) and len(result.body) <= _MAX_BODY:
        return result, (result.body, False), None
    parts = result._parts(method)
    return result, next(parts), parts


# ---- WebSocket -------------------------------------------------------------------------------------------------------

class SocketClosed(ConnectionError):
    """Raised by `WebSocket.send`: the socket is closed, whoever has closed it. Its own handlers may let it pass."""

    def __init__(self, closed: WebSocket) -> None:
        super().__init__("the WebSocket is closed")
        self.socket = closed


class WebSocket:
    """A WebSocket of a client. Its methods may be called from any thread, and it may be given attributes of your own."""

    path: str  #: what follows the mount, not decoded; begins with "/"
    query: Optional[str]  #: what follows the "?", not decoded; None where there is no "?"
    mount: str  #: the plugin's route, "" for a socket by host name
    headers: Headers  #: those of the request that asks for the socket
    remote: str  #: the client's address, "" when it is not known
    protocols: List[str]  #: the subprotocols that the client offers, in its order

    def __init__(self, connection: _Sockets, head: Mapping[str, Any]) -> None:
        self.path = head["path"]
        self.query = head.get("query")
        self.mount = head["mount"]
        self.headers = Headers(map(tuple, head.get("headers", ())))
        self.remote = head.get("remote", "")
        offered = ",".join(self.headers.get_all("sec-websocket-protocol")).split(",")
        self.protocols = [name.strip() for name in offered if name.strip()]
        self._id = head["id"]
        self._connection = connection
        self._plugin = connection.plugin
        application = self._plugin._socket_application
        self._calls: Union[_Mailbox, _ASGISocketCall] = (
            _ASGISocketCall(application, self) if application else _Mailbox(connection, self))
        self._changed = threading.Condition(threading.Lock())
        # These are changed under the lock of `_changed`, and so is what is sent for the socket.
        self._protocol: Optional[str] = None
        self._accepted = False
        self._closing = False  # whether the plugin has closed it
        self._ended = False  # whether the host knows it no more
        self._held: List[Tuple[Dict[str, Any], bytes]] = []  # what is to be sent once it is accepted
        self._credit = head.get("credit", _SOCKET_CREDIT)  # bytes of messages that may be sent
        self._host_credit = _SOCKET_CREDIT  # and those that the host may send

    @property
    def params(self) -> Dict[str, str]:
        """The query's parameters, decoded; of a repeated one the first."""
        return _first_values(self.query or "")

    @property
    def protocol(self) -> Optional[str]:
        """The subprotocol that is spoken. A `websocket_open` handler may set it to one of `protocols`."""
        return self._protocol

    @protocol.setter
    def protocol(self, name: Optional[str]) -> None:
        if name is not None and name not in self.protocols:
            raise ValueError(f"the client offers no subprotocol {name!r}, only {self.protocols}")
        with self._changed:
            if self._accepted:
                raise RuntimeError("the socket has been accepted: its subprotocol is set before that")
            self._protocol = name

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return not (self._closing or self._ended)

    def send(self, message: Union[str, bytes]) -> None:
        """Send a message, str as text and bytes as binary, of at most 1 MiB.

        Waits while there is no credit, since the client reads slowly, and as long as the socket is open. Raises SocketClosed
        once it is closed, or when the plugin is to stop.
        """
        body, is_text = _payload(message)
        with self._changed:
            while not self._send(body, is_text):
                self._answer()  # before that no credit comes
                self._changed.wait()  # for credit, the end of the socket or of its connection, or the plugin's stop

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the socket, after all that was sent. Does nothing if it is closed.

        `code` is 1000–1003, 1007–1014 or 3000–4999, `reason` at most 123 bytes of UTF-8. From now on no message reaches the
        handler. The `websocket_close` handler is called when the client has closed its side.
        """
        if type(code) is not int or not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
            raise ValueError(f"a WebSocket is closed with a code of 1000-1003, 1007-1014 or 3000-4999, got {code!r}")
        size = len(reason.encode())
        if size > _MAX_REASON:
            raise ValueError(f"a reason of {size} bytes; a close frame holds {_MAX_REASON}")
        with self._changed:
            if not self.is_open:
                return
            head = {"type": "ws_close", "id": self._id, "code": code}
            if reason:
                head["reason"] = reason
            self._closing = True
            self._plugin._forget_socket(self)
            self._put(head)
        self._wake()

    def _send(self, body: bytes, is_text: bool) -> bool:
        """Send a message if there is credit, with the lock held; returns whether there was. Raises SocketClosed."""
        if not self.is_open:
            raise SocketClosed(self)
        if self._credit <= 0:
            if self._plugin.stopping.is_set():
                raise SocketClosed(self)
            return False
        self._credit -= len(body) + _MESSAGE_COST
        self._put({"type": "ws_message", "id": self._id, "text": is_text}, body)
        return True

    def _put(self, head: Dict[str, Any], body: bytes = b"") -> None:
        if self._accepted:
            self._connection.send(head, body)
        else:
            self._held.append((head, body))

    def _try_send(self, body: bytes, is_text: bool) -> bool:
        with self._changed:
            return self._send(body, is_text)

    def _send_or_close(self, body: bytes, is_text: bool) -> bool:
        """Send a message if there is credit, and close the socket if there is none; returns whether it was sent."""
        try:
            if self._try_send(body, is_text):
                return True
        except SocketClosed:
            return False
        self.close(1013, "the client reads too slowly")
        return False

    def _accept(self, headers: Iterable[Tuple[str, str]] = ()) -> None:
        """Accept the socket, unless it is accepted or refused."""
        with self._changed:
            self._answer(list(headers))

    def _answer(self, headers: Iterable[Tuple[str, str]] = ()) -> None:
        if self._accepted:
            return
        head: Dict[str, Any] = {"type": "ws_accept", "id": self._id}
        if self._protocol is not None:
            head["protocol"] = self._protocol
        if headers:
            head["headers"] = headers
            _encode_before(head, b"")  # raises Error where no frame holds them, before anything has changed
        self._accepted = True
        if self.is_open:
            self._plugin._know_socket(self)  # before the host can know it
        if not self._ended:
            self._connection.send(head)
            for each in self._held:
                self._connection.send(*each)
        self._held.clear()

    def _fail(self) -> None:
        """A handler has failed: the client gets 500, or where it has the socket already, the code 1011."""
        if self._accepted or self._closing:
            self.close(1011)
        else:
            self._refuse(500, _PLAIN_TEXT, b"internal error\n")

    def _refuse(self, status: int, headers: List[Tuple[str, str]], body: bytes) -> None:
        if not _is_integer_within(status, 300, 599):
            raise ValueError(f"a WebSocket is refused with a status of 300 to 599, got {status!r}")
        if len(body) > _MAX_REFUSAL:
            raise ValueError(f"a WebSocket is refused with at most {_MAX_REFUSAL} bytes")
        with self._changed:
            if self._accepted:
                raise RuntimeError("the socket was accepted, since all its credit was used up before it was refused")
            if not self._ended:
                self._connection.send({"type": "response", "id": self._id, "status": status, "headers": headers}, body)
            self._ended = True
            self._held.clear()
        self._connection.forget(self._id)

    def _return_credit(self, size: int) -> None:
        """Tell the host that so many bytes of messages have been dealt with."""
        with self._changed:
            if self.is_open:
                self._host_credit += size
                self._connection.send({"type": "ws_credit", "id": self._id, "bytes": size})

    def _wake(self) -> None:
        """Have those who wait for credit look again."""
        with self._changed:
            self._changed.notify_all()
        self._calls.writable()

    # In the thread that reads the connection.

    def _receive(self, body: bytes, is_text: bool) -> None:
        size = len(body) + _MESSAGE_COST
        with self._changed:
            if not self._accepted:
                raise _ProtocolError(f"ws_message with id {self._id} came before the socket was accepted")
            if self._host_credit <= 0:
                raise _ProtocolError(f"ws_message with id {self._id} came without credit")
            self._host_credit -= size
        try:
            message: Union[str, bytes] = body.decode() if is_text else body
        except UnicodeDecodeError:
            raise _ProtocolError(f"ws_message with id {self._id} is text that is not UTF-8") from None
        self._calls.received(message, size)

    def _receive_credit(self, size: int) -> None:
        with self._changed:
            self._credit += size
        self._wake()

    def _end(self, code: Optional[int], reason: str) -> None:
        """The host says nothing more about the socket, or there is no host any more."""
        with self._changed:
            self._ended = True
            self._plugin._forget_socket(self)
        self._wake()
        self._calls.closed(code, reason)


def _payload(message: Union[str, bytes]) -> Tuple[bytes, bool]:
    """A message's bytes, and whether it is text."""
    if not isinstance(message, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"a message is str or bytes, got {type(message).__name__}")
    body = _bytes(message)
    if len(body) > _MAX_BODY:
        raise ValueError(f"a message of {len(body)} bytes; a WebSocket takes at most {_MAX_BODY}")
    return body, isinstance(message, str)


class _Sockets:
    """The host's connection for WebSockets, from its first `ws_open` to its end.

    One thread reads it, and sends what the connection has not taken at once. So nobody waits for the host, and credit is
    read whatever handlers do. What is unsent is bounded by the credit that the host has given.
    """

    def __init__(self, plugin: Plugin, wire: _Wire) -> None:
        self.plugin = plugin
        self._wire = wire
        self._sockets: Dict[int, WebSocket] = {}  # those that the host may still say something about
        self._lock = threading.Lock()  # of these
        self._unsent = bytearray()
        self._waits = False  # whether the thread waits for room to send
        self._over = False
        self._poll = select.epoll()
        self._idle = threading.Condition(threading.Lock())
        self._busy = 0  # sockets with handlers that are still to be called; under the lock of `_idle`

    def send(self, head: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a frame, behind those that are still unsent. Never waits."""
        start = _encode_before(head, body)
        with self._lock:
            if self._over:
                return
            is_first = not self._unsent
            self._unsent += start
            self._unsent += body
            if is_first:
                self._send_more()

    def serve(self, head: Dict[str, Any]) -> None:
        """Serve the connection, which has begun with this message. Returns when it has ended and every handler has returned."""
        try:
            self._poll.register(self._wire.fileno(), select.EPOLLIN)
            goes_on = self._take(head, b"")
            while goes_on:
                frame = self._wire.read_now()
                if frame:
                    goes_on = self._take(*frame)
                else:
                    self._poll.poll()
                    with self._lock:
                        if self._unsent:
                            self._send_more()
        except Disconnected:
            pass
        except _ProtocolError as error:
            _log.error("the host broke the protocol, so the connection for WebSockets is closed: %s", error)
            self._wire.end()
        except Exception:
            _log.exception("the connection for WebSockets is closed")
            self._wire.end()
        finally:
            for each in list(self._sockets.values()):
                each._end(1006, "")
            with self._idle:
                self._idle.wait_for(lambda: self._busy == 0)  # the host bounds the time for this, as for requests
            with self._lock:
                self._over = True
            self._poll.close()

    def forget(self, number: int) -> None:
        self._sockets.pop(number, None)

    def count_busy(self, change: int) -> None:
        with self._idle:
            self._busy += change
            if self._busy == 0:
                self._idle.notify()

    def _send_more(self) -> None:
        """Send what the connection takes, and have the thread send the rest. With the lock held."""
        try:
            self._wire.send_now(self._unsent)
        except Disconnected:
            self._unsent.clear()  # the thread finds out likewise
        if bool(self._unsent) != self._waits:
            self._waits = not self._waits
            self._poll.modify(self._wire.fileno(), select.EPOLLIN | select.EPOLLOUT if self._waits else select.EPOLLIN)

    def _take(self, head: Dict[str, Any], body: bytes) -> bool:
        """Deal with one message of the host, without waiting; returns whether the connection goes on."""
        kind, number = head["type"], head["id"]
        known = self._sockets.get(number)
        if kind == "shutdown":
            self.plugin._stop()
            return False
        if kind == "ws_open":
            if known:
                raise _ProtocolError(f"{_named(head)} came while this socket is open")
            self._sockets[number] = new = WebSocket(self, head)
            new._calls.opened()
        elif kind == "ws_close":
            if known:  # or else it has just been refused
                self.forget(number)
                known._end(head.get("code"), head.get("reason", ""))
        elif kind not in ("ws_message", "ws_credit"):
            raise _ProtocolError(f"a message of type {kind!r} came where those of WebSockets are due")
        elif not known:
            raise _ProtocolError(f"{_named(head)} came, and there is no such socket")
        elif kind == "ws_message":
            known._receive(body, head.get("text", False))
        else:
            known._receive_credit(head["bytes"])
        return True


class _Workers:
    """Threads that call the handlers of sockets: at most so many, started as they are needed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ready: queue.SimpleQueue[_Mailbox] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of these
        self._threads = 0
        self._spare = 0  # threads that wait for a mailbox, less the mailboxes that wait for a thread

    def start_one(self) -> None:
        """Have at least one thread. Raises RuntimeError or MemoryError where none can be had."""
        with self._lock:
            if self._threads == 0:
                self._start()
                self._spare += 1

    def put(self, mailbox: _Mailbox) -> None:
        """Have a thread handle the next event of a mailbox."""
        with self._lock:
            self._spare -= 1
            if self._spare < 0 and self._threads < self._most:
                try:
                    self._start()
                    self._spare += 1
                except (RuntimeError, MemoryError):
                    pass  # those that run get to it
        self._ready.put(mailbox)

    def _start(self) -> None:
        threading.Thread(target=self._run, name="websocket", daemon=True).start()
        self._threads += 1

    def _run(self) -> None:
        while True:
            self._ready.get().handle_next()
            with self._lock:
                self._spare += 1


class _Mailbox:
    """What has happened to a socket and is still to be handled, in order. Bounded by the credit that the host was given."""

    def __init__(self, connection: _Sockets, owner: WebSocket) -> None:
        self._connection = connection
        self._plugin = connection.plugin
        self._socket = owner
        self._lock = threading.Lock()  # of these
        self._events: Deque[Tuple[Callable[..., None], Tuple[Any, ...]]] = collections.deque()
        self._scheduled = False  # whether it waits for a worker, or has one

    # In the thread that reads the connection.

    def opened(self) -> None:
        self._add(self._open)

    def received(self, message: Union[str, bytes], size: int) -> None:
        self._add(self._message, message, size)

    def closed(self, code: Optional[int], reason: str) -> None:
        self._add(self._close, code, reason)

    def writable(self) -> None:
        """Those who wait to send do so in `WebSocket.send`."""

    def _add(self, event: Callable[..., None], *arguments: Any) -> None:
        with self._lock:
            self._events.append((event, arguments))
            if self._scheduled:
                return
            self._scheduled = True
        self._connection.count_busy(+1)
        self._plugin._workers.put(self)

    # In a worker.

    def handle_next(self) -> None:
        with self._lock:
            event, arguments = self._events.popleft()
        try:
            with self._plugin._turn:
                event(*arguments)
        except BaseException as error:  # also SystemExit, which would end the worker
            if not (isinstance(error, SocketClosed) and error.socket is self._socket):
                _log.error("the %s handler failed for the WebSocket at %s", event.__name__[1:], self._socket.path, exc_info=error)
                self._socket._fail()
            self._socket._accept()
        with self._lock:
            goes_on = self._scheduled = bool(self._events)
        if goes_on:
            self._plugin._workers.put(self)  # behind the others
        else:
            self._connection.count_busy(-1)

    def _open(self) -> None:
        if self._socket._ended:
            return  # the client has gone meanwhile
        handler = self._plugin._socket_handlers.get("open")
        try:
            answer = handler(self._socket) if handler else None
        except HTTPError as error:
            answer = error.status, f"{error}\n"
        if answer is None:
            self._socket._accept()
            return
        response, (body, _), parts = _begin(answer, "GET")
        if parts:
            with closing(parts):
                for part, _ in parts:
                    body += part
                    if len(body) > _MAX_REFUSAL:
                        break
        self._socket._refuse(response.status, response.headers, body)

    def _message(self, message: Union[str, bytes], size: int) -> None:
        handler = self._plugin._socket_handlers.get("message")
        if handler and not self._socket._closing:
            handler(self._socket, message)
        self._socket._return_credit(size)

    def _close(self, code: Optional[int], reason: str) -> None:
        handler = self._plugin._socket_handlers.get("close")
        if handler and self._socket._accepted:
            handler(self._socket, code, reason)


# ---- The store -------------------------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """A key of the store and what is known of it."""

    key: str
    value: Optional[bytes]  #: None in a list made without values
    rev: int  #: the revision: every write of the key gives it a new one
    size: int  #: of the value, in bytes
    expires_in_ms: Optional[int]  #: None where it does not expire


class Store:
    """The plugin's own keys in the host's store. May be used from any thread.

    Keys are text of 1 to 512 bytes, values are bytes (text is stored as UTF-8) of at most 1 MiB. What a method wrote is
    on disk when it returns. Each raises Error with the host's code, Conflict where a precondition does not hold.
    `ttl` is in seconds; without it a value does not expire.
    """

    def __init__(self, path: Optional[str] = None) -> None:
        """`path` is the host's socket, by default $PLUGRACK_HOST_SOCKET. Nothing is opened before the first call."""
        self._path = path or os.environ.get("PLUGRACK_HOST_SOCKET", "")
        self._slots = threading.BoundedSemaphore(_STORE_CONNECTIONS)
        self._idle: List[_Wire] = []  # the most recently used last; append and pop are atomic
        self._numbers = itertools.count(1)

    def get(self, key: str) -> Optional[bytes]:
        """The value, or None where the key is not there."""
        entry = self.get_entry(key)
        return None if entry is None else entry.value

    def get_entry(self, key: str) -> Optional[Entry]:
        """The value with its revision and time to live, or None where the key is not there."""
        head, value = self._call({"op": "get", "key": key})
        if not head["found"]:
            return None
        return Entry(key, value, head["rev"], len(value), head.get("expires_in_ms"))

    def set(self, key: str, value: Union[bytes, str], ttl: Optional[float] = None, if_rev: Optional[int] = None,
            if_absent: bool = False) -> int:
        """Write the value; returns its revision.

        `if_rev`: only where the key is there with this revision. `if_absent`: only where it is not there.
        """
        fields = _fields(op="set", key=key, ttl=ttl, if_rev=if_rev, if_absent=if_absent)
        rev: int = self._call(fields, _bytes(value))[0]["rev"]
        return rev

    def delete(self, key: str, if_rev: Optional[int] = None) -> bool:
        """Delete the key; returns whether it was there."""
        found: bool = self._call(_fields(op="delete", key=key, if_rev=if_rev))[0]["found"]
        return found

    def incr(self, key: str, delta: int = 1, ttl: Optional[float] = None) -> int:
        """Add `delta` to a decimal 64-bit integer, 0 where the key is not there; returns the sum.

        `ttl` counts when this makes the key; a key that is there keeps its own.
        """
        total: int = self._call(_fields(op="incr", key=key, delta=delta, ttl=ttl))[0]["value"]
        return total

    def list(self, prefix: str = "", after: Optional[str] = None, values: bool = False) -> Iterator[Entry]:
        """The entries whose keys begin with `prefix` and come after `after`, in byte order of the keys.

        They are fetched a page at a time as the iteration goes on, so they are no snapshot.
        """
        while True:
            fields = _fields(op="list", prefix=prefix, after=after, limit=1000, values=values)
            head, page = self._call(fields)
            for item in json.loads(page):
                text = item.get("value_base64")
                yield Entry(item["key"], None if text is None else base64.b64decode(text), item["rev"], item["size"],
                            item.get("expires_in_ms"))
            after = head.get("next")
            if after is None:
                return

    def txn(self, writes: Iterable[Mapping[str, Any]]) -> List[Dict[str, Any]]:
        """Make 1 to 128 writes, all or none, in order.

        A write is a mapping of "op" ("set", "delete" or "incr") and the arguments of the method of that name:
        {"op": "set", "key": "a", "value": b"1", "ttl": 60}. Returns what each gave: {"rev": N}, {"found": True} or
        {"value": N, "rev": N}. An Error has the place of the write that failed as `index`.
        """
        body = _to_json([_fields(**write) for write in writes]).encode()
        results: List[Dict[str, Any]] = json.loads(self._call({"op": "txn"}, body)[1])
        return results

    def _call(self, fields: Mapping[str, Any], body: bytes = b"") -> Tuple[Dict[str, Any], bytes]:
        number = next(self._numbers)
        with self._slots:
            wire = self._connection()
            try:
                wire.send({"type": "kv", "id": number, **fields}, body)
                head, value = wire.read()
                if head["id"] != number or head["type"] not in ("result", "error"):
                    raise _ProtocolError(f"{_named(head)} came where the reply to request {number} was due")
                if head["type"] == "result":
                    _check_result(fields["op"], head, value)
            except (Disconnected, _ProtocolError) as error:
                wire.close()
                raise Error("disconnected", str(error)) from None
            except BaseException:
                wire.close()  # what is on the way would be taken for the next reply
                raise
            self._idle.append(wire)
        if head["type"] == "error":
            kind = Conflict if head["code"] == "conflict" else Error
            raise kind(head["code"], head["message"], head.get("index"))
        return head, value

    def _connection(self) -> _Wire:
        # One that the host has closed meanwhile is found out before a request is sent on it. A request is never sent
        # again: a write that got no reply may have been made.
        while self._idle:
            wire = self._idle.pop()
            if wire.idle():
                return wire
            wire.close()
        sock: Optional[socket.socket] = None
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(self._path)
        except OSError as error:
            if sock:
                sock.close()
            raise Error("disconnected", f"the host's socket {self._path!r}: {error}") from None
        return _Wire(sock)


def _bytes(value: Union[bytes, str]) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _fields(**arguments: Any) -> Dict[str, Any]:
    """A method's arguments as the protocol has them: those not given are left out, and times are in milliseconds."""
    fields = {name: _whole(value) for name, value in arguments.items() if value is not None}
    if "ttl" in fields:
        fields["ttl_ms"] = round(fields.pop("ttl") * 1000)
    if "value" in fields:
        fields["value_base64"] = base64.b64encode(_bytes(fields.pop("value"))).decode()
    return fields


# ---- Licences --------------------------------------------------------------------------------------------------------

_TOKEN_HEADER = "v4.public."
_KEY_HEADER = "k4.public."
_ASSERTION = b"plugrack/plugin-licence/v1"  # signed along, so that a token made for another purpose is no licence
_KEY_SIZE = 32  # bytes of an Ed25519 public key
_SIGNATURE_SIZE = 64  # bytes
_MAX_TOKEN = 8192  # bytes; a usual token has about 600
_MAX_FOOTER = 256  # bytes, since it is read before its signature is checked
_MAX_NESTING = 127  # levels of objects and arrays: the same in every SDK, and far from the end of any stack
_MAX_GRACE_DAYS = 3650
_DAY = 86_400  # seconds
_CLOCK_SLACK = _DAY  # a clock this far before the time of issue may be a slip; one further back has not been set
_WARNING = 30 * _DAY  # before the end, as long as it may take to buy a licence
_SHOWN = 80  # characters of a claim in a message
_ASCII_SPACE = " \t\n\f\r"

_KID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DATE = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
_TIME = re.compile(_DATE.pattern + r"T([0-9]{2}):([0-9]{2}):([0-9]{2})Z")
_JSON_NESTING = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


class License(NamedTuple):
    """A licence that holds. Times are as in the token: `YYYY-MM-DDTHH:MM:SSZ`, dates `YYYY-MM-DD`."""

    id: str  #: the licence's own, from its issuer
    issuer: str
    customer: Optional[str]
    plugin_id: str
    instances: List[str]  #: the instances it is for; "*" means all
    issued: str
    not_before: Optional[str]
    expires: Optional[str]  #: None: it does not
    grace_days: int  #: how long it goes on after it has expired
    updates_until: Optional[str]  #: releases after this date are not covered
    features: FrozenSet[str]  #: one that is not here is off
    limits: Dict[str, int]
    standing: str  #: "valid", "warning" (it expires within 30 days) or "grace" (it has expired)
    days_left: Optional[int]  #: whole days, rounded up, until it expires (in "warning") or the grace ends (in "grace")


def verify_license(token: Optional[str], keyring: Mapping[str, str], plugin_id: str, instance_id: str,
                   release_date: Optional[str] = None, now: Optional[datetime] = None,
                   not_before_time: Optional[str] = None) -> License:
    """Check a licence token. Raises LicenseError with the code of the first check that fails.

    `keyring` maps the name of each key to the key, `k4.public.…`. `release_date` is that of the plugin (`YYYY-MM-DD`);
    without one it is not compared. `now` is the time, that of the clock unless given; `not_before_time` is what the
    host says in `init`, a time that is past whatever the clock says. Raises ValueError where the keyring,
    the release date or `not_before_time` is not of its form.

    Checking a signature needs the package `cryptography`; where it is missing the code is `unsupported`.
    """
    keys = _read_keyring(keyring)
    _read_release_date(release_date)
    clock = math.floor(time.time() if now is None else now.timestamp())
    latest = clock if not_before_time is None else max(clock, _seconds(not_before_time))

    text = (token or "").strip(_ASCII_SPACE)
    if not text:
        raise LicenseError(
            "missing", f"this plugin needs a licence for the instance {instance_id}: get one from its vendor and set it "
            f"with `plugrack license set {plugin_id} TOKEN`")
    try:
        if len(text.encode("utf-8", "surrogatepass")) > _MAX_TOKEN:
            raise ValueError(f"it has more than {_MAX_TOKEN} bytes")
        payload, signature, footer = _split_token(text)
        kid = _read_footer(footer)
    except ValueError as error:
        raise _malformed(error) from None
    if kid not in keys:
        raise LicenseError(
            "unknown_key", f"it is signed with the key {kid}, which this release of the plugin does not know: ask the "
            "vendor for a licence for this release, or install the release it is for")
    if not _is_signed(payload, footer, _ASSERTION, signature, keys[kid]):
        raise LicenseError(
            "bad_signature", "its signature is wrong, so it has been changed or is not from the vendor: set it again "
            "exactly as the vendor sent it")
    claims = _read_claims(payload)

    if claims["aud"] != plugin_id:
        raise LicenseError(
            "wrong_plugin", f"it is for the plugin {_show(claims['aud'])}, and this is {plugin_id}: set the one for this "
            "plugin")
    if instance_id not in claims["inst"] and "*" not in claims["inst"]:
        raise LicenseError(
            "wrong_instance", f"it is for the instance {_show(', '.join(claims['inst']))}, and this is {instance_id}: "
            "ask the vendor for one for this instance")
    if release_date is not None and release_date > claims.get("upd", release_date):
        raise LicenseError(
            "update_not_covered", f"it covers releases up to {claims['upd']}, and this one is of {release_date}: renew "
            "it, or go back to a release that it covers")
    if clock < _seconds(claims["iat"]) - _CLOCK_SLACK:
        raise LicenseError(
            "clock_not_set", f"the clock says {_stamp(clock)}, but the licence was issued at {claims['iat']}: set the "
            "clock of this machine")
    if "nbf" in claims and latest < _seconds(claims["nbf"]):
        raise LicenseError(
            "not_yet_valid", f"it is valid from {claims['nbf']} on, and it is {_stamp(latest)}: wait until then, or set "
            "one that is valid now")
    standing, days_left = _standing(claims, latest)
    return License(claims["jti"], claims["iss"], claims.get("sub"), claims["aud"], claims["inst"], claims["iat"],
                   claims.get("nbf"), claims.get("exp"), claims.get("grace_days", 0), claims.get("upd"),
                   frozenset(claims.get("feat", ())), claims.get("lim", {}), standing, days_left)


def _standing(claims: Mapping[str, Any], latest: int) -> Tuple[str, Optional[int]]:
    if "exp" not in claims:
        return "valid", None
    end = _seconds(claims["exp"])
    last = end + claims.get("grace_days", 0) * _DAY
    if latest >= last:
        grace = f" and its {claims['grace_days']} days of grace are over" if last > end else ""
        raise LicenseError(
            "expired", f"it expired at {claims['exp']}{grace}: get a new one from the vendor and set it with `plugrack "
            f"license set {claims['aud']} TOKEN`")
    if latest >= end:
        return "grace", math.ceil((last - latest) / _DAY)
    if end - latest <= _WARNING:
        return "warning", math.ceil((end - latest) / _DAY)
    return "valid", None


def _split_token(token: str) -> Tuple[bytes, bytes, bytes]:
    """Payload, signature and footer of a PASETO v4.public token, unchecked."""
    if not token.startswith(_TOKEN_HEADER):
        raise ValueError(f"it does not begin with {_TOKEN_HEADER}")
    body, *footer = token[len(_TOKEN_HEADER):].split(".")
    if len(footer) > 1:
        raise ValueError("it has too many parts")
    signed = _from_base64url(body)
    if len(signed) <= _SIGNATURE_SIZE:
        raise ValueError("it is too short")
    return signed[:-_SIGNATURE_SIZE], signed[-_SIGNATURE_SIZE:], _from_base64url(footer[0]) if footer else b""


def _is_signed(payload: bytes, footer: bytes, assertion: bytes, signature: bytes, key: bytes) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise LicenseError(
            "unsupported", f"it cannot be checked without the Python package cryptography ({error}): install it (Debian: "
            "apt install python3-cryptography), then start the plugin again") from None
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(
            signature, _pae(_TOKEN_HEADER.encode(), payload, footer, assertion))
    except (InvalidSignature, ValueError):
        return False
    return True


def _pae(*pieces: bytes) -> bytes:
    """PASETO's pre-authentication encoding: the pieces with their number and lengths, so that no border can move."""
    numbered = (struct.pack("<Q", len(piece)) + piece for piece in pieces)
    return struct.pack("<Q", len(pieces)) + b"".join(numbered)


def _from_base64url(text: str) -> bytes:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        # The decoder is lenient: the one text that stands for these bytes is what they are encoded to.
        if base64.urlsafe_b64encode(data).rstrip(b"=").decode() == text:
            return data
    except ValueError:
        pass
    raise ValueError("it is not base64url without padding")


def _read_keyring(keyring: Mapping[str, str]) -> Dict[str, bytes]:
    keys = {}
    for kid, key in keyring.items():
        try:
            if not _KID.fullmatch(kid):
                raise ValueError
            keys[kid] = _from_base64url(key[len(_KEY_HEADER):])
            if not key.startswith(_KEY_HEADER) or len(keys[kid]) != _KEY_SIZE:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"the licence key {kid!r} is not a name of 1 to 64 letters, digits and ._- with a {_KEY_HEADER}… key of "
                f"{_KEY_SIZE} bytes, as `plugrack license keygen` prints it") from None
    return keys


def _read_release_date(text: Optional[str]) -> None:
    if text is not None and not _is_date(text):
        raise ValueError(f"the release date {text!r} is not of the form YYYY-MM-DD")


def _read_footer(footer: bytes) -> str:
    """The name of the key that has signed the token."""
    if len(footer) > _MAX_FOOTER:
        raise ValueError(f"its footer has more than {_MAX_FOOTER} bytes")
    fields = _strict_json(footer, "its footer")
    kid = fields.get("kid")
    flat = not any(isinstance(value, (dict, list)) for value in fields.values())
    if flat and isinstance(kid, str) and _KID.fullmatch(kid):
        return kid
    raise ValueError("its footer does not name a key")


def _read_claims(payload: bytes) -> Dict[str, Any]:
    """The claims of a payload whose signature is right."""
    try:
        claims = _strict_json(payload, "its payload")
        if not _is_integer(claims.get("v")):
            raise ValueError("the claim v is not an integer")
        if claims["v"] != 1:
            raise LicenseError(
                "unsupported", f"it is of version {claims['v']}, which this release of the plugin does not know: update "
                "the plugin")
        critical = claims.get("crit", [])
        if not _are_texts(critical):
            raise ValueError("the claim crit is not of its form")
        unknown = [name for name in critical if name not in _CLAIMS]
        if unknown:
            raise LicenseError(
                "unsupported", f"it relies on {_show(', '.join(unknown))}, which this release of the plugin does not "
                "know: update the plugin")
        for name, (required, is_of_form) in _CLAIMS.items():
            if name not in claims and required:
                raise ValueError(f"the claim {name} is missing")
            if name in claims and not is_of_form(claims[name]):
                raise ValueError(f"the claim {name} is not of its form")
    except ValueError as error:
        raise _malformed(error) from None
    return claims


def _strict_json(data: bytes, what: str) -> Dict[str, Any]:
    """A JSON object that every parser reads alike: no key twice, no number beyond a float, no half a surrogate."""
    def once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError
        return fields

    def integer(digits: str) -> Union[int, float]:
        number = int(digits)  # one of 64 bits, or else a float, as in the other SDKs
        return number if -2**63 <= number < 2**64 and digits != "-0" else float(digits)

    try:
        text = data.decode()
        nesting = 0
        for token in _JSON_NESTING.findall(text):
            nesting += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
            if nesting > _MAX_NESTING:
                raise ValueError
        fields = json.loads(text, object_pairs_hook=once, parse_int=integer)
        _to_json(fields).encode()  # finds what is no finite number, and what is no Unicode
        if not isinstance(fields, dict):
            raise ValueError
    except ValueError:
        raise ValueError(f"{what} is not a JSON object of its form") from None
    return fields


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_integer(value: Any) -> bool:
    return type(value) is int  # and not bool, which is a kind of int


def _is_count(value: Any) -> bool:
    return _is_integer(value) and 0 <= value <= _MAX_ID


def _are_limits(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_grace(value: Any) -> bool:
    return _is_count(value) and value <= _MAX_GRACE_DAYS


def _is_date(value: Any) -> bool:
    return _is_text(value) and _moment(_DATE, value) is not None


def _is_time(value: Any) -> bool:
    return _is_text(value) and _moment(_TIME, value) is not None


# Each claim of version 1: whether a token must have it, and its form.
_CLAIMS: Dict[str, Tuple[bool, Callable[[Any], bool]]] = {
    "v": (True, _is_integer), "jti": (True, _is_text), "iss": (True, _is_text), "aud": (True, _is_text),
    "inst": (True, _are_texts), "iat": (True, _is_time), "sub": (False, _is_text), "nbf": (False, _is_time),
    "exp": (False, _is_time), "grace_days": (False, _is_grace), "upd": (False, _is_date), "feat": (False, _are_texts),
    "lim": (False, _are_limits), "crit": (False, _are_texts),
}


def _moment(form: Pattern[str], text: str) -> Optional[datetime]:
    """The time that a text of exactly this form names, if there is such a time."""
    match = form.fullmatch(text)
    try:
        return datetime(*map(int, match.groups()), tzinfo=timezone.utc) if match else None  # type: ignore[misc, arg-type]
    except ValueError:
        return None


def _seconds(text: str) -> int:
    moment = _moment(_TIME, text)
    if moment is None:
        raise ValueError(f"the time {text!r} is not of the form YYYY-MM-DDTHH:MM:SSZ")
    return int(moment.timestamp())


def _stamp(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _show(text: str) -> str:
    """What a licence says, in one line and not too long."""
    return json.dumps(text[:_SHOWN], ensure_ascii=False) + ("…" if len(text) > _SHOWN else "")


def _malformed(error: ValueError) -> LicenseError:
    return LicenseError("malformed", f"this is no licence token, since {error}: set the whole line as the vendor sent it")


# ---- The plugin ------------------------------------------------------------------------------------------------------

def _default_concurrency(memory: int, threads: int = 1) -> int:
    """How many requests to serve at once in a process of at most so many bytes of data, with so many threads for each."""
    if memory == resource.RLIM_INFINITY:
        return _CONCURRENCY
    stack = threading.stack_size() or resource.getrlimit(resource.RLIMIT_STACK)[0]
    if stack == resource.RLIM_INFINITY:
        stack = _STACK
    return max(1, min(_CONCURRENCY, (memory - _MEMORY_KEPT) // (threads * max(stack, 1))))


class _Throttle:
    """Logs an error that repeats at most once in a while, with how often it came meanwhile. For one thread."""

    def __init__(self) -> None:
        self._next = -math.inf
        self._suppressed = 0

    def error(self, message: str, reason: object) -> None:
        now = time.monotonic()
        if now < self._next:
            self._suppressed += 1
            return
        more = f" ({self._suppressed} times more since the last such line)" if self._suppressed else ""
        self._next = now + _SAY_EVERY
        self._suppressed = 0
        _log.error(message + more, reason)


class _Turns:
    """A lock that goes to those who wait for it in the order in which they came: a flood of messages delays no request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of these
        self._taken = False
        self._waiting: Deque[threading.Lock] = collections.deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


class Context(NamedTuple):
    """What the host tells a plugin when it starts."""

    protocol: int  #: the version the host speaks
    instance_id: str  #: the identity of this installation, a UUID
    plugin_id: str
    socket_path: str
    host_socket: str
    log_path: str  #: the file this plugin's output goes to
    data_dir: str  #: the plugin's own directory, also its working directory
    license: Optional[str]  #: the licence token the operator has set for this plugin, unchecked
    config: Dict[str, Any]  #: the operator's settings for this plugin
    host: Dict[str, str]  #: name and version of the host
    not_before_time: Optional[str]  #: a time the host knows to be past, `YYYY-MM-DDTHH:MM:SSZ`
    granted: Optional[License] = None  #: the licence, checked; None where the plugin was given no `license_keys`


class Plugin:
    """A plugin: its metadata, its handlers, and `run()`.

    The arguments are the fields of the metadata. A plugin has a `route`, names in `host`, or both. `concurrency` is how many
    connections, and so requests at a time, the host may have open: 1 to 256. With 1 handlers need not be safe to run side by
    side. Unless given it is 16, or as many as there is room for where the operator has bounded the plugin's memory
    (`--plugin-memory`). `origins` are other sites whose pages may open a WebSocket, such as `https://app.example.org`, or `*`.

    `license_keys` is for a plugin that runs only with a licence: the vendor's public keys, by their names. `release_date`
    (`YYYY-MM-DD`) is that of this release, which the licence must cover. Both are as for `verify_license`.
    """

    store: Store  #: the plugin's keys in the host's store
    context: Optional[Context]  #: what `init` brought; None before
    stopping: threading.Event  #: set when the host shuts the plugin down: streams without an end must end, within 3 s

    def __init__(self, *, id: str, name: str, version: str, icon: str, route: Optional[str] = None,
                 host: Optional[List[str]] = None, below_route: Optional[str] = None, trailing_slash: Optional[str] = None,
                 concurrency: Optional[int] = None,
                 description: Optional[str] = None, author: Optional[str] = None,
                 homepage: Optional[str] = None, speaks: Optional[List[str]] = None, origins: Optional[List[str]] = None,
                 license_keys: Optional[Mapping[str, str]] = None, release_date: Optional[str] = None) -> None:
        self._memory = None if concurrency is not None else resource.getrlimit(resource.RLIMIT_DATA)[0]  # which decides on it
        if self._memory is not None:
            concurrency = _default_concurrency(self._memory)
        self.metadata = _fields(id=id, name=name, version=version, icon=icon, route=route, protocol=1,
                                host=host, below_route=below_route, trailing_slash=trailing_slash,
                                concurrency=concurrency, description=description, author=author, homepage=homepage,
                                speaks=speaks, origins=origins)
        if license_keys is not None:
            _read_keyring(license_keys)  # a slip of the author shows at once, not on a customer's machine
            _read_release_date(release_date)
        self._license_keys = license_keys
        self._release_date = release_date
        self.store = Store()
        self.context = None
        self.stopping = threading.Event()
        self._handle_http: Callable[[Request], Any] = lambda request: (404, "not found\n")
        self._handle_init: Callable[[Context], Any] = lambda context: None
        self._handle_kv: Callable[[str, str, bytes], Any] = self._kv_in_store
        self._prepare_handlers()
        self._socket_handlers: Dict[str, Callable[..., Any]] = {}  # "open", "message" and "close", those that there are
        self._socket_application: Optional[_ASGI] = None  # in place of these
        self._sockets_lock = threading.Lock()
        self._open_sockets: Dict[WebSocket, None] = {}  # those that are accepted and not closed, in order; under the lock
        self._ready = False
        self._changed = threading.Condition(threading.Lock())
        # These are changed under the lock of `_changed`.
        self._connections: Dict[int, _Wire] = {}  # those that threads serve, by file descriptor
        self._abandoned = 0  # how many of these the host has closed, while a handler keeps their threads busy
        self._at_limit = False  # whether no connection is accepted until a thread of an ended one is done
        self._poll: Optional[select.epoll] = None  # the listener and the connections
        self._listener = -1  # its file descriptor
        self._exit_code = 0
        self._ended = threading.Event()
        self._shortage = _Throttle()
        self._overload = _Throttle()

    def _prepare_handlers(self) -> None:
        concurrency = int(self.metadata["concurrency"])
        # With one connection handlers need not be safe to run side by side, not even beside one that was given up.
        self._turn: Any = _Turns() if concurrency == 1 else contextlib.nullcontext()
        self._workers = _Workers(concurrency)  # those of sockets

    def http(self, handler: _Handler) -> _Handler:
        """Decorator: `handler(request)` answers the HTTP requests.

        It returns a Response or what can be the body of one, or a pair (status, body). An HTTPError it raises is the
        answer; any other exception is logged and answered with 500. In the middle of a stream, when it is too late for
        that, the host cuts the answer short, and the connection serves the next request.

        An application is such a handler too: `plugin.http(plugrack.wsgi(app))`.
        """
        self._handle_http = handler
        return handler

    def websocket(self, handler: _Handler) -> _Handler:
        """Decorator: `handler(socket, message)` gets each message of a client, text as str and binary as bytes.

        An exception is logged, and the socket is closed with 1011. `SocketClosed` for the socket itself may pass.

        `plugin.websocket(plugrack.asgi(app))` gives all sockets to an application, which then opens and closes them too. An
        object that `asgi` has returned may be the handler for HTTP as well.
        """
        if isinstance(handler, _ASGI):
            self._speak_websocket(application=handler)
        else:
            self._speak_websocket(message=handler)
        return handler

    def websocket_open(self, handler: _Handler) -> _Handler:
        """Decorator: `handler(socket)` decides on a new socket. Without such a handler all are accepted.

        If it returns None, the socket is accepted. Anything else is an answer, as that of an `http` handler, by which the
        socket is refused: with a status of 300 to 599, as in `return 403, "members only"`. HTTPError does the same. The
        handler may set `socket.protocol`. What it sends goes out when the socket is accepted, which is when it returns. One
        that sends more than there is credit for accepts the socket by that. An exception refuses it with 500.
        """
        self._speak_websocket(open=handler)
        return handler

    def websocket_close(self, handler: _Handler) -> _Handler:
        """Decorator: `handler(socket, code, reason)` is called once for each socket that was accepted, after its last message.

        `code` is None if the client gave none. 1006 says that the client, or the host, has gone without a word.
        """
        self._speak_websocket(close=handler)
        return handler

    def _speak_websocket(self, application: Optional[_ASGI] = None, **handlers: Callable[..., Any]) -> None:
        self._socket_handlers.update(handlers)
        self._socket_application = application or self._socket_application
        if self._socket_application and self._socket_handlers:
            raise ValueError("an ASGI application handles sockets by itself: the plugin can have no other handler for them")
        speaks = self.metadata.get("speaks", [])
        if "websocket" not in speaks:
            self.metadata["speaks"] = [*speaks, "websocket"]
        if handlers and self._memory is not None:
            self.metadata["concurrency"] = _default_concurrency(self._memory, threads=2)
            self._prepare_handlers()

    @property
    def sockets(self) -> List[WebSocket]:
        """The sockets that are open now, the oldest first."""
        with self._sockets_lock:
            return list(self._open_sockets)

    def broadcast(self, message: Union[str, bytes], to: Optional[Iterable[WebSocket]] = None) -> int:
        """Send a message to all open sockets, or to these, and wait for none. Returns to how many it was sent.

        A socket without credit, since its client reads too slowly, is closed with 1013: the client connects again, in place
        of missing a message without knowing.
        """
        body, is_text = _payload(message)
        return sum(each._send_or_close(body, is_text) for each in (self.sockets if to is None else to))

    def init(self, handler: _Handler) -> _Handler:
        """Decorator: `handler(context)` is called once before any request; the host gives it 10 s.

        Refuse, where it is raised, tells the host not to try again; after any other exception it does.
        """
        self._handle_init = handler
        return handler

    def kv(self, handler: _Handler) -> _Handler:
        """Decorator: `handler(op, key, value)` performs the operator's reads and writes of the plugin's keys.

        `op` is "get", "set" or "delete"; `value` is b"" but for "set". It returns for "get" an Entry, bytes, text or
        None (not there), for "set" the revision or None, for "delete" whether the key was there; or it raises Error.
        Without such a handler the operations are performed in the plugin's store.
        """
        self._handle_kv = handler
        return handler

    def _know_socket(self, accepted: WebSocket) -> None:
        with self._sockets_lock:
            self._open_sockets[accepted] = None

    def _forget_socket(self, closed: WebSocket) -> None:
        with self._sockets_lock:
            self._open_sockets.pop(closed, None)

    def run(self) -> NoReturn:
        """Be the plugin: print the metadata if called with `--metadata`, else serve until the host shuts it down.

        Exits 0 after that, 78 when `init` or the licence refused (75 while the clock is not set), 1 when `init` failed,
        64 when not started by a host. SIGTERM has its default action: the process ends at once, by the signal.
        """
        for stream in (sys.stdout, sys.stderr):  # the log is read line by line, and in UTF-8 whatever the locale
            stream.reconfigure(  # type: ignore[union-attr]
                encoding="utf-8", errors="backslashreplace", line_buffering=True)
        if "--metadata" in sys.argv[1:]:
            print(_to_json(self.metadata))
            sys.exit(0)
        path = os.environ.get("PLUGRACK_SOCKET")
        if not path:
            print(f"{self.metadata['name']} is a plugin: plugrack starts it, with PLUGRACK_SOCKET set "
                  "(--metadata prints what it is).", file=sys.stderr)
            sys.exit(_EXIT_USAGE)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()
        # A daemon, and the listener is not closed under it: nothing can wake it when the last connection has ended.
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        self._ended.wait()
        if self._exit_code == 0:
            with self._changed:
                self._changed.wait_for(lambda: self._abandoned == 0, _ABANDONED_TIME)
            deadline = time.monotonic() + _LIFESPAN_TIME
            for application in _applications:
                application.stop(deadline)
        sys.exit(self._exit_code)

    def _accept(self, listener: socket.socket) -> None:
        """Accept connections, and notice when the host closes one whose thread is busy in a handler."""
        try:
            self._poll = select.epoll()
            self._listener = listener.fileno()
            self._poll.register(self._listener, select.EPOLLIN)
            timeout: Optional[float] = None
            while True:
                events = dict(self._poll.poll(timeout))
                came = events.pop(self._listener, None) is not None
                # Before accepting: a new connection may get the file descriptor of one that has ended.
                self._notice_ends(events)
                timeout = self._check_capacity(waited=not events and not came)
                if came and not self._at_limit:
                    self._accept_one(listener)
        except BaseException:
            # A plugin that accepts no connection must not seem to run: the host starts another.
            _log.exception("no more connections can be accepted")
            self._end(1)

    def _accept_one(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno not in _SHORTAGES:
                raise
            # The connection waits in the listener's queue meanwhile, unless its peer has gone.
            self._shortage.error("cannot accept a connection, and tries again: %s", error or "out of memory")
            time.sleep(_SHORTAGE_PAUSE)
            return
        deadline = time.monotonic() + _THREAD_TIME
        while not self._serve_on_thread(sock):
            if time.monotonic() >= deadline:
                sock.close()
                return
            time.sleep(_SHORTAGE_PAUSE)

    def _serve_on_thread(self, sock: socket.socket) -> bool:
        """Serve a connection on a thread of its own; returns whether there is one."""
        number = sock.fileno()
        try:
            wire = _Wire(sock)
            with self._changed:
                self._connections[number] = wire
                if self.stopping.is_set():
                    wire.cancelled.set()
            self._watch(number)
            threading.Thread(target=self._serve, args=(wire,), daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            self._shortage.error("cannot start a thread for a connection, and tries again (a smaller concurrency needs "
                                 "fewer): %s", error or "out of memory")
            with self._changed:
                self._connections.pop(number, None)
            return False
        return True

    def _watch(self, number: int) -> None:
        """Have `_accept` notice when the host closes a connection. With no event requested epoll still reports EPOLLHUP."""
        try:
            if self._poll:
                self._poll.register(number, select.EPOLLONESHOT)
        except OSError:
            pass  # registered by an earlier try, or out of memory: then the handler notices when it reads or writes

    def _notice_ends(self, numbers: Iterable[int]) -> None:
        with self._changed:
            for number in numbers:
                wire = self._connections.get(number)
                if wire and not wire.ended:
                    wire.ended = True
                    self._abandoned += 1
                    wire.cancelled.set()
                    on_end = wire.on_end
                    if on_end:
                        on_end()
        self._end_if_stopped()

    def _connection_ended(self, wire: _Wire) -> None:
        wire.flush_last()
        with self._changed:
            del self._connections[wire.fileno()]
            wire.close()
            if wire.ended:
                self._abandoned -= 1
            if self._at_limit and self._poll:
                self._at_limit = False
                self._poll.modify(self._listener, select.EPOLLIN)
            self._changed.notify_all()
        self._end_if_stopped()

    def _check_capacity(self, waited: bool) -> Optional[float]:
        """Stop accepting while abandoned handlers bring the connections to twice `concurrency`; start again below that.

        Returns the time until the log is to say so, None if there is nothing to say or it has been said.
        """
        concurrency = int(self.metadata["concurrency"])
        limit = 2 * concurrency
        with self._changed:
            # The connection for WebSockets counts only while handlers still run for one that has ended.
            counted = [wire for wire in self._connections.values() if wire.ended or not wire.carries_sockets]
            abandoned = self._abandoned
            is_new = not self._at_limit
            self._at_limit = len(counted) >= limit and len(counted) - abandoned < concurrency
            if not self._at_limit:
                return None
            if is_new and self._poll:
                self._poll.modify(self._listener, 0)
        if not waited:
            return _ABANDONED_PATIENCE
        self._overload.error(
            "no connection is accepted until a handler ends: %s handlers still run for requests that the host has given up, "
            f"and at most {limit} handlers run at once; handlers that wait should use request.cancelled.wait", abandoned)
        return None

    def _stop(self) -> None:
        self.stopping.set()
        with self._changed:
            for wire in self._connections.values():
                wire.cancelled.set()
        for each in self.sockets:
            each._wake()

    def _end_if_stopped(self) -> None:
        with self._changed:
            live = len(self._connections) - self._abandoned
        if live == 0 and self.stopping.is_set():
            self._end(0)

    def _end(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._ended.set()

    def _serve(self, wire: _Wire) -> None:
        """One connection, from its first message to its end."""
        try:
            while self._serve_message(wire, *wire.read()):
                pass
        except Disconnected:
            pass
        except _ProtocolError as error:
            _log.error("the host broke the protocol, so the connection is closed: %s", error)
        except Exception:
            _log.exception("the connection is closed, and the answer under way is cut")
        finally:
            self._connection_ended(wire)

    def _serve_message(self, wire: _Wire, head: Dict[str, Any], body: bytes) -> bool:
        """Handle one message; returns whether the connection goes on."""
        kind, number = head["type"], head["id"]
        is_first, wire.is_new = wire.is_new, False
        if (kind == "init") == self._ready:
            raise _ProtocolError(f"{kind} is out of place")
        if kind == "http":
            self._serve_http(wire, Request(wire, head, body))
        elif kind == "ping":
            wire.send({"type": "pong", "id": number})
        elif kind == "kv":
            self._serve_kv(wire, head, body)
        elif kind == "init":
            return self._serve_init(wire, head)
        elif kind == "shutdown":
            self._stop()
            return False
        elif kind == "ws_open" and is_first and "websocket" in self.metadata.get("speaks", ()):
            self._serve_sockets(wire, head)
            return False
        else:
            raise _ProtocolError(f"a message of type {kind!r}")
        return True

    def _serve_init(self, wire: _Wire, head: Dict[str, Any]) -> bool:
        try:
            head["protocol"] = _whole(head.get("protocol"))
            told = [head.get(name) for name in Context._fields[:-1]]  # `granted` is not for the host to say
            self.context = self._licensed(Context._make([*told, None]))
            self._handle_init(self.context)
            for application in _applications:
                application.start()
        except Exception as error:
            if isinstance(error, Refuse):
                _log.error("%s", error)
                reply, exit_code = _error_head(head["id"], error.code, str(error)), error.exit_code
            else:
                _log.exception("the plugin cannot start")
                reply, exit_code = _error_head(head["id"], "internal", f"{type(error).__name__}: {error}"), 1
            wire.send(reply)
            wire.flush()
            self._end(exit_code)
            return False
        self._ready = True
        wire.send({"type": "ready", "id": head["id"]})
        return True

    def _serve_sockets(self, wire: _Wire, head: Dict[str, Any]) -> None:
        with self._changed:
            wire.carries_sockets = True
        if self._socket_application:
            self._socket_application.start()
        else:
            try:
                self._workers.start_one()
            except (RuntimeError, MemoryError) as error:
                self._shortage.error("cannot start a thread for WebSockets, and closes their connection: %s",
                                     error or "out of memory")
                return
        _Sockets(self, wire).serve(head)

    def _licensed(self, context: Context) -> Context:
        if self._license_keys is None:
            return context
        return context._replace(granted=verify_license(
            context.license, self._license_keys, self.metadata["id"], context.instance_id, self._release_date,
            not_before_time=context.not_before_time))

    def _serve_http(self, wire: _Wire, request: Request) -> None:
        try:
            with self._turn:
                result = self._handle_http(request)
                if isinstance(result, _ByApplication):
                    self._serve_by_application(wire, request, result)
                    return
            response, first, parts = _begin(result, request.method)
        except (Disconnected, _ProtocolError):
            raise
        except HTTPError as error:
            response, first, parts = _begin((error.status, f"{error}\n"), request.method)
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            response, first, parts = _begin((500, "internal error\n"), request.method)
        head = {"type": "response", "id": request._id, "status": response.status, "headers": response.headers}
        ended = False
        try:
            if parts is None:
                head["more"] = False
                wire.send(head, first[0])
                ended = True
                request._drop_rest()
                return
            with closing(parts):
                if first[1] and isinstance(response.body, bytes) and response.headers.get("content-length") is None:
                    response.headers.append(("content-length", str(len(response.body))))
                for part, more in itertools.chain((first,), parts):
                    head["more"] = more
                    wire.send(head, part)
                    ended = not more
                    if head["type"] == "response":
                        # Now, not at the end: the host reads on in the answer only when it is rid of the request's body.
                        request._drop_rest()
                        head = {"type": "data", "id": request._id}
                    if more:
                        wire.flush()
                        if wire.shutdown_waits():
                            self._stop()
        except (Disconnected, _ProtocolError):
            raise
        except Exception as error:
            _log.exception("%s %s failed in its answer", request.method, request.path)
            if not ended:
                code = error.code if isinstance(error, Error) and _is_code(error.code) else "internal"
                wire.send(_error_head(request._id, code, f"{type(error).__name__}: {error}"))
                request._drop_rest()

    def _serve_by_application(self, wire: _Wire, request: Request, application: _ByApplication) -> None:
        answer = _Answer(self, wire, request)
        try:
            application.serve(request, answer)
        except (Disconnected, _ProtocolError):
            raise
        except Exception as error:
            _log.exception("%s %s failed%s", request.method, request.path,
                           " after its answer" if answer.ended else " in its answer" if answer.begun else "")
            if not answer.begun:
                answer.begin(500, [("content-type", "text/plain; charset=utf-8")])
                answer.send(b"internal error\n", False)
            elif not answer.ended:
                wire.send(_error_head(request._id, "internal", f"{type(error).__name__}: {error}"))

    def _serve_kv(self, wire: _Wire, head: Dict[str, Any], value: bytes) -> None:
        reply, body = {"type": "result", "id": head["id"]}, b""
        try:
            op, key = head.get("op"), head.get("key")
            if op not in ("get", "set", "delete") or not isinstance(key, str):
                raise Error("bad_request", "kv takes get, set or delete, and a key")
            with self._turn:
                result = self._handle_kv(op, key, value)
            if op == "delete":
                reply["found"] = bool(result)
            elif op == "set":
                reply.update(_fields(rev=result))
            else:
                reply["found"] = result is not None
                if isinstance(result, Entry):
                    reply.update(_fields(rev=result.rev, expires_in_ms=result.expires_in_ms))
                    result = result.value
                body = _bytes(result or b"")
        except Error as error:
            reply = _error_head(head["id"], error.code, error.message)
        except Exception:
            _log.exception("kv %s failed", head.get("op"))
            reply = _error_head(head["id"], "internal", "the plugin failed; its log has the reason")
        wire.send(reply, body)

    def _kv_in_store(self, op: str, key: str, value: bytes) -> Union[Entry, int, bool, None]:
        if op == "get":
            return self.store.get_entry(key)
        if op == "set":
            return self.store.set(key, value)
        return self.store.delete(key)


# ---- Applications ----------------------------------------------------------------------------------------------------

class _Answer:
    """The answer to one request, which an application sends piece by piece, all from the thread of the request."""

    def __init__(self, plugin: Plugin, wire: _Wire, request: Request) -> None:
        self.begun = False  # whether the head has been sent
        self.ended = False  # whether the last piece has been sent
        self.cut = False  # whether it ended before the application's last piece, since the answer has no body
        self._plugin = plugin
        self._wire = wire
        self._request = request
        self._head: Dict[str, Any] = {}

    def begin(self, status: int, headers: List[Tuple[str, str]]) -> None:
        """Set the head, which is sent with the first piece."""
        self._head = {"type": "response", "id": self._request._id, "status": status, "headers": Headers(headers)}

    def send(self, piece: bytes, more: bool) -> None:
        """Send a piece of the body; it is on its way when this returns."""
        if self.begun:
            self._send(piece, more)
        elif self._head["status"] in (204, 304):
            self.cut = more
            self._send(b"", False)
        elif self._request.method == "HEAD" and more:
            self.cut = True
            self._send(b"", True)  # as a stream, whose length is not 0 but unknown
            self._send(b"", False)
        else:
            self._send(piece, more)

    def flush(self) -> None:
        self._wire.flush()

    def _send(self, piece: bytes, more: bool) -> None:
        if not self.begun and not more and len(piece) > _MAX_BODY and self._head["headers"].get("content-length") is None:
            self._head["headers"].append(("content-length", str(len(piece))))
        for part, goes_on in _split(piece, more):
            self._head["more"] = goes_on
            self._wire.send(self._head, part)
            self.ended = not goes_on
            if not self.begun:
                self.begun = True
                self._request._drop_rest()
                self._head = {"type": "data", "id": self._request._id}
            if goes_on:
                self._wire.flush()
                if self._wire.shutdown_waits():
                    self._plugin._stop()


class _ByApplication:
    """What a handler returns where an application is to answer the request: `serve(request, answer)` does."""

    def __init__(self, serve: Callable[[Request, _Answer], None]) -> None:
        self.serve = serve


def _authority(request: Union[Request, WebSocket]) -> Tuple[str, str, int]:
    """Scheme, name and port by which the client has called the server."""
    scheme = request.headers.get("x-forwarded-proto") or "http"
    try:
        parts = urlsplit("//" + (request.headers.get("host") or ""))
        name, port = parts.hostname, parts.port
    except ValueError:
        name = port = None
    return scheme, name or "localhost", port or (443 if scheme == "https" else 80)


# ---- WSGI ------------------------------------------------------------------------------------------------------------

def wsgi(app: Callable[..., Iterable[bytes]]) -> Callable[[Request], Any]:
    """A handler that answers with a WSGI application (PEP 3333), such as one of Flask or Django.

        plugin.http(plugrack.wsgi(app))

    A handler may also call it for some requests, and answer others by itself. The application is called in the threads of the
    plugin, `concurrency` of them side by side. SCRIPT_NAME is the plugin's route. `environ["plugrack.request"]` is the Request,
    whose `cancelled` tells when the client has gone. A body that comes in several frames must be read before the first piece
    of the answer: the rest is dropped then.
    """
    def serve(request: Request, answer: _Answer) -> None:
        _WSGICall(request, answer).run(app)

    return lambda request: _ByApplication(serve)


class _WSGICall:
    """One call of a WSGI application."""

    def __init__(self, request: Request, answer: _Answer) -> None:
        self._request = request
        self._answer = answer
        self._started = False
        self._left: Optional[int] = None  # bytes that the content-length says are to come

    def run(self, app: Callable[..., Iterable[bytes]]) -> None:
        answer = self._answer
        pieces = app(_environ(self._request), self._start_response)
        try:
            # The one piece of such a body is the last one.
            single = isinstance(pieces, (list, tuple)) and len(pieces) == 1
            for piece in pieces:
                self._send(piece, single)
                if answer.cut:
                    break
                if answer.ended and not single:
                    answer.flush()  # the application may take its time from here on
            if not answer.ended:
                if not self._started:
                    raise RuntimeError("the application did not call start_response")
                answer.send(b"", False)
            if hasattr(pieces, "close"):
                answer.flush()
        finally:
            close = getattr(pieces, "close", None)
            if close:
                close()

    def _start_response(self, status: str, headers: List[Tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        if exc_info:
            try:
                if self._answer.begun:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # no circle of the traceback and this frame
        elif self._started:
            raise RuntimeError("start_response was called again without exc_info")
        if not isinstance(status, str) or not re.fullmatch(r"[2-5][0-9]{2}( .*)?", status):
            raise ValueError(f"the status must be a string such as '200 OK', got {status!r}")
        left = None
        for name, value in headers:
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"a header must be a pair of strings, got {(name, value)!r}")
            value.encode("latin-1")
            if name.lower() == "content-length":
                left = int(value)
        self._left = left
        self._answer.begin(int(status[:3]), list(headers))
        self._started = True
        return lambda data: self._send(data, False)

    def _send(self, piece: bytes, last: bool) -> None:
        if not isinstance(piece, bytes):
            raise TypeError(f"a body must be of bytes, got {type(piece).__name__}")
        if not piece or self._answer.cut:
            return  # the head goes out with the first byte of the body
        if not self._started:
            raise RuntimeError("the application did not call start_response before its answer")
        if self._left is not None:
            if len(piece) > self._left:
                raise ValueError("the body is longer than its content-length")
            self._left -= len(piece)
            last = self._left == 0
        self._answer.send(piece, not last)


def _environ(request: Request) -> Dict[str, Any]:
    scheme, name, port = _authority(request)
    environ: Dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": request.mount.rstrip("/"),
        "PATH_INFO": unquote_to_bytes(request.path).decode("latin-1"),
        "QUERY_STRING": request.query or "",
        "SERVER_NAME": name,
        "SERVER_PORT": str(port),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": request.remote,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.input": io.BufferedReader(_WSGIInput(request)),
        "wsgi.input_terminated": True,  # it ends with the body, also where there is no CONTENT_LENGTH
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "plugrack.request": request,
    }
    for name, value in request.headers:
        if "_" in name:
            continue  # it would pass for the header with a hyphen in its place
        key = name.upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = "HTTP_" + key
        if key in environ:
            value = environ[key] + ("; " if key == "HTTP_COOKIE" else ",") + value
        environ[key] = value
    if request._unread and not request._more:
        environ.setdefault("CONTENT_LENGTH", str(len(request._unread)))  # of a chunked body that is all there
    return environ


class _WSGIInput(io.RawIOBase):
    """The body of a request as a file."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._request.read(len(buffer))
        buffer[:len(piece)] = piece
        return len(piece)


# ---- ASGI ------------------------------------------------------------------------------------------------------------
# asyncio takes a twentieth of a second to import, so only a plugin with such an application does, once it starts.

_Message = MutableMapping[str, Any]
_ASGIApp = Callable[[_Message, Callable[[], Awaitable[_Message]], Callable[[_Message], Awaitable[None]]], Awaitable[None]]

_PLAIN_TEXT = [("content-type", "text/plain; charset=utf-8")]
_TOO_MANY_CALLS = b"too many requests are still being worked on\n"

_applications: List[_ASGI] = []  # those of the process, which start and stop with the plugin


def asgi(app: _ASGIApp) -> Callable[[Request], Any]:
    """A handler that answers with an ASGI 3 application, such as one of Starlette, FastAPI or Django.

        site = plugrack.asgi(app)
        plugin.http(site)
        plugin.websocket(site)  # if the application has WebSockets

    A handler may also call it for some requests, and answer others by itself. The application runs on one event loop, in a
    thread of its own. Its lifespan starts after the `init` handler and before the first request: where it fails, the plugin
    does not start. Its shutdown has 1.5 s. `root_path` is the plugin's route. A body that comes in several frames must be read
    before the first piece of the answer: `receive` gives `http.disconnect` from then on.

    Calls for WebSockets run on the same loop, beside each other and beside requests whatever the plugin's `concurrency` is.
    `send` waits while the client reads slowly, and raises SocketClosed, which is an OSError, once the socket is closed. The
    extension `websocket.http.response` refuses a socket with an answer, of at most 1 MiB.
    """
    bridge = _ASGI(app)
    _applications.append(bridge)
    return bridge


class _ASGI:
    """An ASGI application, its event loop and its lifespan."""

    def __init__(self, app: _ASGIApp) -> None:
        self._app = app
        self._starting = threading.Lock()
        self._thread: Optional[threading.Thread] = None
        self._outcome: queue.SimpleQueue[Optional[BaseException]] = queue.SimpleQueue()  # of the start
        self._state: Dict[str, Any] = {}  # what the lifespan leaves for the requests
        self._tasks: Set[asyncio.Task[None]] = set()  # the calls, but not those whose sockets are open
        # Made on the loop's thread.
        self.loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event

    def __call__(self, request: Request) -> _ByApplication:
        return _ByApplication(self.serve)

    def start(self) -> None:
        """Start the application unless it runs. Raises what keeps it from that.

        The host's time for the start is the limit.
        """
        with self._starting:
            if self._thread:
                return
            self._thread = threading.Thread(target=self._run_loop, name="asgi", daemon=True)
            self._thread.start()
            error = self._outcome.get()
            if error:
                self._thread = None
                raise error

    def stop(self, deadline: float) -> None:
        """Shut the application down."""
        if self._thread:
            self.call(lambda: self._stopping.set())
            self._thread.join(max(deadline - time.monotonic(), 0))
            if self._thread.is_alive():
                _log.error("the application's shutdown took more than %s s and is cut short", _LIFESPAN_TIME)

    def call(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Call it on the loop, unless that has ended."""
        try:
            self.loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            pass

    def serve(self, request: Request, answer: _Answer) -> None:
        self.start()
        if len(self._tasks) >= _MAX_CALLS:
            answer.begin(503, [*_PLAIN_TEXT, ("retry-after", "1")])
            answer.send(_TOO_MANY_CALLS, False)
            return
        call = _ASGICall(self, request, dict(self._state))
        wire = request._wire
        wire.on_end = lambda: self.call(call.end)
        try:
            self.call(self._begin, call)
            if wire.ended:  # before it was watched
                self.call(call.end)
            call.serve(answer)
        finally:
            wire.on_end = None

    def _begin(self, call: _ASGICall) -> None:
        call.enter()
        self.count(self.loop.create_task(call.run(self._app)))

    def count(self, task: asyncio.Task[None]) -> None:
        """Count a call until it is done. On the loop."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def begin_socket(self, call: _ASGISocketCall) -> None:
        """Call the application for a socket. On the loop."""
        if len(self._tasks) >= _MAX_CALLS:
            call.enter(None)
            call.refuse(503, [*_PLAIN_TEXT, ("retry-after", "1")], _TOO_MANY_CALLS)
        else:
            call.enter(self.loop.create_task(call.run(self._app, dict(self._state))))

    def _run_loop(self) -> None:
        import asyncio
        try:
            asyncio.run(self._main())
        except BaseException:
            # A plugin whose application cannot run must not seem to: the host starts another.
            _log.exception("the event loop of the application has failed")
            os._exit(1)

    async def _main(self) -> None:
        import asyncio
        self.loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        events: asyncio.Queue[_Message] = asyncio.Queue()
        started: asyncio.Future[Optional[str]] = self.loop.create_future()

        async def send(message: _Message) -> None:
            kind = message["type"]
            if kind == "lifespan.startup.complete":
                started.set_result(None)
            elif kind == "lifespan.startup.failed":
                started.set_result(message.get("message") or "the application's startup failed")
            elif kind == "lifespan.shutdown.failed":
                _log.error("the application's shutdown failed: %s", message.get("message", ""))
            elif kind != "lifespan.shutdown.complete":
                raise ValueError(f"a lifespan has no message {kind!r}")

        async def lifespan() -> None:
            await self._app({"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self._state},
                            events.get, send)

        events.put_nowait({"type": "lifespan.startup"})
        task = self.loop.create_task(lifespan())
        either: List[asyncio.Future[Any]] = [task, started]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        message = started.result() if started.done() else None
        if message:
            # As a rule it goes on with the error itself, which says more.
            await asyncio.wait([task], timeout=_LIFESPAN_TIME)
        error = task.exception() if task.done() and not task.cancelled() else None
        if message or isinstance(error, Refuse):
            self._outcome.put(error or RuntimeError(message))
            return
        if not started.done():
            _log.warning("the application takes no part in the lifespan protocol, and runs without: %s", error or "it returned")
        self._outcome.put(None)
        await self._stopping.wait()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_BACKGROUND_TIME)
        if not task.done():
            events.put_nowait({"type": "lifespan.shutdown"})
            await asyncio.wait([task])  # at most for as long as `stop` does
            if not task.cancelled() and task.exception():
                _log.error("the application's shutdown failed", exc_info=task.exception())


class _ASGICall:
    """One call of an ASGI application: a task on the loop, and the thread of the request, which sends the answer.

    One of the two reads from the connection at a time: the loop up to the first piece of the answer, then the thread.
    """

    def __init__(self, bridge: _ASGI, request: Request, state: Dict[str, Any]) -> None:
        self._bridge = bridge
        self._request = request
        self._wire = request._wire
        self._state = state
        # What the thread is to send: a piece, whether more follow, and what is to be told once it is sent. None at the end.
        self._pieces: queue.SimpleQueue[Optional[Tuple[bytes, bool, Optional[asyncio.Future[None]]]]] = queue.SimpleQueue()
        self._head: Optional[Tuple[int, List[Tuple[str, str]]]] = None
        self._complete = False  # whether the application has sent its last piece
        self._failure: Optional[BaseException] = None  # by which the application has ended
        self._broken: Optional[Exception] = None  # by which the connection has
        self._first = True  # whether the piece that came with the request is still to be received
        self._reading = request._more  # whether frames of the body are still to be received
        self._waiter: Optional[asyncio.Future[None]] = None  # for the connection to be readable
        # Made on the loop's thread.
        self._over: asyncio.Event  # nothing more can be sent: the answer is complete, or the client has gone
        self._receiving: asyncio.Lock

    # In the thread of the request.

    def serve(self, answer: _Answer) -> None:
        """Send what the application does, up to its last piece. It may go on after that."""
        error: Optional[Exception] = None
        for piece, more, sent in iter(self._pieces.get, None):
            try:
                if not error:
                    if not answer.begun and self._head:
                        answer.begin(*self._head)
                    answer.send(piece, more)
            except Exception as failed:
                error = failed
            if error or answer.cut:
                self._bridge.call(self.end)
            if sent:
                self._bridge.call(_settle, sent)
            if answer.ended or not more:
                break
        error = error or self._broken
        failure = self._failure
        try:
            if error:
                raise error
            if answer.ended:
                return
            if failure is None:
                raise RuntimeError("the application returned before its answer was complete")
            if _is_by_disconnect(failure):
                raise Disconnected("the client has gone")
            if isinstance(failure, Exception):
                raise failure
            raise RuntimeError(f"the application ended by {type(failure).__name__}") from failure
        finally:
            self._failure = failure = error = None  # no circle of a traceback and this frame: it would keep generators open

    # On the loop.

    def enter(self) -> None:
        import asyncio
        self._over = asyncio.Event()
        self._receiving = asyncio.Lock()

    async def run(self, app: _ASGIApp) -> None:
        try:
            scope = {"type": "http", "method": self._request.method.upper(), **_scope(self._request, self._state)}
            await app(scope, self._receive, self._send)
        except BaseException as error:  # also SystemExit, which would end the loop
            self._failure = error
        if self._complete:
            if self._failure and not _is_by_disconnect(self._failure):
                _log.error("%s %s failed after its answer", self._request.method, self._request.path, exc_info=self._failure)
            self._failure = None
        self._stop_reading()
        self.end()
        self._pieces.put(None)

    def end(self) -> None:
        self._over.set()
        self._wake()

    async def _receive(self) -> _Message:
        async with self._receiving:
            try:
                piece = await self._next_piece()
            except (Disconnected, _ProtocolError) as error:
                self._broken = error
                piece = None
                self.end()
            if piece is not None:
                return {"type": "http.request", "body": piece, "more_body": self._reading}
            await self._over.wait()
            return {"type": "http.disconnect"}

    async def _next_piece(self) -> Optional[bytes]:
        """The next piece of the body; None where nothing more can be received."""
        request = self._request
        if self._first and not self._over.is_set():
            self._first = False
            if request._unread or not request._more:
                return request._unread
        while self._reading and not self._over.is_set():
            if self._wire.has_frame():
                piece = request._next()
                self._reading = request._more
                if request._aborted:
                    self.end()
                    return None
                return piece
            await self._readable()
        return None

    async def _readable(self) -> None:
        self._waiter = self._bridge.loop.create_future()
        self._bridge.loop.add_reader(self._wire.fileno(), self._wake)
        try:
            await self._waiter
        finally:
            self._wake()

    def _wake(self) -> None:
        if self._waiter:
            self._bridge.loop.remove_reader(self._wire.fileno())
            _settle(self._waiter)
            self._waiter = None

    def _stop_reading(self) -> None:
        """Leave the connection to the thread of the request."""
        self._reading = False
        self._wake()

    async def _send(self, message: _Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            if self._head:
                raise RuntimeError("http.response.start was sent twice")
            self._head = int(message["status"]), _decode_headers(message)
        elif kind != "http.response.body":
            raise ValueError(f"an http response has no message {kind!r}")
        elif not self._head:
            raise RuntimeError("http.response.body was sent before http.response.start")
        elif self._complete:
            raise RuntimeError("http.response.body was sent after the last one")
        elif self._over.is_set():
            raise Disconnected("the client has gone")
        else:
            self._stop_reading()
            piece, more = bytes(message.get("body", b"")), bool(message.get("more_body", False))
            sent = self._bridge.loop.create_future() if more else None
            self._complete = not more
            self._pieces.put((piece, more, sent))
            if sent:
                await sent
            else:
                self.end()


class _ASGISocketCall:
    """One call of an ASGI application for a WebSocket: a task on the loop, which the connection's thread tells what comes."""

    def __init__(self, bridge: _ASGI, owner: WebSocket) -> None:
        self._bridge = bridge
        self._socket = owner
        self._connected = False  # whether the application has received websocket.connect
        self._refused = False
        self._refusal: Optional[Tuple[int, List[Tuple[str, str]]]] = None  # the head of an answer that refuses the socket
        self._refusal_body = bytearray()
        self._events: Deque[Tuple[_Message, int]] = collections.deque()  # each with the credit that it takes, which bounds them
        # Made on the loop's thread.
        self._came: asyncio.Event  # an event
        self._room: asyncio.Event  # credit, or the end of the socket
        self._task: Optional[asyncio.Task[None]]

    # In the thread that reads the connection; `writable` in any.

    def opened(self) -> None:
        self._bridge.call(self._bridge.begin_socket, self)

    def received(self, message: Union[str, bytes], size: int) -> None:
        data, text = (None, message) if isinstance(message, str) else (message, None)
        self._bridge.call(self._add, {"type": "websocket.receive", "bytes": data, "text": text}, size)

    def closed(self, code: Optional[int], reason: str) -> None:
        self._bridge.call(self._end, 1005 if code is None else code, reason)  # 1005 stands for no code

    def writable(self) -> None:
        self._bridge.call(lambda: self._room.set())

    # On the loop.

    def enter(self, task: Optional[asyncio.Task[None]]) -> None:
        import asyncio
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._task = task

    def refuse(self, status: int, headers: List[Tuple[str, str]], body: bytes) -> None:
        self._socket._refuse(status, headers, body)
        self._refused = True
        self._end(1006, "")

    async def run(self, app: _ASGIApp, state: Dict[str, Any]) -> None:
        import asyncio
        failure: Optional[BaseException] = None
        try:
            await app(self._scope(state), self._receive, self._send)
        except BaseException as error:  # also SystemExit, which would end the loop
            failure = error
        answered = self._socket._accepted or self._refused
        if not answered and not failure and not self._socket._ended:
            failure = RuntimeError("the application returned before it accepted or closed the socket")
        if failure and not isinstance(failure, asyncio.CancelledError) and not _is_by_disconnect(failure):
            _log.error("the application failed for the WebSocket at %s", self._socket.path, exc_info=failure)
        if answered:
            self._socket.close(1011 if failure else 1000)
        else:
            self.refuse(500, _PLAIN_TEXT, b"internal error\n")
        failure = None  # no circle of a traceback and this frame: it would keep generators open

    def _scope(self, state: Dict[str, Any]) -> _Message:
        scope = _scope(self._socket, state)
        scope["scheme"] = "wss" if scope["scheme"] == "https" else "ws"
        return {"type": "websocket", "subprotocols": list(self._socket.protocols), "extensions": {"websocket.http.response": {}},
                **scope}

    def _add(self, message: _Message, size: int) -> None:
        self._events.append((message, size))
        self._came.set()

    def _end(self, code: int, reason: str) -> None:
        self._add({"type": "websocket.disconnect", "code": code, "reason": reason}, 0)
        if self._task and not self._task.done():
            self._bridge.count(self._task)

    async def _receive(self) -> _Message:
        if not self._connected:
            self._connected = True
            return {"type": "websocket.connect"}
        while not self._events:
            self._came.clear()
            await self._came.wait()
        message, size = self._events[0]
        if message["type"] != "websocket.disconnect":  # which is received again by those who ask again
            self._events.popleft()
            self._socket._return_credit(size)
        return message

    async def _send(self, message: _Message) -> None:
        kind = message["type"]
        owner = self._socket
        if kind == "websocket.send":
            if not owner._accepted:
                raise RuntimeError("websocket.send was sent before websocket.accept")
            text = message.get("text")
            body, is_text = _payload(message["bytes"] if text is None else text)
            while not owner._try_send(body, is_text):
                self._room.clear()
                await self._room.wait()
        elif kind == "websocket.close" and owner._accepted:
            owner.close(message.get("code", 1000), message.get("reason") or "")
        elif owner._accepted or self._refused or self._refusal and kind != "websocket.http.response.body":
            raise RuntimeError(f"{kind} was sent after the answer to the client")
        elif kind == "websocket.accept":
            owner.protocol = message.get("subprotocol")
            owner._accept(_decode_headers(message))
        elif kind == "websocket.close":
            self.refuse(403, _PLAIN_TEXT, b"forbidden\n")
        elif kind == "websocket.http.response.start":
            self._refusal = int(message["status"]), _decode_headers(message)
        elif kind != "websocket.http.response.body":
            raise ValueError(f"a WebSocket has no message {kind!r}")
        elif not self._refusal:
            raise RuntimeError("websocket.http.response.body was sent before websocket.http.response.start")
        else:
            self._refusal_body += message.get("body", b"")
            if len(self._refusal_body) > _MAX_BODY:
                raise ValueError(f"a WebSocket is refused with at most {_MAX_BODY} bytes")
            if not message.get("more_body", False):
                self.refuse(*self._refusal, bytes(self._refusal_body))


def _scope(request: Union[Request, WebSocket], state: Dict[str, Any]) -> _Message:
    """What the scopes of requests and of sockets have in common."""
    scheme, name, port = _authority(request)
    root_path = request.mount.rstrip("/")
    raw_path = root_path + request.path
    return {
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": scheme,
        "path": unquote(raw_path),
        "raw_path": raw_path.encode(),
        "query_string": (request.query or "").encode(),
        "root_path": root_path,
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request.headers],
        "client": (request.remote, 0) if request.remote else None,
        "server": (name, port),
        "state": state,
    }


def _decode_headers(message: _Message) -> List[Tuple[str, str]]:
    return [(bytes(name).decode("latin-1"), bytes(value).decode("latin-1")) for name, value in message.get("headers", ())]


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _is_by_disconnect(error: Optional[BaseException]) -> bool:
    """Whether an application ended because its client had gone."""
    seen: Set[int] = set()
    while error and id(error) not in seen:
        if isinstance(error, (Disconnected, SocketClosed)):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
