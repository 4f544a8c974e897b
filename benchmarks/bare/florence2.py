"""transformers' Florence-2 and nothing else, all pictures in one batch: florence2.py MODEL.

Reads JSON lists of jobs, `{"image", "task"}`, one a line; answers each with the seconds from base64 to parsed
answers, and what the model said.
"""

import base64
import io
import json
import sys
import time

import torch
from PIL import Image
from transformers import AutoProcessor, Florence2ForConditionalGeneration

processor = AutoProcessor.from_pretrained(sys.argv[1])
model = Florence2ForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
for line in sys.stdin:
    jobs = json.loads(line)
    begin = time.perf_counter()
    images = [Image.open(io.BytesIO(base64.b64decode(job["image"]))).convert("RGB") for job in jobs]
    prompts = [f"<{job['task']}>" for job in jobs]
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    with torch.inference_mode():
        rows = model.generate(**inputs, max_new_tokens=1024, num_beams=3, do_sample=False)
    said = [
        text.replace("<pad>", "").replace("<s>", "").replace("</s>", "")
        for text in processor.batch_decode(rows, skip_special_tokens=False)
    ]
    for text, prompt, image in zip(said, prompts, images, strict=True):
        processor.post_process_generation(text=text, task=prompt, image_size=image.size)
    print(json.dumps({"seconds": time.perf_counter() - begin, "answers": said}), flush=True)
