"""The workers on a GPU: right, fast, and which of two ways is faster: `make check-gpu`.

__main__.py runs each part in a process of its own, with a time limit, and writes results/gpu.md.
models.py makes random models of real shapes on the device. limits.py measures what the device can do,
right.py and fast.py the workers, decide.py the alternatives. `--cpu` runs the same on tiny shapes.
"""
