"""The router's kernel in Triton's interpreter against torch's router, and compiled for GPUs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kttools_runtime.config import ModelConfig
from kttools_runtime.hybrid.fused_router import FusedRouter, agrees, fastest_route, random_router
from tests.hybrid.compilers import need_triton
from tests.oracle import CONFIGS, canonical_config, hf_model

# (router, n_routed_experts, n_group, topk_group, k, norm_topk_prob, scale, has logit bias)
KINDS = (
    ("sigmoid_bias_groups", 256, 8, 4, 8, True, 2.5, False),
    ("sigmoid_bias_groups", 384, 1, 1, 8, True, 2.827, False),
    ("sigmoid_bias_groups", 6, 3, 2, 3, False, 1.0, False),
    ("sigmoid_bias_groups", 12, 4, 1, 3, True, 1.5, False),
    ("softmax_groups", 160, 8, 3, 6, False, 16.0, False),
    ("softmax_groups", 128, 1, 1, 8, True, 1.0, False),
    ("softmax_groups", 7, 1, 1, 7, True, 1.0, True),
    ("softmax_groups", 16, 16, 5, 1, False, 3.0, False),
    ("softmax_groups", 32, 1, 1, 4, True, 1.0, True),
)
PROGRAM = """
import dataclasses, pickle, sys
import torch
from kttools_runtime.hybrid import fused_router

with open(sys.argv[1], "rb") as file:
    configs = pickle.load(file)
for config, has_logit_bias in configs:
    is_sigmoid = config.router == "sigmoid_bias_groups"
    for k in {config.num_experts_per_tok, max(1, config.num_experts_per_tok - 2)}:
        router = fused_router.random_router(config, k, (is_sigmoid, has_logit_bias), torch.device("cpu"))
        x = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(5))
        ours, theirs = fused_router.FusedRouter(router)(x), router(x)
        assert torch.equal(ours[0], theirs[0]), (config.router, config.n_routed_experts, k)
        error = float((ours[1] - theirs[1]).abs().max() / theirs[1].abs().max())
        assert error <= 1e-6, (config.router, config.n_routed_experts, k, error)
tied = torch.zeros(1, configs[0][0].n_routed_experts)
ids, _ = fused_router.route(configs[0][0], tied, torch.zeros(256), 8)
assert ids.tolist() == [list(range(8))]  # the first of equals
lost = torch.full((2, 256), float("nan"))
assert int(fused_router.route(configs[0][0], lost, torch.zeros(256), 8)[0].max()) < 256  # never a wild id
print("ok")
"""
COMPILED = """
import pickle, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kttools_runtime.hybrid import fused_router, router_source

kernel = triton.jit(router_source.route_kernel)
types = {"ids_ptr": "*i64", "scale": "fp32"}
types |= dict.fromkeys(("logits_ptr", "bias_ptr", "weights_ptr"), "*fp32")
with open(sys.argv[1], "rb") as file:
    configs = pickle.load(file)
for config, _ in (configs[0], configs[4]):
    fixed = fused_router.constants(config, config.n_routed_experts, config.num_experts_per_tok)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    for capability in (80, 90):
        made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", capability, 32))
        assert f"sm_{capability}" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
print("ok")
"""


def config_of(kind: tuple[str, int, int, int, int, bool, float, bool]) -> ModelConfig:
    import dataclasses

    router, count, groups, kept, k, is_normalised, scale, _ = kind
    base = canonical_config(hf_model(CONFIGS["base"]).config)
    return dataclasses.replace(
        base,
        router=router,
        n_routed_experts=count,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=k,
        norm_topk_prob=is_normalised,
        routed_scaling_factor=scale,
    )


def run(program: str, tmp_path: Path, **variables: str) -> None:
    import pickle

    need_triton()
    file = tmp_path / "configs"
    file.write_bytes(pickle.dumps([(config_of(kind), kind[-1]) for kind in KINDS]))
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **variables},
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_every_kind_of_router_in_the_interpreter(tmp_path: Path) -> None:
    run(PROGRAM, tmp_path, TRITON_INTERPRET="1")


def test_compiles_for_gpus(tmp_path: Path) -> None:
    """Machine code of sm_80 and sm_90, without a GPU."""
    run(COMPILED, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))


def test_the_check_sees_a_wrong_choice_and_a_wrong_weight() -> None:
    router = random_router(config_of(KINDS[0]), 8, (True, False), torch.device("cpu"))
    ids, weights = router(torch.randn(512, router.config.hidden_size))
    assert agrees((ids.clone(), weights.clone()), (ids, weights))
    tied = ids.clone()
    tied[3] = tied[3].flip(0)
    assert agrees((tied, weights), (ids, weights))
    swapped = ids.clone()
    swapped[:6, :2] = swapped[:6, [1, 0]]
    assert not agrees((swapped, weights), (ids, weights))
    for bad in (torch.nan, 1e-4):
        wrong = weights.clone()
        wrong[100, 2] += bad
        assert not agrees((ids, wrong), (ids, weights))


def test_the_cpu_keeps_its_own_router() -> None:
    router = random_router(config_of(KINDS[0]), 8, (True, False), torch.device("cpu"))
    assert fastest_route(router) is router


def test_a_table_is_torchs_affair() -> None:
    """Chosen before or behind the making of the route: what it selects is what comes out."""
    router = random_router(config_of(KINDS[0]), 8, (True, False), torch.device("cpu"))
    x = torch.randn(3, router.config.hidden_size)
    fused = FusedRouter(router)

    class OneLess:
        def select(self, ids: torch.Tensor, weights: torch.Tensor, _: torch.Tensor) -> Any:
            return ids[:, :7], weights[:, :7]

    router.table = OneLess()
    ids, weights = fused(x)
    assert torch.equal(ids, router(x)[0])
    assert ids.shape == weights.shape == (3, 7)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    need_triton()
    for kind in KINDS:
        router = random_router(
            config_of(kind), kind[4], (kind[0].startswith("sigmoid"), kind[-1]), torch.device("cuda:0")
        )
        x = torch.randn(512, router.config.hidden_size, device="cuda:0")
        assert agrees(FusedRouter(router)(x), router(x)), kind
