"""Prints phases, then starts as the environment says: START=hang never gets ready, START=exit fails.

STARTS names a file that gets a line at every start.
"""

import json
import os
import sys
import time

print("phase=import seconds=0.250 bytes=10", flush=True)
print(json.dumps({"requestId": None, "message": "phase=load seconds=1.500", "level": "INFO"}), flush=True)
with open(os.environ["STARTS"], "a") as starts:
    starts.write(f"{time.monotonic()}\n")
if os.environ["START"] == "hang":
    time.sleep(600)
sys.exit("no such model")
