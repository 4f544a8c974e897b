"""litellm and langchain-openai, unmodified, against the toy worker."""

from __future__ import annotations

from typing import Any

import pytest

from tests.shared.http.servers import Server

TALK: Any = [{"role": "user", "content": "hi"}]


@pytest.mark.engine
def test_litellm(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network
    import litellm

    ask: dict[str, Any] = {"model": "openai/toy", "api_base": f"{server.url}/v1", "api_key": "any"}
    ask |= {"messages": TALK, "num_retries": 0}
    answer = litellm.completion(**ask)
    assert (answer.choices[0].message.content, answer.usage.total_tokens) == ("a b c", 5)
    chunks = litellm.completion(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "abc"
    with pytest.raises(litellm.NotFoundError, match="not served here"):
        litellm.completion(**ask | {"model": "openai/other"})


@pytest.mark.engine
def test_langchain(server: Server) -> None:
    from langchain_openai import ChatOpenAI
    from openai import BadRequestError

    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key="any", model="toy", max_retries=0)  # type: ignore[arg-type]
    answer = chat.invoke("hi")
    assert answer.content == "a b c"
    assert answer.usage_metadata
    assert answer.usage_metadata["total_tokens"] == 5
    assert "".join(str(chunk.content) for chunk in chat.stream("hi")) == "abc"
    with pytest.raises(BadRequestError, match="not to the toy's liking"):
        chat.invoke("hi", extra_body={"fail": "invalid"})
