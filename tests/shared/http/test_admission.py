"""Which requests are taken, wait or are refused."""

from __future__ import annotations

import asyncio

import pytest

from shared.admission import Admission
from shared.errors import JobError, StartError
from tests.helpers import until


def ready(running: int, waiting: int) -> Admission:
    admission = Admission()
    admission.open(running, waiting)
    return admission


async def hold(admission: Admission, release: asyncio.Event, order: list[int], number: int) -> None:
    with admission.admit():
        async with admission.slot():
            order.append(number)
            await release.wait()


async def test_slots_are_given_in_order_and_requests_beyond_the_limits_are_refused() -> None:
    admission, release, order = ready(2, 3), asyncio.Event(), list[int]()
    tasks = [asyncio.create_task(hold(admission, release, order, number)) for number in range(5)]
    await until(lambda: admission.in_flight == 2)
    assert (admission.waiting, order) == (3, [0, 1])
    with pytest.raises(JobError, match="2 requests run and 3 wait") as refused, admission.admit():
        pass
    assert refused.value.status == 429
    release.set()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]
    assert (admission.in_flight, admission.waiting) == (0, 0)


async def test_a_request_is_admitted_before_it_has_a_slot() -> None:
    admission = ready(1, 0)
    with admission.admit():
        assert (admission.in_flight, admission.waiting) == (0, 1)
        with pytest.raises(JobError), admission.admit():
            pass
        assert not admission.idle.is_set()
    assert admission.idle.is_set()


async def test_cancelled_requests_give_back_what_they_hold() -> None:
    admission, release, order = ready(1, 2), asyncio.Event(), list[int]()
    tasks = [asyncio.create_task(hold(admission, release, order, number)) for number in range(3)]
    await until(lambda: admission.in_flight == 1)
    tasks[1].cancel()  # waits
    tasks[0].cancel()  # runs
    await until(lambda: order == [0, 2])
    assert (admission.in_flight, admission.waiting) == (1, 0)
    release.set()
    await tasks[2]
    assert admission.idle.is_set()


async def test_each_state_refuses_with_its_cause() -> None:
    admission = Admission()
    with pytest.raises(JobError, match="loading") as refused:
        admission.check()
    assert (refused.value.status, refused.value.code) == (503, "not_ready")
    admission.fail(StartError("No such model.", code="model_not_found"))
    with pytest.raises(JobError, match="No such model") as refused:
        admission.check()
    assert (refused.value.status, refused.value.code) == (503, "model_not_found")
    admission.close("draining")
    assert admission.closed.is_set()
    with pytest.raises(JobError, match="draining") as refused:
        admission.check()
    assert refused.value.status == 503
