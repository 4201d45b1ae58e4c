"""What each memory node gets, before anything is loaded; and a model that is split over simulated nodes."""

import pytest

from kttools_runtime.errors import UsageError
from kttools_runtime.numa import NumaPlan, share_nodes

TOTAL = 1_000_003


@pytest.mark.parametrize(
    ("threads", "nodes", "parts"), [(2, 2, (1, 1)), (3, 2, (2, 1)), (1, 2, (1,)), (4, 1, (4,))]
)
def test_bytes_follow_the_workers(threads: int, nodes: int, parts: tuple[int, ...]) -> None:
    plan = share_nodes(TOTAL, "shard", threads, nodes)
    assert plan.node_bytes == tuple(TOTAL * part // threads for part in parts)
    assert plan.copied_bytes == 0
    copies = share_nodes(TOTAL, "replicate", threads, nodes)
    assert copies.node_bytes == (TOTAL,) * len(parts)
    assert copies.copied_bytes == (TOTAL * len(parts) if len(parts) > 1 else 0)


def test_auto_shards_only_where_there_are_nodes() -> None:
    assert share_nodes(TOTAL, "auto", 2, 2).mode == "shard"
    assert share_nodes(TOTAL, "auto", 2, 1).mode == "off"
    with pytest.raises(UsageError, match="auto, off, shard, replicate"):
        share_nodes(TOTAL, "isolate", 2)


def test_the_line_names_nodes_and_copies() -> None:
    assert NumaPlan("shard", (10**9, 2 * 10**9)).line() == (
        "NUMA shard: node 0: 1.00 GB, node 1: 2.00 GB of expert weights"
    )
    assert NumaPlan("replicate", (10**9,) * 2).line().endswith("; 2.00 GB of RAM for the copies")
