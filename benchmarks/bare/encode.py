"""sentence-transformers and nothing else: encode.py MODEL.

Reads JSON lists of texts, one a line; answers each with the seconds that one `encode` took, and the vectors.
"""

import json
import sys
import time

from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1])
for line in sys.stdin:
    texts = json.loads(line)
    begin = time.perf_counter()
    vectors = model.encode(texts)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "answers": vectors.tolist()}), flush=True)
