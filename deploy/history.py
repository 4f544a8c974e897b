"""What an endpoint was before each deploy, kept in the RunPod account: a rollback works from any clone.

RunPod lists an endpoint's releases with partial diffs, which do not make a body again. So the body before
each change is kept in the environment of a private template named `<endpoint>.releases`, which nothing runs:
RELEASE_1 is the oldest. It is written before the change, so that an interruption at any moment loses nothing;
a release that equals the endpoint as it is counts as none.
"""

from __future__ import annotations

import json
from typing import Any

from deploy.api import Api, Body, Template, Unanswered

KEPT = 5
_MODELS, _RELEASE = "CACHED_MODELS", "RELEASE_"


class History:
    """The earlier releases of the endpoint `name`, oldest first. models: its cached models."""

    def __init__(self, api: Api, name: str) -> None:
        self._api, self._title = api, f"{name}.releases"
        self._template = api.template(self._title)
        env = self._template.env if self._template else {}
        self.models: list[str] = json.loads(env.get(_MODELS, "[]"))
        numbers = sorted(int(key.removeprefix(_RELEASE)) for key in env if key.startswith(_RELEASE))
        self._releases: list[Body] = [json.loads(env[f"{_RELEASE}{number}"]) for number in numbers]

    def earlier(self, current: Body) -> Body | None:
        """The latest release that differs from `current`."""
        return next((release for release in reversed(self._releases) if release != current), None)

    def record(self, current: Body | None, new: Body) -> None:
        """Keep `current`, which `new` is about to replace.

        An endpoint that was stopped, since its first release failed, is nothing to go back to.
        """
        if current is not None and current["workers"]["max"]:
            self._releases = [*self._releases, current][-KEPT:]
        elif not new["cachedModels"] and not self._template:
            return
        self.models = new["cachedModels"]
        env = {f"{_RELEASE}{number}": json.dumps(body) for number, body in enumerate(self._releases, 1)}
        self._write(new["image"], {**env, _MODELS: json.dumps(self.models)})

    def delete(self) -> None:
        if self._template:
            self._api.delete(f"templates/{self._template.id}")

    def _write(self, image: str, env: dict[str, str]) -> None:
        if self._template is None:
            body: dict[str, Any] = {"name": self._title, "image": image, "env": env, "serverless": True}
            try:
                made = self._api.send(
                    "POST", "/v2/templates", {**body, "startSsh": False, "startJupyter": False}
                )
                self._template = Template.model_validate(made)
                return
            except Unanswered:
                self._template = self._api.template(self._title)
                if self._template is None:
                    raise
        self._api.send("PATCH", f"/v2/templates/{self._template.id}", {"env": env})
