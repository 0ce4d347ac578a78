"""The peer of the Python SDK: the same answers as plugin-python, by uWSGI behind nginx."""

MIB = b"m" * (1 << 20)
TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"


def application(environ, start_response):
    path = environ["PATH_INFO"]
    status, kind, body = "200 OK", BYTES, MIB
    if path == "/bench/hello":
        kind, body = TEXT, b"Hello, world!"
    elif path == "/bench/echo":
        body = environ["wsgi.input"].read()
    elif path != "/bench/mib":
        status, kind, body = "404 Not Found", TEXT, b"not found"
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]
