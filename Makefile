# plugrack: `make run` to try it, `make test` to check it. The other targets are below, each with a word on what it does.

DATA    ?= ./var
LISTEN  ?= 127.0.0.1:8080
CARGO   ?= cargo
PYTHON  ?= python3

# What `make release` makes, and where. A test takes PROFILE=dev, which is built sooner.
PROFILE ?= release
DIST    ?= dist

# A static program finds no function by name, and getrandom(2) is looked for so; it would then need /dev/urandom.
STATIC_FLAGS = -C target-feature=+crt-static --cfg getrandom_backend="linux_getrandom"

# The machine's own target, or its musl variant where that and a C compiler for it are installed. Named in the build, since only
# then are the flags for the program alone, and not for the procedural macros, which cannot be static.
HOST_TARGET = $(shell rustc -vV | sed -n 's/^host: //p')
MUSL_TARGET = $(subst -gnu,-musl,$(HOST_TARGET))
STATIC_TARGET ?= $(shell command -v musl-gcc >/dev/null && test -d "$$(rustc --print target-libdir --target $(MUSL_TARGET) 2>/dev/null)" \
	&& echo $(MUSL_TARGET) || echo $(HOST_TARGET))
BUILT = $(or $(CARGO_TARGET_DIR),target)/$(STATIC_TARGET)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))

# The packages from PyPI and npm that tests run, each with its version in tests/packages.
PACKAGES = $(or $(CARGO_TARGET_DIR),target)/test-packages

# The test modules about what goes wrong, in plugins, in the host and in the machine.
FAULTS   = attack:: confinement:: data_dir:: deploy:: discovery:: drain:: durability:: host_limits:: isolation:: lifecycle:: logs:: orphans:: \
           overload:: slow_clients:: store_faults:: web_faults:: why::

.PHONY: help run examples release test faults attack durability fuzz-license fuzz-gate instructions soak lint docs lib ci bench bench-docs test-tools fuzz-tools clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: examples ## build everything, put the examples in place, run the host
	@echo
	@echo "Try, in another terminal:"
	@echo
	@echo "    curl http://$(LISTEN)/"
	@echo "    curl http://$(LISTEN)/hello"
	@echo "    curl -d text='my first note' http://$(LISTEN)/notes"
	@echo "    curl http://$(LISTEN)/notes"
	@echo "    curl http://$(LISTEN)/counter"
	@echo "    curl -N http://$(LISTEN)/clock/events"
	@echo "    ./target/release/plugrack --data $(DATA) list"
	@echo
	@echo "and in two windows of a browser: http://$(LISTEN)/chat"
	@echo
	@command -v node >/dev/null || echo "(node is not installed, so the example clock will be refused)"
	@echo "(the examples licensed-rust and licensed-python wait for a licence: docs/licensing.md)"
	@echo "Ctrl-C stops it; what it keeps is in $(DATA)."
	@echo
	@exec ./target/release/plugrack serve --data $(DATA) --listen $(LISTEN)

examples: ## build everything, put the examples in $(DATA)/plugins
	$(CARGO) build --release --locked
	$(CARGO) build --release --locked --package hello
	$(CARGO) build --release --locked --package licensed-rust
	@mkdir -p $(DATA)/plugins
	@cp target/release/hello $(DATA)/plugins/hello.new && mv $(DATA)/plugins/hello.new $(DATA)/plugins/hello
	@cp target/release/licensed-rust $(DATA)/plugins/licensed-rust.new && mv $(DATA)/plugins/licensed-rust.new $(DATA)/plugins/licensed-rust
	@for example in notes chat clock counter licensed-python; do \
		mkdir -p $(DATA)/plugins/$$example && cp -R plugins-examples/$$example/. $(DATA)/plugins/$$example/ || exit 1; \
	done
	@for example in notes chat licensed-python; do cp sdk/python/plugrack.py $(DATA)/plugins/$$example/ || exit 1; done
	@cp sdk/node/plugrack.mjs $(DATA)/plugins/clock/

release: ## one statically linked executable, $(DIST)/plugrack, and the example hello likewise
	@mkdir -p $(DIST)
	@for program in plugrack hello; do \
		RUSTFLAGS="$$RUSTFLAGS "'$(STATIC_FLAGS)' \
			$(CARGO) build --locked --profile $(PROFILE) --package $$program --target $(STATIC_TARGET) || exit 1; \
		LC_ALL=C ldd $(BUILT)/$$program 2>&1 | grep -q -e 'statically linked' -e 'not a dynamic executable' || { \
			echo "$(BUILT)/$$program needs shared libraries: build for a target that can be linked statically (STATIC_TARGET=…)" >&2; exit 1; }; \
		cp $(BUILT)/$$program $(DIST)/$$program.new && mv $(DIST)/$$program.new $(DIST)/$$program || exit 1; \
	done

test: test-tools ## run every test; gets what it needs and the machine lacks
	$(PYTHON) tests/leftovers.py $(CARGO) test --locked --workspace --no-fail-fast

faults: test-tools ## the tests of faults alone, ROUNDS times in a row
	@for round in $$(seq $(or $(ROUNDS),1)); do echo "round $$round of $(or $(ROUNDS),1)"; \
		$(PYTHON) tests/leftovers.py $(CARGO) test --locked --test it -- $(FAULTS) || exit 1; \
	done

attack: ## attack a host in every way known, with an honest client beside it, and show what came of each
	@$(PYTHON) tests/leftovers.py $(CARGO) test --locked --test it -- attack::; status=$$?; \
		cat $(or $(CARGO_TARGET_DIR),target)/tmp/attack.txt; exit $$status

durability: ## kill host and plugins under a load of writes, ROUNDS times (100), and look for each write that was acknowledged
	PLUGRACK_ROUNDS=$(or $(ROUNDS),100) $(PYTHON) tests/leftovers.py $(CARGO) test --locked --test it -- durability:: --nocapture

fuzz-license: ## broken licences for ten minutes, or FUZZ_SECONDS=…
	PLUGRACK_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) $(CARGO) test --locked --test it license_fuzz:: -- --nocapture

# What is found new stays below target, and the next run begins with it. Each target's own lines are in a log beside it.
fuzz-gate: fuzz-tools ## the gate's parsers under a fuzzer, an hour for each or FUZZ_SECONDS=…, two at a time
	@cp Cargo.lock tests/fuzz/Cargo.lock
	@RUSTC_BOOTSTRAP=1 nice -n 10 $(CARGO) fuzz build --fuzz-dir tests/fuzz
	@printf '%s\n' head chunked | xargs -P 2 -I TARGET sh -c ' \
		kept=tests/fuzz/target/corpus/TARGET log=tests/fuzz/target/TARGET.log; mkdir -p $$kept; \
		if RUSTC_BOOTSTRAP=1 nice -n 10 $(CARGO) fuzz run --fuzz-dir tests/fuzz TARGET $$kept tests/fuzz/corpus/TARGET -- \
			-dict=tests/fuzz/http.dict -max_total_time=$(or $(FUZZ_SECONDS),3600) >$$log 2>&1; \
		then echo "TARGET: $$(grep ^Done $$log)"; else tail -n 40 $$log; echo "TARGET: something was found, see $$log"; exit 1; fi'

instructions: test-tools ## count the instructions of what each request goes through, and compare them with what is known
	@$(PYTHON) tests/bench/instructions.py

soak: ## honest load and attacks together for half an hour, or SOAK_SECONDS=…: memory, files and threads must stay flat
	$(CARGO) build --release --locked --package plugrack --package hello
	$(PYTHON) tests/soak.py

lint: ## formatting and lints, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --package plugrack-sdk --all-targets -- -D warnings
	$(CARGO) clippy --locked --package plugrack-sdk --all-targets --features license -- -D warnings

docs: ## the API documentation, warnings are errors
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps

lib: ## the Rust SDK alone, as a plugin author gets it, without and with licences
	$(CARGO) check --locked --package plugrack-sdk
	$(CARGO) check --locked --package plugrack-sdk --features license

ci: lint test docs lib ## all that a change must pass

bench: ## measure beside nginx and others in one interleaved run, 20 minutes; QUICK=1 for a short one, 4
	$(CARGO) build --release --locked
	$(CARGO) build --release --locked --package bench-plugin --package bench-chain
	$(PYTHON) tests/bench/run.py

bench-docs: ## put the report of the last `make bench` into docs/
	$(PYTHON) tests/bench/run.py --write-docs

# The tests of the Node SDK need node 18 or later, those of licences in Python the package cryptography, those of a supervised
# host runit, those of the web its clients, a browser among them, and two proxies, those of slow clients slowhttptest, those of FastCGI php-cgi and php-fpm, the counts of instructions valgrind; what is missing is installed where we may.
# Applications, and the bridges of the SDKs to WSGI, ASGI and node:http, are tested with packages from PyPI and npm, installed once below
# target (Node-RED is 100 MB of them, and takes 20 s), and with Go, Sinatra under puma, DokuWiki and cgit from Debian.
test-tools:
	@missing=; \
	for tool in node:nodejs npm:npm runsv:runit curl:curl wget:wget openssl:openssl ab:apache2-utils wrk:wrk h2load:nghttp2-client \
		slowhttptest:slowhttptest chromium:chromium nginx:nginx caddy:caddy valgrind:valgrind php:php-cli php-cgi:php-cgi \
		go:golang-go ruby:ruby puma:puma; do \
		command -v "$${tool%:*}" >/dev/null || missing="$$missing $${tool#*:}"; \
	done; \
	php -m 2>/dev/null | grep -qx curl || missing="$$missing php-curl"; \
	ls /usr/sbin/php-fpm* >/dev/null 2>&1 || missing="$$missing php-fpm"; \
	test -d /usr/share/dokuwiki || missing="$$missing dokuwiki"; \
	test -x /usr/lib/cgit/cgit.cgi || missing="$$missing cgit"; \
	ruby -e 'require "sinatra/base"' 2>/dev/null || missing="$$missing ruby-sinatra"; \
	$(PYTHON) -c 'import cryptography' 2>/dev/null || missing="$$missing python3-cryptography"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import requests, httpx' 2>/dev/null || /usr/bin/python3 -c 'import requests, httpx' 2>/dev/null || \
		missing="$$missing python3-requests python3-httpx"; \
	test -z "$$missing" || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
		else \
			echo "make test needs:$$missing. Install it (Debian: apt install$$missing; node must be 18 or later)" >&2; exit 1; \
		fi; }
	@$(MAKE) --silent --no-print-directory $(PACKAGES)/python.installed $(PACKAGES)/node.installed

$(PACKAGES)/python.installed: tests/packages/requirements.txt
	rm -rf $(PACKAGES)/python
	$(PYTHON) -m venv $(PACKAGES)/python
	$(PACKAGES)/python/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(PACKAGES)/node.installed: tests/packages/package-lock.json tests/packages/package.json
	@mkdir -p $(PACKAGES)/node
	cp tests/packages/package.json tests/packages/package-lock.json $(PACKAGES)/node/
	npm --prefix $(PACKAGES)/node ci --silent --ignore-scripts
	@touch $@

# The fuzzer's features of the compiler are for its developers, or for who says RUSTC_BOOTSTRAP.
fuzz-tools:
	@$(CARGO) fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz

clean: ## remove what was built, not what the host keeps
	$(CARGO) clean
	rm -rf $(DIST)
