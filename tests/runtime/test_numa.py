"""What each memory node gets, before anything is loaded; and a model that is split over simulated nodes."""

from pathlib import Path

import pytest

from kttools_runtime.errors import UsageError
from kttools_runtime.numa import NumaPlan, plan_nodes


def pack_bytes(bundle: Path) -> int:
    return sum(file.stat().st_size for file in (bundle / "experts").iterdir())


@pytest.mark.parametrize(
    ("threads", "nodes", "parts"), [(2, 2, (1, 1)), (3, 2, (2, 1)), (1, 2, (1,)), (4, 1, (4,))]
)
def test_bytes_follow_the_workers(
    nano_bundle: Path, threads: int, nodes: int, parts: tuple[int, ...]
) -> None:
    total = pack_bytes(nano_bundle)
    plan = plan_nodes(nano_bundle, "shard", threads, nodes)
    assert plan.node_bytes == tuple(total * part // threads for part in parts)
    assert plan.copied_bytes == 0
    copies = plan_nodes(nano_bundle, "replicate", threads, nodes)
    assert copies.node_bytes == (total,) * len(parts)
    assert copies.copied_bytes == (total * len(parts) if len(parts) > 1 else 0)


def test_auto_shards_only_where_there_are_nodes(nano_bundle: Path) -> None:
    assert plan_nodes(nano_bundle, "auto", 2, 2).mode == "shard"
    assert plan_nodes(nano_bundle, "auto", 2, 1).mode == "off"
    with pytest.raises(UsageError, match="auto, off, shard, replicate"):
        plan_nodes(nano_bundle, "isolate", 2)


def test_the_line_names_nodes_and_copies() -> None:
    assert NumaPlan("shard", (10**9, 2 * 10**9)).line() == (
        "NUMA shard: node 0: 1.00 GB, node 1: 2.00 GB of expert weights"
    )
    assert NumaPlan("replicate", (10**9,) * 2).line().endswith("; 2.00 GB of RAM for the copies")
