"""A hub id: its config.json alone is fetched, from a stand-in of the hub, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

from tests.hub.conftest import REPO_ID, environment, hub  # noqa: F401 (fixtures)
from tests.hub.stand_in import StandIn

MACHINE = ["--bandwidth", "100", "--tops", "10", "--dram", "64G", "--json"]


def run(variables: dict[str, str], *args: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "kttools", "plan", *args, *MACHINE]
    return subprocess.run(line, env=variables, capture_output=True, text=True)


def test_the_config_alone_is_fetched_and_kept(
    hub: StandIn,  # noqa: F811
    environment: dict[str, str],  # noqa: F811
    nano_checkpoint: Path,
) -> None:
    hub.add(REPO_ID, nano_checkpoint)
    first = run(environment, REPO_ID)
    assert first.returncode == 0, first.stderr
    document = json.loads(first.stdout)
    assert document["read_bytes"] is None
    assert document["commands"][0].startswith(f"kttools quantize {REPO_ID} -o nano-int8 ")
    assert {path for path, count in hub.served.items() if count} == {"config.json"}
    local = run(environment, str(nano_checkpoint))
    assert json.loads(local.stdout)["bundle_bytes"]["experts"] == document["bundle_bytes"]["experts"]
    offline = run({**environment, "HF_HUB_OFFLINE": "1"}, REPO_ID)
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["bundle_bytes"] == document["bundle_bytes"]


def test_without_the_hub_or_the_model_the_reason_is_said(
    hub: StandIn,  # noqa: F811
    environment: dict[str, str],  # noqa: F811
) -> None:
    for variables, repo in (({"HF_HUB_OFFLINE": "1"}, REPO_ID), ({}, "org/other")):
        done = run({**environment, **variables}, repo)
        assert (done.returncode, done.stdout) == (7, "")
        assert len(done.stderr.splitlines()) == 1
        assert repo in done.stderr
