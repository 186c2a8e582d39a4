# The work is done by scripts/ and by offmap itself; see README.md.

PYTHON = .venv/bin/python
PYTEST = $(PYTHON) -m pytest
SUITE = tests/unit tests/fuzz tests/kvm tests/lab

.PHONY: attack attack-hidden demo demo-patched compare fuzz test test-all slow soak setup setup-compare setup-tests setup-slow lint bench man unit

demo: setup
	.venv/bin/offmap demo

# The kinds of RAM that need a patched kernel, which is built the first time.
demo-patched: setup-slow
	.venv/bin/offmap demo --host-kernel patched:7.3 --out out/demo-patched

# Every kind of RAM on a stock kernel, into out/compare; goes on where it was. make compare COMPARE=--full
compare: setup-compare
	.venv/bin/offmap compare $(COMPARE)

setup:
	@scripts/setup

setup-compare:
	@scripts/setup --compare

setup-tests:
	@scripts/setup --tests

setup-slow:
	@scripts/setup --slow

lint: setup-tests
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check .
	@.venv/bin/mypy --no-error-summary
	@.venv/bin/lint-imports --no-logo >/dev/null || .venv/bin/lint-imports

# What to run while working on the code: nothing boots, a minute on two idle processors. Properties get new examples.
unit: setup-tests lint
	@$(PYTEST) -q -n 2 --hypothesis-profile=explore tests/unit

# Two files at a time, in the order of SUITE, the longest lab files first: a lab host keeps one processor busy.
test: setup-tests lint
	OFFMAP_NO_SKIP=1 $(PYTEST) -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(SUITE)

# Patched and older host kernels too.
test-all: test slow

slow: setup-slow
	@scripts/slow-tests "slow and not soak" $(SUITE)

# What the suite has seen on one kernel or kind of RAM, on the others: before a release, and after a change to what differs.
soak: setup-slow
	@scripts/slow-tests soak $(SUITE)

# Every fuzzer, for so many minutes together, each processor at work; coverage guides them. make fuzz MINUTES=60
MINUTES = 5
fuzz: setup-tests
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes --requirement tests/fuzz/requirements.txt
	@$(PYTHON) -m tests.fuzz --minutes $(MINUTES) $(FUZZ)

# A guest attacks its VMM for minutes; VMMs under attack are ended at random moments. make attack MINUTES=10 ENDS=1000
ENDS = 100
attack: setup-tests
	@$(PYTHON) -m tests.kvm.attack --minutes $(MINUTES) --ends $(ENDS)

# The same on hidden memory with vhost and passt as peers, in a disposable host. make attack-hidden MINUTES=10 HIDDEN=unplugged
HIDDEN = unplugged
PEERS = --load tun --load vhost_net --net tap=oft1,address=198.18.1.1/24,vhost=on --net passt
attack-hidden: setup-tests
	@.venv/bin/offmap lab exec --load-module --host-cmdline 'memmap=256M$$0x60000000' -- \
		$(CURDIR)/.venv/bin/python -m tests.kvm.attack --minutes $(MINUTES) --ends 0 --memory $(HIDDEN) $(PEERS)

# make bench BENCH=--quick
bench: setup-tests
	@for benchmark in exit_cost start_cost walk scan drgn_peer boot_time boot_login virtio_blk virtio_net populate pool wrap guest_memory; do $(PYTHON) benchmarks/$$benchmark.py $(BENCH) || exit; done

# The manual page, out/man/offmap.1.
man: setup-tests
	@$(PYTHON) scripts/man out/man/offmap.1
