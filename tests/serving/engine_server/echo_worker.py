"""A worker whose engine is engine.py: a job's text is the engine's echo."""

from __future__ import annotations

from typing import Any

from serving.engine_server.process import EngineServer
from shared import startup
from shared.jobs import Job, Request, job_handler
from shared.settings import WorkerSettings, read_settings
from tests.serving.engine_server.watched import command

server = EngineServer("engine", command("--child"), on_death=lambda error: handler.on_engine_death(error))


class Settings(WorkerSettings):
    model_name: str = "echo"


class Echo(Request):
    text: str


@job_handler(Echo)
async def handler(request: Echo, job: Job) -> dict[str, Any]:
    answer, _ = await server.call("POST", "/echo", request.text)
    return {"text": answer["got"]}


def prepare() -> WorkerSettings:
    server.start()
    server.prove(lambda: None)
    return read_settings(Settings)


if __name__ == "__main__":
    startup.serve(handler, prepare, worker="echo")
