"""A worker in its image, run by Docker in place of a handler's file."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Container:
    """How a worker's container is run.

    image: as built; nothing is pulled. options: further ones of `docker run`, such as `--gpus=all`.

    The container has this machine's network, since the platform listens on 127.0.0.1 only. Of the
    environment it gets what RunPod sets and what is the worker's own. /dev/shm is larger than Docker's 64 MB,
    which vLLM and collectives of several GPUs exceed.
    """

    image: str
    options: Sequence[str] = ()

    def command(self, worker_id: str, variables: Iterable[str]) -> list[str]:
        """The command that runs a worker until its end.

        variables: names only; Docker's client reads the values from its own environment.
        """
        passed = [f"--env={name}" for name in sorted(variables)]
        return [
            *("docker", "run", "--rm", "--pull=never", "--network=host", f"--name={self.name(worker_id)}"),
            "--shm-size=2g",
            *passed,
            *self.options,
            self.image,
        ]

    async def remove(self, worker_id: str) -> None:
        """End what outlives Docker's client, which may have been killed. It's no error when nothing does."""
        process = await asyncio.create_subprocess_exec(
            *("docker", "rm", "--force", self.name(worker_id)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await process.wait()

    @staticmethod
    def name(worker_id: str) -> str:
        """What the container of a worker is called."""
        return f"runpod-local-{worker_id}"
