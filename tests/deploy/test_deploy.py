"""plan, deploy, rollback, status, logs and destroy against the account that stands in for RunPod's."""

from __future__ import annotations

import io
from typing import Any

import pytest

from tests.deploy.conftest import WORKER, Cli
from tests.deploy.stand_in import Account, interrupt, problem


def test_deploy_makes_the_endpoint_and_tells_how_to_call_it(runpod: Account, cli: Cli) -> None:
    assert cli("deploy", "--tag=1.0.0", env={"MAX_BATCH_TOKENS": "4096"}, secrets={"HF_TOKEN": "hf"}) == 0
    (endpoint,) = runpod.named(WORKER)
    assert endpoint["image"] == "docker.io/me/worker-sentence-transformers:1.0.0"
    assert endpoint["env"] == {"MAX_BATCH_TOKENS": "4096", "HF_TOKEN": "{{ RUNPOD_SECRET_hf }}"}
    assert endpoint["gpu"]["pools"] == ["AMPERE_16", "ADA_24"]
    assert endpoint["timeout"] == 600_000
    url = endpoint["requestUrls"]["runSync"]
    for text in (f"curl -s {url}", '"Authorization: Bearer $RUNPOD_API_KEY"', "OpenAI(base_url", "1 idle"):
        assert text in cli.out
    assert "AMPERE_16 $0.58, ADA_24 $1.10. At least $0.00, at most $3.30 an hour" in cli.out


def test_http_endpoint_has_its_port_in_three_places(runpod: Account, cli: Cli) -> None:
    result = cli.json("deploy", "--tag=1.0.0", "--type=http")
    (endpoint,) = runpod.named(WORKER)
    assert endpoint["ports"] == ["8000/http"]
    assert endpoint["env"] == {"SERVE_MODE": "http", "PORT": "8000", "PORT_HEALTH": "8000"}
    assert endpoint["scaling"] == {"type": "REQUEST_COUNT", "requestCount": 16}
    assert result["output"] == {"fine": True}
    assert result["endpoint"]["request_urls"]["base"] == endpoint["requestUrls"]["base"]


def test_plan_changes_nothing(runpod: Account, cli: Cli) -> None:
    plan = cli.json("plan", "--tag=1.0.0", env={"API_KEY": "abc", "A": "1"})
    assert plan["action"] == "create"
    assert {"env.API_KEY: unset -> ***", "env.A: unset -> '1'"} <= set(plan["changes"])
    assert not runpod.endpoints
    cli("deploy", "--tag=1.0.0")
    assert cli.json("plan", "--tag=1.0.0") | {"price_per_hour": 0} == {
        "action": "none",
        "changes": [],
        "exit": 0,
        "price_per_hour": 0,
    }
    plan = cli.json("plan", "--tag=1.0.1", workers_max=5, env={"API_KEY": "abc"})
    assert plan["changes"] == [
        f"image: 'docker.io/me/worker-{WORKER}:1.0.0' -> 'docker.io/me/worker-{WORKER}:1.0.1'",
        "env.API_KEY: unset -> ***",
        "workers.max: 3 -> 5",
    ]
    assert not runpod.sent("PATCH")


@pytest.mark.parametrize(
    ("before", "after", "body"),
    [
        ({"env": {"A": "1", "B": "2"}}, {"env": {"A": "3"}}, {"env": {"A": "3"}}),
        ({"env": {"A": "1"}}, {"env": {"A": "1", "B": "2"}}, {"env": {"A": "1", "B": "2"}}),
        (
            {"excluded_types": ["NVIDIA L4"]},
            {"excluded_types": ["NVIDIA L4"], "pools": ["ADA_24"]},
            {"gpu": {"pools": ["ADA_24"], "excludedTypes": ["NVIDIA L4"]}},
        ),
        (
            {"excluded_types": ["NVIDIA L4"]},
            {"excluded_types": ["NVIDIA L4"], "cuda": "12.4"},
            {"gpu": {"minCudaVersion": "12.4"}},
        ),
        (
            {"excluded_types": ["NVIDIA L4"]},
            {},
            {"gpu": {"pools": ["AMPERE_16", "ADA_24"], "excludedTypes": []}},
        ),
        ({}, {"gpu_count": 2}, {"gpu": {"count": 2}}),
        (
            {},
            {"scaler": "request_count", "request_count": 5, "workers_max": 4},
            {"scaling": {"type": "REQUEST_COUNT", "requestCount": 5}, "workers": {"min": 0, "max": 4}},
        ),
        (
            {"scaler": "request_count"},
            {},
            {
                "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4.0},
                "workers": {"min": 0, "max": 3, "idleTimeout": 5},
            },
        ),
        ({}, {"flashboot": "off", "execution_timeout": 9}, {"flashboot": "OFF", "timeout": 9000}),
        ({"registry": "cred"}, {"volumes": ["v"]}, {"registry": None, "networkVolumes": ["v"]}),
    ],
)  # fmt: skip
def test_patch_has_what_differs_and_the_endpoint_is_then_as_wanted(
    runpod: Account, cli: Cli, before: Any, after: Any, body: Any
) -> None:
    assert cli("deploy", "--tag=1.0.0", **before) == 0
    assert cli("deploy", **after) == 0
    assert runpod.sent("PATCH") == [body]
    assert cli.json("plan", **after)["action"] == "none"


def test_what_is_not_named_stays_as_the_endpoint_has_it(runpod: Account, cli: Cli) -> None:
    cli("deploy", "--tag=1.0.0", "--type=http", "--model=org/one")
    assert cli("deploy", "--tag=1.0.1") == 0
    (endpoint,) = runpod.named(WORKER)
    assert (endpoint["type"], endpoint["env"]["MODEL_NAME"]) == ("LOAD_BALANCER", "org/one")
    assert endpoint["image"].endswith(":1.0.1")


def test_busy_workers_of_the_earlier_release_are_not_waited_for(runpod: Account, cli: Cli) -> None:
    runpod.busy = True
    cli("deploy", "--tag=1.0.0")
    assert cli("deploy", "--tag=1.0.1") == 0
    assert "1.0.1  1 old release, 1 idle" in cli.out


def test_endpoint_that_the_console_marked_for_flashboot_is_the_same(runpod: Account, cli: Cli) -> None:
    cli("deploy", "--tag=1.0.0")
    runpod.endpoints["ep1"]["name"] += " -fb"
    assert cli.json("deploy", "--tag=1.0.1")["action"] == "update"
    assert list(runpod.endpoints) == ["ep1"]


def test_another_type_takes_another_endpoint_and_is_asked_for(runpod: Account, cli: Cli) -> None:
    cli("deploy", "--tag=1.0.0")
    (old,) = runpod.endpoints
    assert cli("deploy", "--type=http") == 5
    assert "cannot change its type from QUEUE to LOAD_BALANCER" in cli.err
    assert list(runpod.endpoints) == [old]
    assert cli("deploy", "--type=http", "--yes") == 0
    (endpoint,) = runpod.named(WORKER)
    assert (endpoint["type"], endpoint["id"] != old) == ("LOAD_BALANCER", True)


def test_cached_model_goes_through_graphql_and_stays(runpod: Account, cli: Cli) -> None:
    cached = {"cached_model": True, "excluded_types": ["NVIDIA L4"], "data_centers": ["EU-RO-1"]}
    assert cli("deploy", "--tag=1.0.0", "--model=org/one", **cached) == 0
    (endpoint,) = runpod.named(WORKER)
    assert runpod.models[endpoint["id"]] == ["https://huggingface.co/org/one:main"]
    assert cli.json("plan", **cached)["action"] == "none"
    assert cli("deploy", "--tag=1.0.1", "--model=org/two", **cached) == 0
    assert list(runpod.models.values()) == [["https://huggingface.co/org/two:main"]]
    assert cli("rollback") == 0
    assert list(runpod.models.values()) == [["https://huggingface.co/org/one:main"]]
    assert cli("deploy", "--model=minilm", **cached) == 2
    assert "as owner/name, not 'minilm'" in cli.err


def test_rollback_puts_back_what_was_sent_and_toggles(runpod: Account, cli: Cli) -> None:
    assert cli("rollback") == 6
    cli("deploy", "--tag=1.0.0", env={"A": "1"})
    assert cli("rollback") == 6
    cli("deploy", "--tag=1.0.1", env={"A": "2"}, workers_max=7, pools=["ADA_24"])
    first = {"image": ":1.0.0", "A": "1", "max": 3, "pools": ["AMPERE_16", "ADA_24"]}
    second = {"image": ":1.0.1", "A": "2", "max": 7, "pools": ["ADA_24"]}
    for expected in (first, second, first):
        assert cli("rollback") == 0
        (endpoint,) = runpod.named(WORKER)
        assert expected == {
            "image": endpoint["image"][-6:],
            "A": endpoint["env"]["A"],
            "max": endpoint["workers"]["max"],
            "pools": endpoint["gpu"]["pools"],
        }


def test_status_shows_workers_releases_and_price(runpod: Account, cli: Cli) -> None:
    assert cli("status") == 6
    cli("deploy", "--tag=1.0.0")
    cli("deploy", "--tag=1.0.1")
    assert cli("status") == 0
    for text in ("ep1w2  IDLE", "NVIDIA L4", "release 2", "template.imageName", ":1.0.1"):
        assert text in cli.out
    result = cli.json("status")
    assert result["workers"][0]["status"] == "IDLE"
    assert result["price_per_hour"]["max"] == pytest.approx(3.3)


def test_logs_follow_until_ctrl_c(runpod: Account, cli: Cli) -> None:
    cli("deploy", "--tag=1.0.0")
    asked = 0

    def ctrl_c(method: str, path: str) -> Any:
        nonlocal asked
        asked += path.endswith("/logs")
        if asked == 4:  # the stream ended, was refused, and was taken up again where it ended
            interrupt()
        return problem(500, "internal error") if asked == 2 and path.endswith("/logs") else None

    runpod.before = ctrl_c
    assert cli("logs") == 130
    assert "ep1w1 container Worker ready.\n" in cli.out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "status"), [("n\n", 5), ("\n", 5), ("y\n", 0)])
def test_question_on_a_terminal_is_answered(
    runpod: Account, cli: Cli, monkeypatch: pytest.MonkeyPatch, answer: str, status: int
) -> None:
    cli("deploy", "--tag=1.0.0")
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert cli("destroy") == status
    assert "Delete sentence-transformers (ep1), its workers and its queued jobs? [y/N]" in cli.err
    assert bool(runpod.endpoints) == (status == 5)


def test_destroy_asks_and_leaves_nothing(runpod: Account, cli: Cli) -> None:
    cli("deploy", "--tag=1.0.0")
    cli("deploy", "--tag=1.0.1")
    assert runpod.templates
    assert cli("destroy") == 5
    assert runpod.endpoints
    assert cli.json("destroy", "--yes")["deleted"] == "ep1"
    assert not runpod.endpoints
    assert not runpod.templates


@pytest.mark.parametrize(
    ("options", "config", "problem"),
    [
        ([], {}, "TAG is not set"),
        (["--tag=1.0.0"], {"required": ["MODEL_NAME"]}, "MODEL_NAME is not set, and"),
        (["--tag=1.0.0"], {"pools": ["ADA_42"]}, "RunPod has no pool ADA_42. Its pools: ADA_24, ADA_80_PRO"),
        (["--tag=1.0.0"], {"gpus": 1}, "gpus = 1: Extra inputs are not permitted"),
    ],
)
def test_wrong_order_is_refused_before_anything_is_made(
    runpod: Account, cli: Cli, options: list[str], config: Any, problem: str
) -> None:
    assert cli("deploy", *options, **config) == 2
    assert problem in cli.err
    assert not runpod.endpoints


def test_key_comes_from_the_environment_only(
    runpod: Account, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY")
    assert cli("plan", "--tag=1.0.0") == 2
    assert "RUNPOD_API_KEY is not set" in cli.err
