# plugrack: `make run` to try it, `make test` to check it. The other targets are below, each with a word on what it does.

DATA    ?= ./var
LISTEN  ?= 127.0.0.1:8080
CARGO   ?= cargo
PYTHON  ?= python3

.PHONY: help run examples test lint docs lib ci bench install-node clean

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
	@command -v node >/dev/null || echo "(node is not installed, so the example clock will be refused)"
	@echo "Ctrl-C stops it; what it keeps is in $(DATA)."
	@echo
	@exec ./target/release/plugrack serve --data $(DATA) --listen $(LISTEN)

examples: ## build everything, put the examples in $(DATA)/plugins
	$(CARGO) build --release --locked
	$(CARGO) build --release --locked --package hello
	@mkdir -p $(DATA)/plugins
	@cp target/release/hello $(DATA)/plugins/hello.new && mv $(DATA)/plugins/hello.new $(DATA)/plugins/hello
	@for example in notes clock counter; do \
		mkdir -p $(DATA)/plugins/$$example && cp -R plugins-examples/$$example/. $(DATA)/plugins/$$example/ || exit 1; \
	done
	@cp src/sdk/plugrack.py $(DATA)/plugins/notes/
	@cp src/sdk/plugrack.mjs $(DATA)/plugins/clock/

test: install-node ## run every test; gets what it needs and the machine lacks
	$(CARGO) test --locked --workspace --no-fail-fast

lint: ## formatting and lints, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --lib --no-default-features -- -D warnings

docs: ## the API documentation, warnings are errors
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps

lib: ## the library alone, as a plugin author gets it
	$(CARGO) check --locked --lib --no-default-features

ci: lint test docs lib ## all that a change must pass

bench: ## measure against nginx in one interleaved run; QUICK=1 for a short one
	$(CARGO) build --release --locked
	$(CARGO) build --release --locked --package hello
	$(PYTHON) tests/bench/run.py

# The tests of the Node SDK need node 18 or later; where it is missing and we may, it is installed.
install-node:
	@command -v node >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq --no-install-recommends nodejs; \
		else \
			echo "make test needs node 18 or later for the tests of the Node SDK: install it (Debian: apt install nodejs)" >&2; exit 1; \
		fi; }

clean: ## remove what was built, not what the host keeps
	$(CARGO) clean
