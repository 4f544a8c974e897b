"""transformers' Whisper and nothing else: whisper.py MODEL.

Reads JSON lines, one a line: `{"clips": [base64], "batch": n}`, or `{"long": base64}` for its sequential
long-form transcription. Answers each with the seconds from base64 to text, and the texts.
"""

import base64
import io
import json
import sys
import time

import soundfile
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

processor = WhisperProcessor.from_pretrained(sys.argv[1])
model = WhisperForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
OPTIONS = {"task": "transcribe", "num_beams": 1, "return_timestamps": True}


def read(text):
    return soundfile.read(io.BytesIO(base64.b64decode(text)), dtype="float32")[0]


def decode(rows):
    return [text.strip() for text in processor.batch_decode(rows, skip_special_tokens=True)]


for line in sys.stdin:
    wanted = json.loads(line)
    begin = time.perf_counter()
    said = []
    with torch.inference_mode():
        if "long" in wanted:
            inputs = processor(
                read(wanted["long"]), sampling_rate=16_000, return_tensors="pt", truncation=False,
                padding="longest", return_attention_mask=True,
            )  # fmt: skip
            said = decode(model.generate(**inputs, **OPTIONS))
        else:
            clips, size = wanted["clips"], wanted["batch"]
            for start in range(0, len(clips), size):
                sounds = [read(clip) for clip in clips[start : start + size]]
                features = processor(sounds, sampling_rate=16_000, return_tensors="pt").input_features
                said += decode(model.generate(features, **OPTIONS))
    print(json.dumps({"seconds": time.perf_counter() - begin, "answers": said}), flush=True)
