"""What every worker needs and none should write twice.

A drawer of functions and small classes. Importing `shared` or any module of it loads no model library
and not the RunPod SDK: both cost seconds, and a worker pays only for what it uses.
"""
