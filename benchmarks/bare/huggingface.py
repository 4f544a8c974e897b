"""transformers and nothing else: huggingface.py MODEL TOKENS, with an object on standard input:
{"even": [prompt, ...], "mixed": [[prompt, tokens], ...], "gap": seconds}.

Prints the seconds of the first prompt through `generate` (the median of three). Then, for the engine of
serving.continuous_batching and for transformers' continuous batching with both attentions of a CPU: the
seconds of the first prompt (the median of three), those of all of `even` at once, the latencies of `mixed`,
which come `gap` seconds apart, and how many answers to `even` are not generate's. One after another, in one
process.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from serving.continuous_batching.generator import Generator
from serving.continuous_batching.sampling import SamplingParams

Asked = Sequence[tuple[list[int], int]]  # prompts and the tokens of their answers
Answers = tuple[float, list[float], list[list[int]]]  # seconds of all, latencies, tokens


def load(name: str, attention: str) -> AutoModelForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    return model.eval()


def generate(model: AutoModelForCausalLM, ids: list[int], tokens: int) -> tuple[float, list[int]]:
    begin = time.perf_counter()
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return time.perf_counter() - begin, out[0, len(ids) :].tolist()


class Engine:
    def __init__(self, model: AutoModelForCausalLM, tokenizer: AutoTokenizer, **settings: int) -> None:
        self.generator = Generator(model, tokenizer, **settings)
        self.generator.eos_token_ids = frozenset()

    def run(self, asked: Asked, gap: float) -> Answers:
        async def one(number: int, ids: list[int], most: int) -> tuple[float, list[int]]:
            await asyncio.sleep(number * gap)
            begin = time.perf_counter()
            tensor = torch.tensor([ids])
            inputs = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}
            # logprobs carry the token ids
            async with aclosing(
                self.generator.stream(inputs, SamplingParams(most, logprobs=0), each=False)
            ) as deltas:
                delta = await anext(deltas)
            return time.perf_counter() - begin, [logprob.token_id for logprob in delta.logprobs]

        async def everything() -> Answers:
            begin = time.perf_counter()
            answers = await asyncio.gather(*(one(i, *each) for i, each in enumerate(asked)))
            took = time.perf_counter() - begin
            return took, [late for late, _ in answers], [ids for _, ids in answers]

        return asyncio.run(everything())


@contextmanager
def engine(model: AutoModelForCausalLM, tokenizer: AutoTokenizer, **settings: int) -> Iterator[Engine]:
    made = Engine(model, tokenizer, **settings)
    yield made
    made.generator.close()


class Manager:
    def __init__(self, manager: object) -> None:
        self.manager = manager

    def run(self, asked: Asked, gap: float) -> Answers:
        begin, sent = time.perf_counter(), 0
        late: dict[int, float] = {}
        made: dict[int, list[int]] = {}
        while len(late) < len(asked):
            now = time.perf_counter() - begin
            if sent < len(asked) and now >= sent * gap:
                ids, most = asked[sent]
                self.manager.add_request(ids, request_id=str(sent), max_new_tokens=most)
                sent += 1
                continue
            if not self.manager.is_running():
                raise RuntimeError("the manager stopped")
            result = self.manager.get_result(timeout=sent * gap - now if sent < len(asked) else 1)
            if result is not None and result.is_finished():
                number = int(result.request_id)
                late[number] = time.perf_counter() - begin - number * gap
                made[number] = result.generated_tokens
        took = time.perf_counter() - begin
        numbers = range(len(asked))
        return took, [late[i] for i in numbers], [made[i] for i in numbers]


@contextmanager
def continuous(
    model: AutoModelForCausalLM, tokens: int, settings: ContinuousBatchingConfig
) -> Iterator[Manager]:
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=settings
    ) as manager:
        yield Manager(manager)


def measure(
    runs: Engine | Manager, even: Asked, mixed: Asked, gap: float, expected: list[list[int]]
) -> dict[str, object]:
    runs.run([(even[0][0][:2], 2)], 0)
    one = statistics.median(runs.run(even[:1], 0)[0] for _ in range(3))
    took, _, made = runs.run(even, 0)
    wrong = sum(a != b for a, b in zip(made, expected, strict=True))
    return {"one": one, "even": took, "mixed": runs.run(mixed, gap)[1], "wrong": wrong}


def main() -> None:
    name, tokens = sys.argv[1], int(sys.argv[2])
    wanted = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(name)
    even: Asked = [(tokenizer(text)["input_ids"], tokens) for text in wanted["even"]]
    mixed: Asked = [(tokenizer(text)["input_ids"], most) for text, most in wanted["mixed"]]
    model = load(name, "sdpa")
    expected = [generate(model, ids, tokens)[1] for ids, _ in even]
    lone = statistics.median(generate(model, even[0][0], tokens)[0] for _ in range(3))
    found: dict[str, object] = {"generate": lone}

    def manager(model: AutoModelForCausalLM) -> AbstractContextManager[Manager]:
        settings = ContinuousBatchingConfig(num_blocks=256, page_size=32, max_batch_tokens=512)
        return continuous(model, tokens, settings)

    for label, opened, attention in (
        ("engine", lambda model: engine(model, tokenizer), "sdpa"),
        ("continuous sdpa", manager, "sdpa"),
        ("continuous eager", manager, "eager"),
    ):
        try:
            with opened(load(name, attention)) as runs:
                found[label] = measure(runs, even, mixed, wanted["gap"], expected)
        except Exception as error:
            print(f"{label}: {error!r}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
