"""WSGI applications as plugins: one that `wsgiref.validate` watches, and one of Flask. The plugins are real processes, as in test_plugrack.py."""

import json
import os
import unittest
from pathlib import Path

import test_plugrack as base

#: The packages from PyPI that `make test-tools` installs.
PACKAGES = Path(os.environ.get("PLUGRACK_TEST_PACKAGES", base.ROOT / "target" / "test-packages"))

APP = r'''
import os, time
from wsgiref.validate import validator
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench", concurrency=CONCURRENCY)
TEXT = [("Content-Type", "text/plain")]

class Pieces:
    """An iterable that tells when it is closed."""
    def __init__(self, pieces, slow=False):
        self.pieces, self.slow = iter(pieces), slow
    def __iter__(self):
        return self
    def __next__(self):
        return next(self.pieces)
    def close(self):
        if self.slow:
            until("release")
        print("closed")

def until(name):
    while not os.path.exists(name):
        time.sleep(0.005)

def environ(environ, start_response):
    start_response("200 OK", TEXT)
    return [plugrack._to_json({name: value for name, value in environ.items() if isinstance(value, (str, bool, tuple))}).encode()]

def lines(environ, start_response):
    body = environ["wsgi.input"]
    parts = [body.read(3), body.readline(), body.readline(4)]
    parts += body.readlines(1)
    parts += body
    parts.append(body.read(1))
    start_response("200 OK", TEXT)
    return [b"|".join(parts)]

def pieces(environ, start_response):
    start_response("200 OK", TEXT)
    return Pieces([b"", b"one", b"", b"two"])

def measured(environ, start_response):
    start_response("200 OK", TEXT + [("content-length", "6")])
    return Pieces([b"one", b"two", b""])

def lazy(environ, start_response):
    start_response("200 OK", TEXT)
    yield environ["wsgi.input"].read(5)
    until("go")
    yield b"later"

def written(environ, start_response):
    write = start_response("200 OK", TEXT)
    write(b"written")
    until("go")
    return [b"returned"]

def slow_close(environ, start_response):
    start_response("200 OK", TEXT + [("content-length", "3")])
    return Pieces([b"one"], slow=True)

def slow_reader(environ, start_response):
    first = environ["wsgi.input"].read(1)
    until("go")
    size = 1
    while True:
        piece = environ["wsgi.input"].read(65536)
        if not piece:
            break
        size += len(piece)
    start_response("200 OK", TEXT)
    return [b"%d" % size]

def early(environ, start_response):
    start_response("413 Too Much", TEXT)
    return [b"enough"]

def empty(environ, start_response):
    start_response("204 No Content", [])
    return Pieces([])

def full_204(environ, start_response):
    start_response("204 No Content", [])
    return Pieces([b"one", b"two"])

def fails(environ, start_response):
    raise ValueError("at once")

def fails_later(environ, start_response):
    start_response("200 OK", TEXT)
    def body():
        yield b"begun"
        raise ValueError("later")
    return Pieces(body())

def replaced(environ, start_response):
    import sys
    start_response("200 OK", TEXT)
    try:
        raise ValueError("replaced")
    except ValueError:
        start_response("503 Sorry", TEXT + [("x-kind", "error")], sys.exc_info())
    return [b"sorry"]

def too_late(environ, start_response):
    import sys
    def body():
        start_response("200 OK", TEXT)
        yield b"begun"
        try:
            raise ValueError("too late")
        except ValueError:
            start_response("503 Sorry", TEXT, sys.exc_info())
        yield b"never"
    return Pieces(body())

def endless(environ, start_response):
    start_response("200 OK", TEXT)
    return Pieces(b"x" * 10000 for _ in iter(int, 1))

def errors(environ, start_response):
    environ["wsgi.errors"].write("for the log\n")
    start_response("200 OK", TEXT)
    return [b""]

VALID = {f.__name__: validator(f) for f in (
    environ, lines, pieces, measured, lazy, written, slow_close, slow_reader, early, fails, fails_later, replaced, too_late,
    endless, errors)}

# What breaks the rules, so that no validator may stand in between.
def twice(environ, start_response):
    start_response("200 OK", TEXT)
    start_response("200 OK", TEXT)

def without_start(environ, start_response):
    return [b"x"]

def bad_status(environ, start_response):
    start_response(200, TEXT)

def bad_header(environ, start_response):
    start_response("200 OK", [("x-number", 5)])

def text(environ, start_response):
    start_response("200 OK", TEXT)
    return ["text"]

def too_long(environ, start_response):
    start_response("200 OK", [("content-length", "2")])
    return [b"one"]

def large(environ, start_response):
    start_response("200 OK", TEXT)
    return [bytes(range(256)) * 4096 * 3 + b"end"]

def leaves(environ, start_response):
    try:
        start_response("200 OK", TEXT)
        yield b"begun"
        print("waiting")
        print("cancelled" if environ["plugrack.request"].cancelled.wait(50) else "not cancelled")
        yield b"more"
    finally:
        print("left")

RAW = {f.__name__: f for f in (twice, without_start, bad_status, bad_header, text, too_long, large, leaves, empty, full_204)}

def app(environ, start_response):
    name = environ["PATH_INFO"].split("/")[1]
    return {**VALID, **RAW}[name](environ, start_response)

site = plugrack.wsgi(app)

@plugin.http
def handle(request):
    if request.path == "/native":
        return "native"
    return site(request)

plugin.run()
'''


class WSGITest(base.TestCase):
    def begin(self, concurrency=8):
        return self.start(APP.replace("CONCURRENCY", str(concurrency)))

    def parts(self, connection, path, **options):
        """The frames of an answer: status, and each body with whether more follow."""
        connection.http(path, **options)
        frames = [connection.receive()]
        while frames[-1][0].get("more"):
            frames.append(connection.receive())
        return frames[0][0]["status"], [(body, head.get("more", False)) for head, body in frames]

    def go(self, process, name="go"):
        (process.directory / name).touch()

    def test_the_environment(self):
        _, connection = self.begin()
        headers = [["content-type", "text/x"], ["content-length", "2"], ["accept", "a"], ["accept", "b"], ["cookie", "a=b"],
                   ["cookie", "c=d"], ["x-forwarded-proto", "https"], ["x_under", "no"], ["x-latin", "\u00e9"]]
        environ = json.loads(connection.get("/environ/caf%C3%A9/a%2Fb", b"hi", method="PUT", headers=headers, query="a=%20b")[1])
        expected = {
            "REQUEST_METHOD": "PUT", "SCRIPT_NAME": "/bench", "PATH_INFO": "/environ/caf\u00c3\u00a9/a/b", "QUERY_STRING": "a=%20b",
            "CONTENT_TYPE": "text/x", "CONTENT_LENGTH": "2", "HTTP_ACCEPT": "a,b", "HTTP_COOKIE": "a=b; c=d",
            "HTTP_X_FORWARDED_PROTO": "https", "HTTP_X_LATIN": "\u00e9", "HTTP_HOST": "example.org", "SERVER_NAME": "example.org",
            "SERVER_PORT": "443", "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "203.0.113.9", "wsgi.url_scheme": "https",
            "wsgi.version": [1, 0], "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
            "wsgi.input_terminated": True}
        self.assertEqual(environ, expected)
        environ = json.loads(connection.get("/environ", body=b"12345")[1])
        self.assertEqual((environ["CONTENT_LENGTH"], environ["SERVER_PORT"], environ["QUERY_STRING"]), ("5", "80", ""))

    def test_the_body_is_read_as_a_file(self):
        _, connection = self.begin()
        connection.http("/lines", b"abcde\nlong", method="POST", more=True)
        connection.send({"type": "data", "id": 7, "more": True}, b" line\nthird\n")
        connection.send({"type": "data", "id": 7}, b"fourth\nlast")
        self.assertEqual(connection.response()[1], b"abc|de\n|long| line\n|third\n|fourth\n|last|")

    def test_a_body_that_is_not_read_holds_up_the_host(self):
        process, connection = self.begin()
        connection.http("/slow_reader", b"x", method="POST", more=True)
        connection.sock.settimeout(0.3)
        frame, sent = base.frame({"type": "data", "id": 7, "more": True}, b"x" * 65536), 0
        rest = b""
        with self.assertRaises(base.socket.timeout):
            for _ in range(1000):
                rest = frame
                while rest:
                    rest = rest[connection.sock.send(rest):]
                sent += 65536
        connection.sock.settimeout(base.PATIENCE)
        self.assertLess(sent, 8 * base.MIB)
        self.go(process)
        connection.write(rest)
        connection.send({"type": "data", "id": 7})
        self.assertEqual(connection.response()[1], b"%d" % (1 + sent + 65536))

    def test_answers_in_as_many_frames_as_they_need(self):
        process, connection = self.begin()
        self.assertEqual(self.parts(connection, "/replaced"), (503, [(b"sorry", True), (b"", False)]))
        self.assertEqual(self.parts(connection, "/pieces"), (200, [(b"one", True), (b"two", True), (b"", False)]))
        self.assertEqual(self.parts(connection, "/measured"), (200, [(b"one", True), (b"two", False)]))
        self.eventually(lambda: process.log().count("closed") == 2)
        self.assertEqual(self.parts(connection, "/errors"), (200, [(b"", False)]))
        self.assertIn("for the log\n", process.log())
        head, body = connection.get("/large")
        self.assertEqual((len(body), dict(head["headers"])["content-length"]), (3 * base.MIB + 3, str(3 * base.MIB + 3)))
        self.assertNotIn("Traceback", process.log())

    def test_a_piece_is_sent_before_the_next_is_made(self):
        for path, first, last in (("/lazy", b"hello", b"later"), ("/written", b"written", b"returned")):
            process, connection = self.begin()
            connection.http(path, b"hello", method="POST")
            head, body = connection.receive()
            self.assertEqual((head["status"], body), (200, first))
            self.go(process)
            self.assertEqual(connection.receive()[1], last)
            process.kill()

    def test_the_answer_is_sent_before_the_iterable_is_closed(self):
        process, connection = self.begin()
        self.assertEqual(self.parts(connection, "/slow_close"), (200, [(b"one", False)]))
        self.assertNotIn("closed", process.log())
        self.go(process, "release")
        self.eventually(lambda: "closed" in process.log())
        self.assert_alive(connection)

    def test_answers_without_a_body(self):
        process, connection = self.begin()
        for path, method, status, frames in (
                ("/empty", "GET", 204, [(b"", False)]), ("/full_204", "GET", 204, [(b"", False)]),
                ("/endless", "HEAD", 200, [(b"", True), (b"", False)]), ("/measured", "HEAD", 200, [(b"", True), (b"", False)]),
                ("/too_long", "HEAD", 500, [(b"internal error\n", False)])):
            self.assertEqual(self.parts(connection, path, method=method), (status, frames), path)
        self.eventually(lambda: process.log().count("closed") == 4)

    def test_a_failure_is_answered_once(self):
        process, connection = self.begin()
        for path, said in (("/fails", "ValueError: at once"), ("/twice", "start_response was called again"),
                           ("/without_start", "did not call start_response"), ("/bad_status", "the status must be"),
                           ("/bad_header", "a header must be"), ("/text", "a body must be of bytes"),
                           ("/too_long", "longer than its content-length")):
            self.assertEqual(self.parts(connection, path), (500, [(b"internal error\n", False)]), path)
            self.assertIn(said, process.log())
        self.assertEqual(process.log().count("Traceback"), 7)
        for path, reason in (("/fails_later", "ValueError: later"), ("/too_late", "ValueError: too late")):
            connection.http(path)
            self.assertEqual(connection.receive()[1], b"begun")
            error, _ = connection.receive()
            self.assertEqual((error["type"], error["id"], error["message"]), ("error", 7, reason))
            self.assert_alive(connection)
        self.eventually(lambda: process.log().count("closed") == 2)

    def test_an_early_answer_drops_the_rest_of_the_body(self):
        _, connection = self.begin()
        connection.http("/early", b"x", method="POST", more=True)
        head, body = connection.receive()
        self.assertEqual((head["status"], body), (413, b"enough"))
        connection.send({"type": "data", "id": 7, "more": True}, b"x" * 1000)
        connection.send({"type": "data", "id": 7, "aborted": True})
        while head["more"]:
            head, _ = connection.receive()
        self.assert_alive(connection)

    def test_a_client_that_goes(self):
        process, connection = self.begin()
        connection.http("/leaves")
        self.assertEqual(connection.receive()[1], b"begun")
        self.eventually(lambda: "waiting" in process.log())
        connection.close()
        self.eventually(lambda: "\ncancelled\nleft\n" in process.log())
        connection = process.connect()
        connection.http("/endless")
        connection.receive()
        connection.close()
        self.eventually(lambda: "closed" in process.log())
        self.assertNotIn("Traceback", process.log())
        self.assert_alive(process.connect())

    def test_one_process_is_a_plugin_and_an_application(self):
        for concurrency in (1, 8):
            _, connection = self.begin(concurrency)
            self.assertEqual(connection.get("/native")[1], b"native")
            self.assertEqual(connection.get("/lines", b"x", method="POST")[1], b"x|||")
            self.assertEqual(connection.get("/native")[1], b"native")


FLASK = r'''
from flask import Flask, Response, redirect, request, session, stream_with_context, url_for
import plugrack

plugin = plugrack.Plugin(id="bench", name="Bench", version="1.0.0", icon="🧪", route="/bench", concurrency=8)
app = Flask(__name__)
app.secret_key = "for a test"

@app.get("/")
def index():
    return f"{url_for('visit')} {request.remote_addr} {request.url}"

@app.get("/visit")
def visit():
    session["visits"] = session.get("visits", 0) + 1
    return redirect(url_for("index")) if "back" in request.args else str(session["visits"])

@app.post("/upload")
def upload():
    file = request.files["file"]
    return {"name": file.filename, "size": len(file.read()), "title": request.form["title"]}

@app.post("/size")
def size():
    return str(len(request.get_data()))

@app.get("/stream/<name>")
def stream(name):
    def pieces():
        for number in range(3):
            yield f"{name} {number} {request.path}\n"
    return Response(stream_with_context(pieces()), content_type="text/plain")

@app.get("/fails")
def fails():
    raise ValueError("in a view")

plugin.http(plugrack.wsgi(app))
plugin.run()
'''


class FlaskTest(base.TestCase):
    python = PACKAGES / "python" / "bin" / "python"

    def test_an_application_of_flask(self):
        process, connection = self.start(FLASK)
        self.assertEqual(connection.get("/")[1], b"/bench/visit 203.0.113.9 http://example.org/bench/")
        head, _ = connection.get("/visit", query="back")
        headers = dict(head["headers"])
        self.assertEqual((head["status"], headers["Location"]), (302, "/bench/"))
        cookie = [["cookie", headers["Set-Cookie"].split(";")[0]]]
        self.assertEqual(connection.get("/visit", headers=cookie)[1], b"2")
        form = b"".join([b'--b\r\ncontent-disposition: form-data; name="title"\r\n\r\ncaf\xc3\xa9\r\n',
                         b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n', b"x" * 200_000, b"\r\n--b--\r\n"])
        connection.http("/upload", form[:65536], method="POST", more=True,
                        headers=[["content-type", "multipart/form-data; boundary=b"], ["content-length", str(len(form))]])
        connection.send({"type": "data", "id": 7}, form[65536:])
        self.assertEqual(json.loads(connection.response()[1]), {"name": "f", "size": 200_000, "title": "caf\u00e9"})
        connection.http("/size", b"x" * 10, method="POST", more=True)  # of no announced length
        connection.send({"type": "data", "id": 7}, b"x" * 10)
        self.assertEqual(connection.response()[1], b"20")
        self.assertEqual(connection.get("/stream/a%20b")[1], b"a b 0 /stream/a b\na b 1 /stream/a b\na b 2 /stream/a b\n")
        head, body = connection.get("/", method="HEAD")
        self.assertEqual((head["status"], dict(head["headers"])["Content-Length"]), (200, "50"))
        self.assertEqual(connection.get("/nowhere")[0]["status"], 404)
        self.assertNotIn("Traceback", process.log())
        self.assertEqual(connection.get("/fails")[0]["status"], 500)
        self.assertIn("ValueError: in a view", process.log())


if __name__ == "__main__":
    unittest.main()
