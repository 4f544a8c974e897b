"""The least that an embeddings worker must do before its first job: load.py MODEL."""

import sys

import runpod  # noqa: F401
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1])
print("ready", flush=True)
