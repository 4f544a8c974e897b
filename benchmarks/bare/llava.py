"""transformers' LLaVA and nothing else, all pictures in one batch: llava.py MODEL.

Reads JSON lists of jobs, `{"image", "prompt", "max_tokens"}`, one a line; answers each with the seconds from
base64 to texts, and the texts.
"""

import base64
import io
import json
import sys
import time

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(sys.argv[1])
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
for line in sys.stdin:
    jobs = json.loads(line)
    begin = time.perf_counter()
    talks = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(job["image"])))},
                    {"type": "text", "text": job["prompt"]},
                ],
            }
        ]
        for job in jobs
    ]
    inputs = processor.apply_chat_template(
        talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    most = max(job["max_tokens"] for job in jobs)
    with torch.inference_mode():
        rows = model.generate(**inputs, max_new_tokens=most, do_sample=False)
    said = processor.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(json.dumps({"seconds": time.perf_counter() - begin, "answers": said}), flush=True)
