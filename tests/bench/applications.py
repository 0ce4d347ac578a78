"""Applications as they are: each is one process, or one directory of files, with the host and nginx before it.

Neither front starts the process, so both send their requests to the same one. The host knows it by a manifest; nginx is set for
speed, as in peers.py.
"""

import os
from dataclasses import dataclass
from typing import Callable, Dict, Tuple

import host
import tools
import tunnels
from loads import LOADS, Load
from peers import CORES, PROXY, Contender, Starter, backlog
from processes import ROOT, say
from report import Section, comparison, ratio_target
from rounds import measure_loads, stop_contenders

HELLO, ECHO, MIB = (next(load for load in LOADS if load.key == key) for key in ("hello", "echo", "mib"))
FEW = (1, 16, 64)  # for an application that is the limit itself from few connections on
FILES = tuple(load._replace(connections=(1, 16, 64, 256)) for load in (
    HELLO._replace(key="small-file", title="GET of a file of 4 KiB", path="/small", answer=b"0123456789abcdef" * 256),
    MIB._replace(key="large-file", title="GET of a file of 1 MiB", path="/large")))
GUNICORN_THREADS = 8  # of each process
PHP_PROCESSES = 8

# What the host is to reach: a ratio to nginx, and the numbers of connections that it is for, None for all.
AS_NGINX = ((1.0, None),)
ABOVE_NGINX = (*AS_NGINX, (1.2, (64, 256)))


@dataclass
class Application:
    name: str
    tool: str  # without which it is left out; empty if it needs none
    start: Callable  # a method of Fronts
    loads: Dict[Load, Tuple]  # with the targets of each
    most_seconds: int  # see rounds.py


class Fronts(Starter):
    """Starts an application, and the host and nginx before it."""

    def go(self, loads, location=PROXY):
        path = self.room("go") + "/http.sock"
        return self._both("Go", HTTP % path, location, loads, path, [self.go_server(path)])

    def gunicorn(self, loads):
        path = self.room("gunicorn") + "/http.sock"
        back = self.back("gunicorn", [tools.PYTHON, "-m", "gunicorn", "--bind", "unix:" + path, "--backlog", str(backlog()),
                                      "--workers", str(CORES), "--threads", str(GUNICORN_THREADS), "--keep-alive", "60",
                                      "--chdir", "tests/bench/wsgi", "application"], path)
        return self._both("gunicorn", HTTP % path, PROXY, loads, path, [back])

    def php(self, loads):
        room = self.room("php")
        path, config = os.path.join(room, "fastcgi.sock"), os.path.join(room, "fpm.conf")
        with open(config, "w") as file:
            file.write(FPM % {"socket": path, "backlog": backlog(), "processes": PHP_PROCESSES,
                              # The pool has to name a user where the master is root.
                              "user": "user = root" if os.geteuid() == 0 else ""})
        command = [tools.php_fpm(), "--nodaemonize", "--fpm-config", config]
        back = self.back("php-fpm", command + (["--allow-to-run-as-root"] if os.geteuid() == 0 else []), path)
        scripts = os.path.join(ROOT, "tests/bench/php")
        return self._both("php-fpm", FASTCGI % (PHP_PROCESSES, path, scripts), PHP % scripts, loads, path, [back])

    def files(self, loads):
        site = self.room("site")
        root = os.path.join(site, "bench")
        os.mkdir(root)
        for load in loads:
            with open(root + load.path, "wb") as file:
                file.write(load.answer)
        return self._both("files", STATIC % root, DIRECTORY % site, loads)

    def _both(self, name, manifest, location, loads, path=None, back=()):
        place = host.Host(self.room("host"), [host.application(MANIFEST + manifest)], self.policy).wait()
        ours = Contender("plugrack", "plugrack → " + name, place.port, [place.process, *back], place.pids, loads=tuple(loads))
        return [self.checked(ours, place.log), self.nginx("nginx", "nginx → " + name, location, path, back, ours.loads)]


APPLICATIONS = (
    Application("Go", "go", Fronts.go, {load: ABOVE_NGINX for load in (HELLO, ECHO, MIB)}, 135),
    Application("gunicorn", "gunicorn", Fronts.gunicorn,
                {load._replace(connections=FEW): AS_NGINX for load in (HELLO, ECHO, MIB)}, 75),
    Application("php-fpm", "php-fpm", Fronts.php, {load._replace(connections=FEW): AS_NGINX for load in (HELLO, ECHO)}, 50),
    Application("files", "", Fronts.files, {FILES[0]: ((0.8, None),), FILES[1]: ((0.9, None),)}, 70),
)


def compare(bench, available, options, remarks, skipped):
    """All applications, one after another. What cannot be had is put into `skipped`, with the reason."""
    text, targets = [INTRODUCTION], []

    def there(name, tool):
        fronts = Fronts(bench.room("apps-" + name), bench.policy, available)
        if tool and tool not in available:
            fronts.skip("%s behind plugrack and nginx: %s is not installed; `make test-tools` does it" % (name, tool))
            skipped.extend(fronts.skipped)
            return None
        say("bench: apps: " + name)
        return fronts

    for application in APPLICATIONS:
        fronts = there(application.name, application.tool)
        if not fronts:
            continue
        contenders = application.start(fronts, application.loads)
        results, rounds = measure_loads(contenders, options, application.most_seconds, bench.faults, remarks)
        stop_contenders(contenders)
        text.append("### %s\n\nRounds: %d.\n\n%s" % (application.name, rounds, comparison(results, "plugrack", "nginx")))
        for load, wanted in application.loads.items():
            for least, connections in wanted:
                claim = "%s, %s: ≥ %.1f × nginx" % (application.name, load.title, least)
                if connections:
                    claim += " at " + ", ".join(map(str, connections))
                targets.append(ratio_target(results, claim, load.key, "plugrack", "nginx", least, connections))

    fronts = there("tunnels", "go")
    if fronts:
        contenders = fronts.go((HELLO,), UPGRADE)
        more, target = tunnels.compare(bench, contenders)
        stop_contenders(contenders)
        text.append("### tunnels\n\n" + more)
        targets.append(target)
    return Section("Applications", "\n".join(text), targets)


INTRODUCTION = """\
Requests a second to the same process, or for the same files, behind plugrack and behind nginx, and their ratio. Latency, processor
time a request of the whole process tree, and memory of the front alone are those of plugrack / nginx.
"""

MANIFEST = """\
id = "bench"
route = "/bench"
"""

HTTP = """\
[run]
kind = "http"
listen = "unix:%s"
prefix = "keep"
"""

# With the concurrency that docs/apps.md advises.
FASTCGI = """\
concurrency = %d

[run]
kind = "fastcgi"
listen = "unix:%s"
root = "%s"
script = "index.php"
"""

STATIC = """\
[run]
kind = "static"
root = "%s"
"""

FPM = """\
[global]
error_log = /proc/self/fd/2

[www]
listen = %(socket)s
listen.backlog = %(backlog)d
pm = static
pm.max_children = %(processes)d
%(user)s
"""

# The parameters of nginx's own fastcgi_params, which the host sends too. A connection is for one request, as is the default: a kept
# one would hold a process of php-fpm while requests on others wait for one.
PHP = """\
            fastcgi_pass back;
            fastcgi_param SCRIPT_FILENAME %s/index.php;
            fastcgi_param QUERY_STRING $query_string;
            fastcgi_param REQUEST_METHOD $request_method;
            fastcgi_param CONTENT_TYPE $content_type;
            fastcgi_param CONTENT_LENGTH $content_length;
            fastcgi_param SCRIPT_NAME $fastcgi_script_name;
            fastcgi_param REQUEST_URI $request_uri;
            fastcgi_param DOCUMENT_URI $document_uri;
            fastcgi_param DOCUMENT_ROOT $document_root;
            fastcgi_param SERVER_PROTOCOL $server_protocol;
            fastcgi_param REQUEST_SCHEME $scheme;
            fastcgi_param GATEWAY_INTERFACE CGI/1.1;
            fastcgi_param SERVER_SOFTWARE nginx;
            fastcgi_param REMOTE_ADDR $remote_addr;
            fastcgi_param REMOTE_PORT $remote_port;
            fastcgi_param SERVER_ADDR $server_addr;
            fastcgi_param SERVER_PORT $server_port;
            fastcgi_param SERVER_NAME $server_name;
            fastcgi_param REDIRECT_STATUS 200;
            fastcgi_buffer_size 16k;
            fastcgi_buffers 8 32k;
            fastcgi_max_temp_file_size 0;"""

# Without open_file_cache, which would send old files: the host looks at the file for each request too.
DIRECTORY = """\
            root %s;
            sendfile on;
            tcp_nopush on;"""

UPGRADE = """\
            proxy_pass http://back;
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";
            proxy_read_timeout 1h;"""
