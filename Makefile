# make setup | bench | compare | test | proof | lint | sanitize | fuzz | wheel: each does what of the set-up is missing first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := clang gcc libbpf-dev libc6-dev libelf-dev libxdp-dev linux-perf llvm pkg-config python3-dev python3-venv zlib1g-dev
DAEMONS := nats-server nginx pmacct softflowd
DAEMONS_NEED := libjansson4 libmariadb3 libmaxminddb0 libnetfilter-log1 libpcap0.8 libpq5 librabbitmq4 librdkafka1 \
	libsqlite3-0 libzmq5 netbase
ifneq ($(filter test,$(MAKECMDGOALS)),)
PACKAGES += bind9-dnsutils curl dnsperf ngtcp2-client $(DAEMONS_NEED) # real clients for the services that the tests run
endif
SOURCES := $(wildcard fastrecv/_*/*.pyx fastrecv/_*/*.pxd bpf/*.c bpf/*.h)

.DELETE_ON_ERROR:
.PHONY: bench compare test test-units test-alone proof lint setup packages wheel microbench sanitize fuzz

bench: setup
	$(BIN)/python -m fastrecv.bench --flood udp

# On two CPUs: first what needs no namespaces beside what must be the only one to use the host's, then the rest in pairs.
test: setup $(DAEMONS:%=$(VENV)/unpacked/%)
	$(MAKE) --no-print-directory -j2 -O test-units test-alone
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not proof and not alone' tests/kernel

test-units:
	$(BIN)/python -m pytest tests/unit

test-alone:
	$(BIN)/python -m pytest -m 'alone and not proof' tests/packaging tests/kernel

# Every receiver against a C loop, interleaved (a minute and a half); then the same in pytest-benchmark's tables.
compare: setup
	$(BIN)/python -m fastrecv.bench receive --json bench/results/receive.json --plot bench/receive.svg >bench/receive.md
	cat bench/receive.md
	$(BIN)/python -m pytest bench/test_receive.py --benchmark-columns=min,median,iqr,rounds

# What takes minutes: ten million datagrams through one Receiver; swaps, upgrades and kills by the hundred.
proof: setup
	$(BIN)/python -m pytest -m proof -s

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright tests/typing

# Microseconds per call of the door to libbpf (pytest-benchmark).
microbench: setup
	$(BIN)/python -m pytest bench/test_maps.py --benchmark-columns=min,median,iqr,rounds

# The C underneath, under AddressSanitizer and UndefinedBehaviorSanitizer: a build of its own, some minutes.
sanitize: setup
	FASTRECV_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=build/sanitize/lib \
		$(BIN)/pytest -s --import-mode=importlib -p no:cacheprovider tests/kernel/test_bpf.py tests/kernel/test_bpf_sharing.py \
		tests/kernel/test_rings.py tests/kernel/test_groups.py tests/unit/test_receiver.py tests/unit/test_batch.py \
		tests/unit/test_arrow.py tests/unit/test_replies.py tests/unit/test_sockets.py tests/unit/test_ownership.py \
		tests/kernel/test_xdp.py tests/kernel/test_xdp_answers.py tests/kernel/test_xdp_frames.py \
		tests/unit/test_flow_decoder.py tests/unit/test_flow_fuzz.py tests/unit/test_flow_memory.py

# The flow decoder under atheris, for FUZZ seconds; what was found interesting stays in build/fuzz.
FUZZ := 300
fuzz: setup
	$(BIN)/python -m pip install -q --group fuzz
	mkdir -p build/fuzz
	$(BIN)/python -m tests.fuzz.flow -max_total_time=$(FUZZ) -max_len=4096 build/fuzz

# Real daemons for the tests, unpacked only: installed they would be started.
$(VENV)/unpacked/%: | packages
	mkdir -p $(@D)
	! command -v apt-get >/dev/null || dpkg-query -W -f '$${Status}' $* 2>/dev/null | grep -q 'ok installed' || \
		{ cd $(@D) && apt-get download -q $* && dpkg-deb -x $*_*.deb . && rm $*_*.deb; }
	touch $@

# A wheel that carries libbpf and libelf, as released.
wheel: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist/plain
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/plain/*.whl
	mv dist/plain/*.tar.gz dist

setup: packages $(VENV)/built

# Debian's names; where there is no dpkg the tools themselves are looked for.
packages:
	@missing=""; \
	if command -v dpkg-query >/dev/null; then \
		for package in $(PACKAGES); do \
			dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
		done; \
	elif ! { command -v clang && command -v llvm-strip && pkg-config --exists libbpf; } >/dev/null; then \
		missing=" $(PACKAGES)"; \
	fi; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing:$$missing"; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else \
		echo "fastrecv needs these packages (Debian's names); make can install them only as root with apt:$$missing" >&2; \
		exit 1; \
	fi

$(VENV)/installed: pyproject.toml setup.py | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastrecv needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install -q --group dev
	$(BIN)/python -m pip install -q --no-build-isolation --config-settings editable_mode=compat -e '.[all]'
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@
