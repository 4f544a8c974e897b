"""Prewarm requests go through the real handler."""

from __future__ import annotations

from typing import Any

import pytest

from shared import prewarm
from shared.errors import JobError, StartError
from shared.jobs import Job, Request, job_handler


class Ask(Request):
    n: int


def test_prewarm_sends_jobs_in_order_and_stops_at_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    @job_handler(Ask)
    async def handler(request: Ask, job: Job) -> Any:
        seen.append(request.n)
        if request.n == 2:
            raise JobError("broken")
        return {"ok": True}

    prewarm.run(handler, [{"n": 0}, {"n": 1}])
    assert "phase=prewarm seconds=" in capsys.readouterr().out
    with pytest.raises(StartError, match="broken") as caught:
        prewarm.run(handler, [{"n": 2}, {"n": 3}])
    assert caught.value.code == "prewarm_failed"
    assert seen == [0, 1, 2]
    assert handler.in_flight == 0
