"""What a cluster books of Ray's nodes."""

from __future__ import annotations

from typing import Any

import pytest
from tandem.cluster.config import ClusterConfig, ConfigError
from tandem.cluster.config_file import build_config
from tandem.cluster.launch.bundles import bundles_of, check_nodes, room_text, stages_booked

NEAR, FAR = "10.0.0.1", "10.0.0.2"


def cluster(**changes: Any) -> ClusterConfig:
    engine = {"tensor_parallel": 2, "pipeline_stages": 2}
    return build_config(None, {"prefill": {"workers": 1, "engine": engine}, "worker_cpus": 1, **changes})


def test_each_stage_has_a_bundle_for_all_its_ranks() -> None:
    assert bundles_of(cluster()) == [{"CPU": 0.2}, {"CPU": 2}, {"CPU": 2}, {"CPU": 1}]


def test_a_paced_worker_is_one_process_whatever_its_split() -> None:
    config = build_config(None, {"engine.device": "paced", "engine.tensor_parallel": 4, "worker_cpus": 1})
    assert bundles_of(config) == [{"CPU": 0.2}, {"CPU": 1}, {"CPU": 1}]
    assert stages_booked(config.engine) == 1


def test_members_stand_on_the_nodes_that_are_named() -> None:
    config = cluster(nodes={"prefill-0": [NEAR, FAR], "decode-0": [FAR], "router": [NEAR]})
    on = [{key for key in bundle if key != "CPU"} for bundle in bundles_of(config)]
    assert on == [{f"node:{NEAR}"}, {f"node:{NEAR}"}, {f"node:{FAR}"}, {f"node:{FAR}"}]
    whole = bundles_of(cluster(nodes={"prefill-0": [FAR]}))
    assert [f"node:{FAR}" in bundle for bundle in whole] == [False, True, True, False]


def test_gpus_are_booked_of_a_ray_that_was_there() -> None:
    shared: dict[str, Any] = {"engine.device": "cuda", "engine.gpu_memory_utilization": 0.45, "worker_cpus": 1}
    assert all("GPU" not in bundle for bundle in bundles_of(build_config(None, shared)))
    joined = shared | {"address": "10.0.0.1:6379"}
    assert [bundle.get("GPU") for bundle in bundles_of(build_config(None, joined))] == [None, 0.45, 0.45]
    of_four = build_config(None, joined | {"engine.tensor_parallel": 2, "engine.pipeline_stages": 2})
    assert [bundle.get("GPU") for bundle in bundles_of(of_four)] == [None, 2, 2, 2, 2]
    assert room_text(bundles_of(of_four)) == "8.2 CPUs and 8 GPUs"
    assert room_text(bundles_of(cluster())) == "5.2 CPUs"


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ({"prefill-1": [NEAR]}, r"nodes: 'prefill-1' .* this cluster's members, router, prefill-0, decode-0"),
        ({"prefill-0": [NEAR] * 3}, r"nodes\.prefill-0: .* addresses of nodes, 1, or 2 for its pipeline stages"),
        ({"decode-0": []}, r"nodes\.decode-0: \[\] .* addresses of nodes, 1"),
    ],
)
def test_nodes_that_mean_nothing_are_refused(nodes: dict[str, list[str]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cluster(nodes=nodes)


def test_a_node_that_ray_does_not_have_is_refused() -> None:
    check_nodes({"decode-0": (NEAR, FAR)}, [FAR, NEAR])
    with pytest.raises(ConfigError, match=r"nodes\.decode-0: '10\.0\.0\.3' .* one of Ray's nodes, 10\.0\.0\.1"):
        check_nodes({"decode-0": ("10.0.0.3",)}, [NEAR])
