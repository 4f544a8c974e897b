"""sentence-transformers' CrossEncoder and nothing else: predict.py MODEL.

Reads JSON lists of pairs, one a line; answers each with the seconds that one `predict` took, and the scores.
"""

import json
import sys
import time

from sentence_transformers import CrossEncoder

model = CrossEncoder(sys.argv[1])
for line in sys.stdin:
    pairs = [tuple(pair) for pair in json.loads(line)]
    begin = time.perf_counter()
    scores = model.predict(pairs)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "answers": scores.tolist()}), flush=True)
