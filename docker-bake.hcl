# One image per folder under workers/.
#
#   make build-sentence-transformers           build one image into the local engine
#   docker buildx bake --print default release show every target as it resolves, build nothing
#   docker buildx bake release --push          what a release runs
#
# For buildx 0.13 and newer. Version 0.13 has no validation blocks, typed variables or object syntax, hence
# regex() and strings below. It also ignores a target attribute that it does not know: a misspelt one is no
# error, so tests/images holds the resolved targets against a kept copy.

# ---- Variables: set them in the environment, as in REGISTRY=ghcr.io/me make build ------------------------

# Where the images are named and pushed: REGISTRY/worker-<name>.
variable "REGISTRY" {
  default = "docker.io/example"
}

# "dev", or a release such as 1.4.2 without a leading v.
variable "TAG" {
  default = "dev"
}

# The commit, in full. `make` and CI set it.
variable "REVISION" {
  default = ""
}

# Where the source is, for the label that registries show.
variable "SOURCE" {
  default = "https://github.com/example/runpod-workers"
}

variable "PLATFORM" {
  default = "linux/amd64"
}

# "registry": read and write a build cache at REGISTRY/worker-<name>:buildcache. A CUDA image does not fit
# into the 10 GB of GitHub's own cache.
variable "CACHE" {
  default = ""
}

# A model to put into the image, and its revision. For a gated one set HF_TOKEN too.
variable "MODEL_NAME" {
  default = ""
}
variable "MODEL_REVISION" {
  default = ""
}

# The hub that it is taken from.
variable "HF_ENDPOINT" {
  default = "https://huggingface.co"
}

# A base in place of the one that BASES names, such as a mirror of it or another Python.
variable "BASE_IMAGE" {
  default = ""
}

# "host": builds use the network of this machine, as a mirror or a hub on it needs. bake then asks for
# --allow network.host (buildx 0.17 and newer).
variable "NETWORK" {
  default = ""
}

# The time that every file in a layer carries. A constant: file times are part of a layer's digest, so that
# the time of the commit would ship all layers anew with each commit.
variable "SOURCE_DATE_EPOCH" {
  default = "1767225600"
}

# ---- The workers: a line for each folder under workers/; tests/house/test_folders.py holds them together ----

WORKERS = {
  bge                   = { base = "python", about = "Embeddings for retrieval (BGE, E5, GTE, Qwen3) and reranking" }
  florence2             = { base = "python", about = "Florence-2: captions, text, boxes and polygons of a picture" }
  huggingface           = { base = "python", about = "Any causal language model of transformers, answers made together" }
  llava                 = { base = "python", about = "LLaVA and other models that answer questions about pictures" }
  sentence-transformers = { base = "python", about = "Text embeddings with sentence-transformers" }
  tgi                   = { base = "tgi", about = "LLMs with Hugging Face's TGI, where an endpoint is built on it; vllm for new ones" }
  vllm                  = { base = "vllm", about = "Any LLM that vLLM serves: its routes, fields and flags" }
  whisper               = { base = "python", about = "Whisper: speech to text, of any length" }
  xtts                  = { base = "python", about = "XTTS: speech in seventeen languages, built-in and cloned voices" }
}

# Renovate adds the digest to each image, as in python:3.12-slim-trixie@sha256:..., and keeps it.
BASES = {
  python = { image = "docker.io/library/python:3.12-slim-trixie", cuda = "13.0" }
  tgi    = { image = "ghcr.io/huggingface/text-generation-inference:3.3.7", cuda = "12.4" }
  vllm   = { image = "docker.io/vllm/vllm-openai:v0.32.0", cuda = "13.0" }
}

function "base" {
  params = [worker]
  result = BASE_IMAGE == "" ? BASES[WORKERS[worker].base].image : BASE_IMAGE
}

# ---- Tags ----------------------------------------------------------------------------------------------

tag = regex("^(?:dev|[0-9]+[.][0-9]+[.][0-9]+(?:-[0-9A-Za-z.]+)?)$", TAG)

# 1.4.2 -> 1.4.2, 1.4.2-cuda13.0; 1.4.2-rc.1 -> 1.4.2-rc.1, 1.4.2-rc.1-cuda13.0; dev -> dev; and sha-<commit>.
# RunPod's hosts cache images by tag: a tag that moves, such as latest or 1.4, names one image on one host and
# another on the next. Only dev moves; an endpoint takes sha-<commit> in its place.
function "tags" {
  params = [worker]
  result = formatlist("${REGISTRY}/worker-${worker}:%s", concat(
    [tag],
    tag == "dev" ? [] : ["${tag}-cuda${BASES[WORKERS[worker].base].cuda}"],
    REVISION == "" ? [] : ["sha-${substr(REVISION, 0, 12)}"],
  ))
}

# ---- Targets: <worker> for this machine, <worker>-release for a registry -------------------------------

group "default" {
  targets = keys(WORKERS)
}

group "release" {
  targets = formatlist("%s-release", keys(WORKERS))
}

target "worker" {
  name   = worker
  matrix = { worker = keys(WORKERS) }

  context    = "."
  dockerfile = "workers/${worker}/Dockerfile"
  platforms  = [PLATFORM]
  network    = NETWORK == "" ? null : NETWORK
  tags       = tags(worker)
  args = {
    BASE_IMAGE        = base(worker)
    MODEL_NAME        = MODEL_NAME
    MODEL_REVISION    = MODEL_REVISION
    HF_ENDPOINT       = HF_ENDPOINT
    SOURCE_DATE_EPOCH = SOURCE_DATE_EPOCH
  }
  # Mounted for the one RUN that reads it. A build argument would stay in the image's history.
  secret = MODEL_NAME == "" ? [] : ["id=HF_TOKEN,env=HF_TOKEN"]
  labels = {
    "org.opencontainers.image.title"       = "worker-${worker}"
    "org.opencontainers.image.description" = WORKERS[worker].about
    "org.opencontainers.image.source"      = SOURCE
    "org.opencontainers.image.licenses"    = "Apache-2.0"
    "org.opencontainers.image.version"     = tag
    "org.opencontainers.image.revision"    = REVISION
    "org.opencontainers.image.base.name"   = base(worker)
  }
  cache-from = CACHE == "registry" ? ["type=registry,ref=${REGISTRY}/worker-${worker}:buildcache"] : []
}

target "worker-release" {
  name     = "${worker}-release"
  matrix   = { worker = keys(WORKERS) }
  inherits = [worker]

  annotations = [
    "index,manifest:org.opencontainers.image.title=worker-${worker}",
    "index,manifest:org.opencontainers.image.description=${WORKERS[worker].about}",
    "index,manifest:org.opencontainers.image.source=${SOURCE}",
    "index,manifest:org.opencontainers.image.version=${tag}",
    "index,manifest:org.opencontainers.image.revision=${REVISION}",
  ]
  attest   = ["type=provenance,mode=max", "type=sbom"]
  # store=false: Docker would unpack what it keeps, and cannot do that with times that were rewritten.
  output   = ["type=image,oci-mediatypes=true,rewrite-timestamp=true,store=false"]
  cache-to = CACHE == "registry" ? ["type=registry,ref=${REGISTRY}/worker-${worker}:buildcache,mode=max,image-manifest=true,oci-mediatypes=true,ignore-error=true"] : []
}
