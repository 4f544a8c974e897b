"""The tgi worker in HTTP mode, with the stand-in for TGI's server and the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.shared.http.servers import running
from tools.models import local_env

pytestmark = pytest.mark.engine
TALK: Any = [{"role": "user", "content": "Name three rivers."}]
CHAT: Any = {"model": "tgi", "messages": TALK, "max_tokens": 20, "seed": 3}


def test_answers_and_the_end_of_a_worker_whose_tgi_dies() -> None:
    with (
        running(module="workers.tgi.handler", **local_env("tgi")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client,
    ):
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id).id == model.id == "stand-in/no-model"
        plain = client.chat.completions.create(**CHAT).choices[0].message.content or ""
        chunks = list(client.chat.completions.create(**CHAT, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.rstrip("\ufffd")
        events = server.work(messages=TALK, max_tokens=20, temperature=0, stream=True).text.split("\n\n")
        assert len(events) > 3
        assert '"finish_reason"' in events[-2]
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tgi", prompt="[[die 1]]")
        assert (caught.value.status_code, caught.value.code) == (503, "engine_died")
        assert server.end() == 1
