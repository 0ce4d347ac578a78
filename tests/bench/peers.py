"""The contenders: the host in its several settings, and what else one would put up in its place.

Each peer is set as its own documentation advises for speed: connections to the back kept, buffers large enough that nothing goes
through a file, a worker a core. All serve the same paths below their prefix.
"""

import os
from dataclasses import dataclass, field
from typing import Callable, List, Tuple

import host
import tools
from loads import LOADS, Load, check
from processes import READY_SECONDS, fail, output_of, say, start, tree, wait_for
from sockets import free_port

CORES = len(os.sched_getaffinity(0))
FILES = 16384  # open files, enough for every point; some peers take memory for each that they might open
FASTCGI_THREADS = 1024  # of each process; see fastcgi/main.c


@dataclass
class Contender:
    """One of those that are measured. `front` gives the processes that stand in the host's place, without what they serve from."""

    key: str
    name: str
    port: int
    processes: List
    front: Callable
    prefix: str = "/bench"
    peers: List[str] = field(default_factory=list)  # the keys of those it is set against
    loads: Tuple[Load, ...] = LOADS

    @property
    def process(self):
        return self.processes[0]

    @property
    def is_ours(self):
        return self.key.startswith("plugrack")


class Starter:
    """Starts contenders and what is behind them, each below a directory of its own."""

    def __init__(self, directory, policy, available):
        self.directory, self.policy, self.available = directory, policy, available
        self.skipped = []

    def skip(self, reason):
        say("bench: left out: " + reason)
        self.skipped.append(reason)

    def room(self, name):
        path = os.path.join(self.directory, name)
        os.mkdir(path)
        return path

    def log(self, name):
        return open(os.path.join(self.directory, name + ".log"), "w+b")

    def back(self, name, command, path):
        """A process that listens on a Unix socket."""
        log = self.log(os.path.basename(os.path.dirname(path)))
        process = start(command, log, self.policy)
        if not wait_for(name, process, log, lambda: os.path.exists(path)):
            fail("%s did not start within %d s." % (name, READY_SECONDS))
        return process

    def go_server(self, path):
        return self.back("the server in Go", [tools.build_go("gopeer"), path], path)

    def nginx(self, key, name, location, path=None, back=(), loads=LOADS):
        """nginx with this location, before the process that listens on the socket `path`, if there is one."""
        prefix, port = self.room("nginx-" + key), free_port()
        config = os.path.join(prefix, "nginx.conf")
        with open(config, "w") as file:
            file.write(NGINX % {
                # As root the workers would drop to a user who cannot reach the sockets in this directory.
                "user": "user root;" if os.geteuid() == 0 else "",
                "workers": CORES, "files": FILES, "prefix": prefix, "paths": temporary_paths(prefix),
                "upstream": UPSTREAM % path if path else "", "port": port, "location": location})
        command = ["nginx", "-p", prefix, "-c", config]
        if "-e filename" in output_of("nginx", "-h"):  # since 1.19.5; before, it opens the system's error log as well
            command += ["-e", os.path.join(prefix, "error.log")]
        log = self.log("nginx-" + key)
        process = start(command, log, self.policy)
        contender = Contender(key, name, port, [process, *back], lambda: tree([process.pid]), loads=loads)
        return self.checked(contender, log)

    @staticmethod
    def checked(contender, log):
        for load in contender.loads:
            check(contender, load, log)
        say("bench: %s answers rightly" % contender.name)
        return contender


class Peers(Starter):
    """The contenders of the loads. Peers are scheduled as the host is, or as `policy` says."""

    def start_all(self):
        """All that can be had, checked. What cannot is in `skipped`, with the reason."""
        plugrack, python = self._plugrack()
        contenders = [plugrack]
        if self.policy is None:
            self.policy = self.host.policy()  # the peers get what the host has given itself
        if host.supports_unix():
            contenders.append(self._behind_nginx())
        else:
            self.skip("plugrack behind nginx: this build has no `--listen unix:PATH`")
        contenders.append(self.server())
        self._if_there("fastcgi", "FastCGI in C", contenders, self._fastcgi)
        self._if_there("go-plugin", "go-plugin", contenders, self._goplugin)
        self._if_there("uwsgi", "uWSGI, and so the Python SDK", contenders, lambda: [python, self._uwsgi()])
        there = {contender.key for contender in contenders}
        for contender in contenders:
            contender.peers = [peer for peer in contender.peers if peer in there]
        return contenders

    def _if_there(self, tool, name, contenders, make):
        if tool in self.available:
            made = make()
            contenders += made if isinstance(made, list) else [made]
        else:
            self.skip("%s: not installed, and could not be" % name)

    def _plugrack(self):
        self.host = host.Host(self.room("host"), [host.rust_plugin(), host.python_plugin], self.policy).wait()
        both = dict(port=self.host.port, processes=[self.host.process], front=self.host.pids)
        peers = ["plugrack-nginx", "go", "fastcgi", "goplugin"]
        rust = Contender("plugrack", "plugrack", peers=peers, **both)
        python = Contender("plugrack-python", "plugrack, Python", prefix="/bench-python", peers=["uwsgi"], **both)
        return self.checked(rust, self.host.log), self.checked(python, self.host.log)

    def _behind_nginx(self):
        path = self.room("behind") + "/http.sock"
        behind = host.Host(os.path.dirname(path), [host.rust_plugin()], self.policy, unix=path).wait()
        return self.nginx("plugrack-nginx", "nginx → plugrack", PROXY, path, [behind.process])

    def server(self):
        """nginx before a small server."""
        path = self.room("go") + "/http.sock"
        if "go" in self.available:
            name, back = "Go", self.go_server(path)
        else:
            name, back = "Rust", self.back("the server in Rust", [tools.build_rust_peer(), path], path)
        return self.nginx("go", "nginx → " + name, PROXY, path, [back])

    def _fastcgi(self):
        path = self.room("fastcgi") + "/fastcgi.sock"
        program = tools.build_c("fastcgi", "-lfcgi", "-lpthread")
        back = self.back("FastCGI", [program, path, str(CORES), str(FASTCGI_THREADS)], path)
        return self.nginx("fastcgi", "nginx → FastCGI in C", FASTCGI, path, [back])

    def _goplugin(self):
        program, port = tools.build_go("goplugin"), free_port()
        log = self.log("goplugin")
        process = start([program, "127.0.0.1:%d" % port], log, self.policy)
        # The program starts itself again as the plugin: the front is the first alone.
        return self.checked(Contender("goplugin", "go-plugin", port, [process], lambda: [process.pid]), log)

    def _uwsgi(self):
        path = self.room("uwsgi") + "/uwsgi.sock"
        back = self.back("uWSGI", ["uwsgi", "--plugin", "python3", "--socket", path, "--listen", str(backlog()), "--master",
                                   "--processes", str(CORES), "--die-on-term", "--no-orphans", "--disable-logging", "--need-app",
                                   "--wsgi-file", "tests/bench/wsgi/application.py"], path)
        return self.nginx("uwsgi", "nginx → uWSGI", UWSGI, path, [back])


def backlog():
    """How many connections may wait for a server, of those that every point needs."""
    with open("/proc/sys/net/core/somaxconn") as file:
        return min(4096, int(file.read()))


def temporary_paths(prefix):
    """Paths built into the package are the system's; a module that is not there does not know its directive."""
    options = output_of("nginx", "-V")
    return "".join("    %s_temp_path %s/%s;\n" % (module, prefix, module)
                   for module in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
                   if "--without-http_%s_module" % module not in options)


# Without a limit on requests a connection all contenders keep theirs for the whole run. `keepalive` is of each worker.
NGINX = """\
daemon off;
%(user)s
worker_processes %(workers)d;
worker_rlimit_nofile %(files)d;
pid %(prefix)s/nginx.pid;
error_log stderr error;
events { worker_connections 4096; }
http {
    access_log off;
%(paths)s
    keepalive_requests 1000000000;
    client_body_buffer_size 128k;
    client_max_body_size 2m;
%(upstream)s
    server {
        listen 127.0.0.1:%(port)d backlog=4096;
        location / {
%(location)s
        }
    }
}
"""

UPSTREAM = """\
    upstream back {
        server unix:%s;
        keepalive 512;
        keepalive_requests 1000000000;
    }"""

PROXY = """\
            proxy_pass http://back;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffer_size 16k;
            proxy_buffers 8 32k;
            proxy_max_temp_file_size 0;"""

# The parameters that the program reads, and no more: in this peer's favour.
FASTCGI = """\
            fastcgi_pass back;
            fastcgi_keep_conn on;
            fastcgi_param REQUEST_METHOD $request_method;
            fastcgi_param DOCUMENT_URI $document_uri;
            fastcgi_param CONTENT_LENGTH $content_length;
            fastcgi_buffer_size 16k;
            fastcgi_buffers 8 32k;
            fastcgi_max_temp_file_size 0;"""

UWSGI = """\
            uwsgi_pass back;
            uwsgi_param REQUEST_METHOD $request_method;
            uwsgi_param REQUEST_URI $request_uri;
            uwsgi_param PATH_INFO $document_uri;
            uwsgi_param QUERY_STRING $query_string;
            uwsgi_param CONTENT_LENGTH $content_length;
            uwsgi_param CONTENT_TYPE $content_type;
            uwsgi_param SERVER_PROTOCOL $server_protocol;
            uwsgi_param SERVER_NAME $server_name;
            uwsgi_param SERVER_PORT $server_port;
            uwsgi_buffer_size 16k;
            uwsgi_buffers 8 32k;
            uwsgi_max_temp_file_size 0;"""
