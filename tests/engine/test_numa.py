"""Several memory nodes, simulated: every strip is taken once, by whoever, and results are the same bits."""

import numpy as np
import pytest
import torch

from kttools_runtime import _kernels
from kttools_runtime.errors import UsageError
from kttools_runtime.experts import ExpertEngine
from tests.engine import reference as ref

SPLITS = [(1, 2), (2, 2), (3, 2), (5, 3), (7, 7), (2, 5)]  # threads, nodes


@pytest.mark.parametrize("mode", ["shard", "replicate"])
@pytest.mark.parametrize("name", ref.FORMATS)
def test_nodes_do_not_change_results(isa: str, name: str, mode: str) -> None:
    rng = np.random.default_rng(7)
    experts = [ref.random_expert(rng, 192, 96, name) for _ in range(5)]
    for tokens in (1, 2, 40, 300):
        ids, weights = ref.routing(rng, tokens, 3, len(experts), missing=0.05)
        x = ref.to_bf16(ref.bf16_matrix(rng, tokens, 192))
        plain = ref.forward(ref.make_layer(_kernels.Engine(2, isa), experts), x, ids, weights)
        assert plain.any()
        for threads, nodes in SPLITS:
            layer = ref.make_layer(_kernels.Engine(threads, isa, mode, nodes), experts)
            for expert in range(len(experts)):
                layer.make_resident(expert)
            assert np.array_equal(ref.forward(layer, x, ids, weights), plain), (threads, nodes, tokens)


@pytest.mark.parametrize(("threads", "nodes"), SPLITS)
def test_shares_add_up_and_follow_the_workers(threads: int, nodes: int) -> None:
    torch.manual_seed(0)
    gate, up, down = torch.randn(2, 448, 96), torch.randn(2, 448, 96), torch.randn(2, 96, 448)
    whole = ExpertEngine(threads).layer_from_tensors(gate, up, down)
    engine = ExpertEngine(threads, numa="shard", simulated_nodes=nodes)
    assert engine.nodes == min(threads, nodes)
    split = engine.layer_from_tensors(gate, up, down).node_bytes
    assert len(split) == engine.nodes
    assert len(whole.node_bytes) == 1
    assert sum(split) == whole.node_bytes[0]
    workers = [len(range(node, threads, engine.nodes)) for node in range(engine.nodes)]
    strip = 2 * 32 * 128 + 2 * 32 * 448  # of each matrix of the two experts
    for node, count in enumerate(workers):
        assert abs(split[node] - sum(split) * count / threads) <= strip
    copies = ExpertEngine(threads, numa="replicate", simulated_nodes=nodes)
    assert copies.layer_from_tensors(gate, up, down).node_bytes == whole.node_bytes * copies.nodes


def test_auto_is_off_on_one_node_and_shards_several() -> None:
    assert ExpertEngine(2, numa="auto", simulated_nodes=2).nodes == 2
    assert ExpertEngine(2, numa="auto").nodes == min(2, len(_kernels.numa_nodes()))
    assert ExpertEngine(2, numa="off", simulated_nodes=2).nodes == 1


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="auto, off, shard, replicate"):
        ExpertEngine(2, numa="both")
    with pytest.raises(ValueError, match="simulated_nodes"):
        _kernels.Engine(2, None, "shard", 99)


def test_nodes_of_this_machine_hold_its_cpus() -> None:
    import os

    cpus = [cpu for node in _kernels.numa_nodes() for cpu in node]
    assert set(cpus) <= os.sched_getaffinity(0)
    assert cpus
