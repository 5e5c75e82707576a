"""What is settled before Ray is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tandem.cluster.launch.local_ray import join_ray, remedy

SCRIPT = """
import sys, types
sys.modules["ray"] = types.ModuleType("ray")  # whoever embeds a cluster has imported it
from tandem.cluster.launch.local_ray import prepare_environment
prepare_environment(local=True)
"""


def test_a_ray_that_was_imported_too_early_to_stay_on_loopback_is_refused() -> None:
    def run(setting: dict[str, str]) -> subprocess.CompletedProcess[str]:
        # Not this process's environment: a cluster that it has run has settled the matter there.
        env = {"PATH": "/usr/bin", **setting}
        return subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=60)

    assert "RuntimeError: this program imported ray before it started a cluster" in run({}).stderr
    assert run({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}).returncode == 0


def test_the_modules_that_speak_to_actors_do_not_import_ray_by_themselves() -> None:
    script = "import sys, tandem.cluster.launch.manager, tandem.cluster.launch.ray_cluster; print('ray' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "False"


def test_a_ray_that_did_not_come_up_in_time_has_a_remedy() -> None:
    raised = "the local Ray could not be reached: The current node timed out during startup."
    assert remedy(raised, load=12.0, processors=2).startswith(
        "; the machine is busy (load 12 on 2 processors): start again when less runs, or have it join a Ray that runs"
    )
    assert "not busy (load 1 on 2 processors): look for room in" in remedy(raised, load=1.0, processors=2)
    assert remedy("no such file", load=12.0, processors=2) == ""


def test_a_ray_that_is_not_there_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # nothing of Ray is needed to find that out
    with pytest.raises(ConnectionError, match=r"nobody listens there \(Connection refused\)"):
        join_ray("127.0.0.1:1")
