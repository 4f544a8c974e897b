"""This project beside what it replaces, measured in one run on one machine: `make bench`.

harness.py asks, counts and writes; each other module here is one benchmark (`embeddings`); `naive/` has the
handlers that the workers are compared with, `bare/` the libraries without any handler, noop.py the SDK's own
floor. Results lie in results/, with the machine they were measured on.
gpu/ checks the workers on a GPU: `make check-gpu`.
"""
