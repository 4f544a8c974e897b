"""The rules of the queue, on a clock that the test moves."""

import json
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from local.jobs import Job, Refused, Rules, State
from local.queue import Queue

INPUT = {"input": {"n": 1}}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> Queue:
    return Queue(Rules(), clock=clock)


def take(queue: Queue, worker: str = "a", limit: int = 1) -> list[Job]:
    """The jobs that the worker gets without waiting."""
    jobs: list[Job] = []
    deliver = jobs.extend
    queue.poll(worker, limit, deliver)
    queue.cancel_poll(worker, deliver)
    return jobs


def test_a_job_goes_through_its_states_and_times(queue: Queue, clock: Clock) -> None:
    job = queue.submit({"input": {"n": 1}, "s3Config": {"bucketName": "b"}, "other": 1}, sync=False)
    assert job.describe() == {"id": job.id, "status": "IN_QUEUE"}
    clock.now += 1.5
    (taken,) = take(queue)
    assert taken.payload == {"id": job.id, "input": {"n": 1}, "s3Config": {"bucketName": "b"}}
    assert job.describe() == {"id": job.id, "status": "IN_PROGRESS", "delayTime": 1500, "workerId": "a"}
    queue.report("a", job.id, {"status": "IN_PROGRESS", "output": "half"})
    assert (job.describe()["status"], job.describe()["output"]) == ("IN_PROGRESS", "half")
    clock.now += 0.25
    queue.report("a", job.id, {"output": None})
    times = {"delayTime": 1500, "executionTime": 250}
    done = {"id": job.id, "status": "COMPLETED", "workerId": "a", "output": None}
    assert job.describe() == done | times
    assert queue.health() == {"completed": 1, "failed": 0, "retried": 0, "inProgress": 0, "inQueue": 0}


@pytest.mark.parametrize(
    ("report", "state", "result"),
    [
        ({"output": [1]}, "COMPLETED", {"output": [1]}),
        ({}, "COMPLETED", {}),
        ({"error": "no"}, "FAILED", {"error": "no"}),
        ({"error": "no", "output": {"partial": 1}}, "FAILED", {"error": "no", "output": {"partial": 1}}),
        ({"error": {"message": "no"}}, "COMPLETED", {}),
        ({"output": 1, "stopPod": True}, "COMPLETED", {"output": 1}),
    ],
)
def test_job_results(queue: Queue, report: dict[str, object], state: str, result: dict[str, object]) -> None:
    job = queue.submit(INPUT, sync=False)
    take(queue)
    queue.report("a", job.id, report)
    assert (job.state, job.result) == (state, result)


@pytest.mark.parametrize(
    "body",
    [
        *(None, [], {}, {"prompt": 1}),
        *({"input": 1, "policy": policy} for policy in ([1], {"ttl": 9999}, {"ttl": 7 * 86400 * 1000 + 1})),
        *({"input": 1, "policy": {"executionTimeout": timeout}} for timeout in (4999, "1h", True)),
        *({"input": 1, "webhook": webhook} for webhook in ("file:///etc/passwd", 5)),
    ],
)
def test_wrong_bodies_are_refused(queue: Queue, body: object) -> None:
    with pytest.raises(Refused) as refused:
        queue.submit(body, sync=False)
    assert refused.value.status == 400
    assert queue.health()["inQueue"] == 0


def test_an_empty_input_is_left_out_as_on_runpod(queue: Queue) -> None:
    queue.submit({"input": {}}, sync=False)
    assert "input" not in take(queue)[0].payload


@pytest.mark.parametrize("seconds", [0, 0.5, 1.5])
def test_the_ping_interval_must_be_one_the_sdk_can_keep(seconds: float) -> None:
    with pytest.raises(ValueError, match="ping_interval"):
        Rules(ping_interval=seconds)


def test_a_full_queue_refuses(clock: Clock) -> None:
    queue = Queue(Rules(queue_per_worker=60), clock=clock)
    for _ in range(61):
        queue.submit(INPUT, sync=False)
    with pytest.raises(Refused) as refused:
        queue.submit(INPUT, sync=False)
    assert refused.value.status == 429
    queue.submit(INPUT, sync=False, workers=2)


def test_ttl_removes_a_job_wherever_it_is(queue: Queue, clock: Clock) -> None:
    stops: list[str] = []
    body = {**INPUT, "policy": {"ttl": 10_000}}
    runs, waits = queue.submit(body, sync=False), queue.submit(body, sync=False)
    take(queue)
    queue.poll_stops("a", stops.extend)
    clock.now += 9.9
    queue.ping("a", [runs.id])
    queue.expire()
    assert (runs.state, waits.state) == (State.IN_PROGRESS, State.IN_QUEUE)
    clock.now += 0.2
    queue.expire()
    assert (runs.state, waits.state) == (State.TIMED_OUT, State.TIMED_OUT)
    assert stops == [runs.id]
    with pytest.raises(Refused) as refused:
        queue.get(runs.id)
    assert refused.value.status == 404
    with pytest.raises(Refused):
        queue.report("a", runs.id, {"output": 1})


def test_execution_timeout_counts_the_run_only(queue: Queue, clock: Clock) -> None:
    stops: list[str] = []
    job = queue.submit({**INPUT, "policy": {"executionTimeout": 5000, "lowPriority": True}}, sync=False)
    clock.now += 100
    queue.expire()
    take(queue)
    queue.poll_stops("a", stops.extend)
    clock.now += 4.9
    queue.expire()
    assert job.state is State.IN_PROGRESS
    clock.now += 0.2
    queue.expire()
    assert job.describe() | {"status": "TIMED_OUT", "error": "executionTimeout exceeded"} == job.describe()
    assert stops == [job.id]
    queue.report("a", job.id, {"output": "late"})
    assert "output" not in job.result


@pytest.mark.parametrize(("sync", "kept"), [(True, 60), (False, 1800)])
def test_retention(queue: Queue, clock: Clock, sync: bool, kept: int) -> None:
    job = queue.submit(INPUT, sync=sync)
    take(queue)
    queue.report("a", job.id, {"output": 1})
    clock.now += kept - 1
    queue.expire()
    assert queue.get(job.id) is job
    clock.now += 1
    queue.expire()
    assert job.id not in queue.jobs


def test_an_expired_lease_requeues_a_job_once_then_fails_it(queue: Queue, clock: Clock) -> None:
    job, kept = queue.submit(INPUT, sync=False), queue.submit(INPUT, sync=False)
    take(queue, limit=2)
    for _ in range(5):
        clock.now += 9
        queue.ping("a", [kept.id])
        queue.expire()
    assert (job.state, job.retries, kept.state) == (State.IN_QUEUE, 1, State.IN_PROGRESS)
    with pytest.raises(Refused):
        queue.report("a", job.id, {"output": "late"})
    assert take(queue, "b") == [job]
    queue.drop_worker("b")
    assert job.state is State.FAILED
    assert job.describe()["error"] == "job timed out after 1 retries"
    assert queue.health()["retried"] == 1


def test_a_dead_workers_ping_and_result_count_for_nothing(queue: Queue, clock: Clock) -> None:
    job = queue.submit(INPUT, sync=False)
    take(queue)
    queue.drop_worker("a")
    assert take(queue, "b") == [job]
    clock.now += 39
    queue.ping("a", [job.id])
    clock.now += 2
    queue.expire()
    assert job.state is State.FAILED


def test_retry_runs_a_failed_job_again_under_its_id(queue: Queue) -> None:
    job = queue.submit(INPUT, sync=False)
    with pytest.raises(Refused):
        queue.retry(job)
    take(queue)
    queue.stream("a", job.id, "part")
    queue.report("a", job.id, {"error": "no"})
    queue.retry(job)
    assert job.describe() == {"id": job.id, "status": "IN_QUEUE"}
    assert not job.chunks
    assert take(queue, "b") == [job]
    queue.report("b", job.id, {"output": 2})
    assert job.result == {"output": 2}


def test_retry_starts_the_ttl_anew(queue: Queue, clock: Clock) -> None:
    job = queue.submit({**INPUT, "policy": {"ttl": 20_000}}, sync=False)
    take(queue)
    queue.report("a", job.id, {"error": "no"})
    clock.now += 41
    queue.retry(job)
    clock.now += 19
    queue.expire()
    assert job.state == "IN_QUEUE"
    clock.now += 1
    queue.expire()
    assert job.state == "TIMED_OUT"


def test_a_job_without_its_worker_returns_to_the_head_of_the_queue(queue: Queue) -> None:
    first, second = queue.submit(INPUT, sync=False), queue.submit(INPUT, sync=False)
    take(queue, "a")
    queue.drop_worker("a")
    assert take(queue, "b") == [first]
    assert take(queue, "b") == [second]


def test_polling_workers_get_jobs_by_fewest_leases_then_by_time(queue: Queue) -> None:
    got: dict[str, list[Job]] = {"a": [], "b": [], "c": []}
    queue.submit(INPUT, sync=False)
    queue.poll("a", 4, got["a"].extend)
    for worker in ("a", "b", "c"):
        queue.poll(worker, 4, got[worker].extend)
    for worker in ("b", "c", "a"):
        before = len(got[worker])
        queue.submit(INPUT, sync=False)
        assert len(got[worker]) == before + 1


def test_no_worker_takes_more_than_its_share(queue: Queue) -> None:
    for worker in ("a", "b", "c"):
        queue.poll(worker, 1, lambda jobs: None)
        queue.withdraw(worker)
    for _ in range(30):
        queue.submit(INPUT, sync=False)
    assert len(take(queue, "a", 100)) == 10
    queue.drop_worker("b")
    queue.drop_worker("c")
    assert len(take(queue, "a", 100)) == 20


def test_stop_signals_wait_for_the_poll(queue: Queue) -> None:
    stops: list[str] = []
    jobs = [queue.submit(INPUT, sync=False) for _ in range(2)]
    take(queue, limit=2)
    for job in jobs:
        queue.cancel(job)
    queue.poll_stops("a", stops.extend)
    assert stops == [job.id for job in jobs]
    again = queue.submit(INPUT, sync=False)
    take(queue)
    queue.poll_stops("a", stops.extend)
    queue.cancel(again)
    assert stops[-1] == again.id
    queue.cancel(again)
    assert len(stops) == 3


def test_a_ping_without_a_lease_stops_the_job_again(queue: Queue) -> None:
    stops: list[str] = []
    cancelled, lost, done, runs = (queue.submit(INPUT, sync=False) for _ in range(4))
    take(queue, limit=4)
    queue.cancel(cancelled)
    queue.requeue([lost])
    queue.report("a", done.id, {"output": 1})
    queue.poll_stops("a", lambda names: None)
    queue.ping("a", [cancelled.id, lost.id, done.id, runs.id, "unknown"])
    queue.poll_stops("a", stops.extend)
    assert stops == [cancelled.id, lost.id, "unknown"]


def test_ended_polls_get_an_empty_answer(queue: Queue) -> None:
    answers: list[object] = []
    queue.poll("a", 1, answers.append)
    queue.poll_stops("a", answers.append)
    queue.withdraw("a")
    assert answers == [[], []]
    queue.submit(INPUT, sync=False)
    assert len(answers) == 2


@pytest.mark.parametrize(
    "chunk", ["naïve 🙂🙃 漢字" * 9, {"text": "🙂" * 20}, list(range(50))], ids=["text", "object", "list"]
)
def test_large_chunks_are_split_between_characters(clock: Clock, chunk: object) -> None:
    queue = Queue(Rules(chunk_bytes=16), clock=clock)
    job = queue.submit(INPUT, sync=False)
    take(queue)
    queue.stream("a", job.id, chunk)
    assert len(job.chunks) > 2
    assert all(len(part.encode()) <= 16 for part in job.chunks)
    joined = "".join(job.chunks)
    assert (joined if isinstance(chunk, str) else json.loads(joined)) == chunk
    queue.stream("a", job.id, {"a": 1})
    assert job.chunks[-1] == {"a": 1}


WORKERS = st.sampled_from(["a", "b", "c"])


class QueueMachine(RuleBasedStateMachine):
    """Any order of events: no job has two leases, none is lost, none is answered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ends: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()
        self.given: Counter[str] = Counter()
        self.leases: dict[str, set[str]] = {worker: set() for worker in ("a", "b", "c")}
        self.all: dict[str, Job] = {}
        self.queue = Queue(Rules(), clock=self.clock, on_end=lambda job: self.ends.update([job.id]))

    def pick(self, data: st.DataObject, *states: State) -> Job | None:
        jobs = [job for job in self.queue.jobs.values() if job.state in states]
        return data.draw(st.sampled_from(jobs)) if jobs else None

    @rule(sync=st.booleans(), ttl=st.sampled_from([0, 20_000]), timeout=st.sampled_from([0, 15_000]))
    def submit(self, sync: bool, ttl: int, timeout: int) -> None:
        body = {**INPUT, "policy": {"ttl": ttl, "executionTimeout": timeout}}
        job = self.queue.submit(body, sync=sync)
        self.all[job.id] = job

    @rule(worker=WORKERS, limit=st.integers(1, 3))
    def poll(self, worker: str, limit: int) -> None:
        def deliver(jobs: list[Job]) -> None:
            assert len(jobs) <= limit
            for job in jobs:
                self.given.update([job.id])
                self.leases[worker].add(job.id)

        self.queue.poll(worker, limit, deliver)

    @precondition(lambda self: any(self.leases.values()))
    @rule(data=st.data(), failed=st.booleans())
    def report(self, data: st.DataObject, failed: bool) -> None:
        worker = data.draw(st.sampled_from([worker for worker, leased in self.leases.items() if leased]))
        name = data.draw(st.sampled_from(sorted(self.leases[worker])))
        self.queue.report(worker, name, {"error": "no"} if failed else {"output": worker})

    @rule(worker=WORKERS, data=st.data())
    def report_without_a_lease(self, worker: str, data: st.DataObject) -> None:
        job = self.pick(data, State.IN_QUEUE, State.IN_PROGRESS)
        if job is not None and job.worker != worker:
            with pytest.raises(Refused):
                self.queue.report(worker, job.id, {"output": "stolen"})

    @rule(worker=WORKERS)
    def die(self, worker: str) -> None:
        self.queue.drop_worker(worker)

    @rule(worker=WORKERS)
    def ping(self, worker: str) -> None:
        self.queue.ping(worker, self.leases[worker])

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if job := self.pick(data, *State):
            self.queue.cancel(job)

    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        if job := self.pick(data, State.FAILED, State.TIMED_OUT):
            self.queue.retry(job)
            self.retried.update([job.id])

    @rule()
    def purge(self) -> None:
        self.queue.purge()

    @rule(seconds=st.sampled_from([1, 9, 41, 61, 1801]))
    def pass_time(self, seconds: int) -> None:
        self.clock.now += seconds
        self.queue.expire()

    @invariant()
    def every_job_has_one_lease_at_most(self) -> None:
        for worker, leased in self.leases.items():
            leased.intersection_update(
                name
                for name, job in self.queue.jobs.items()
                if job.state is State.IN_PROGRESS and job.worker == worker
            )
            assert self.queue.in_flight(worker) == len(leased)
        states = Counter(job.state for job in self.queue.jobs.values())
        health = self.queue.health()
        assert health["inQueue"] == states[State.IN_QUEUE]
        assert health["inProgress"] == states[State.IN_PROGRESS]

    @invariant()
    def every_job_ends_once(self) -> None:
        for name, job in self.all.items():
            assert self.ends[name] == self.retried[name] + job.state.final
            assert self.given[name] <= 2 * (1 + self.retried[name])
            assert job.state.final or name in self.queue.jobs

    @invariant()
    def no_job_waits_beside_an_idle_worker(self) -> None:
        assert not (self.queue.health()["inQueue"] and self.queue._polls)

    @invariant()
    def deadlines_hold(self) -> None:
        for job in self.queue.jobs.values():
            assert job.state.final or self.clock.now < job.created + job.ttl


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
