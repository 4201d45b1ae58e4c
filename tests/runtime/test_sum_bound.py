"""Inputs of an integer matrix: exact up to the bound of int32 sums, refused above it, in packs and shards."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kttools.families import Role
from kttools.quantize.recipe import make_recipe
from kttools.quantize.shard_layout import shard_tensor
from kttools_runtime import _kernels
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.pack import BrokenRule, Rule
from kttools_runtime.pack_writer import plan_header
from kttools_runtime.weights import MAX_SUM_INPUTS, LinearWeights

INTEGER = ["int8", "int4_g32", "int4_g64", "int4_g128"]


def test_the_bound_is_the_last_that_fits() -> None:
    assert MAX_SUM_INPUTS * 127 * 128 < 2**31 <= (MAX_SUM_INPUTS + 1) * 127 * 128


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_largest_sum_is_exact(sign: int, rows: int, isa: str) -> None:
    """Every product is 127 * 128; one input more and the sum would be negative."""
    engine = ExpertEngine(1, isa).native
    q = np.full((32, MAX_SUM_INPUTS), -128, np.int8)
    matrix = _kernels.PackedLinear.from_int8(engine, q, np.ones(32, np.float32))
    x = np.full((rows, MAX_SUM_INPUTS), -127.0 * sign, np.float32)
    out = np.empty((rows, 32), np.float32)
    matrix.forward(x, out)
    np.testing.assert_allclose(out, sign * 127.0 * 128.0 * MAX_SUM_INPUTS, rtol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_so_it_is_in_int4(sign: int, isa: str) -> None:
    """Codes of 0 with a zero of 128 are weights of -128."""
    engine = ExpertEngine(1, isa).native
    groups = -(-MAX_SUM_INPUTS // 64)
    q = np.zeros((32, groups * 32), np.uint8)
    scale, zero = np.ones((32, groups), np.uint8), np.full((32, groups), 128, np.uint8)
    parts = (q, scale, zero, np.ones(32, np.float32))
    matrix = _kernels.PackedLinear.from_int4(engine, *parts, MAX_SUM_INPUTS, 64)
    for rows in (1, 40):
        out = np.empty((rows, 32), np.float32)
        matrix.forward(np.full((rows, MAX_SUM_INPUTS), -127.0 * sign, np.float32), out)
        np.testing.assert_allclose(out, sign * 127.0 * 128.0 * MAX_SUM_INPUTS, rtol=1e-6)


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("field", ["hidden_size", "moe_intermediate_size"])
def test_packs_beyond_it_are_refused(name: str, field: str) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64}
    plan_header(layer=0, formats=[name], **sizes | {field: MAX_SUM_INPUTS})
    with pytest.raises(BrokenRule, match=f"{field}: 132105 inputs in {name}.*at most 132104") as error:
        plan_header(layer=0, formats=["bf16", name], **sizes | {field: MAX_SUM_INPUTS + 1})
    assert error.value.rule is Rule.LIMITS
    plan_header(layer=0, formats=["bf16"], **sizes | {field: MAX_SUM_INPUTS + 1})


@pytest.mark.parametrize("name", INTEGER)
def test_layers_beyond_it_are_refused(name: str) -> None:
    wide = torch.zeros(1, 16, MAX_SUM_INPUTS + 1)
    with pytest.raises(InvalidInputError, match="at most 132104"):
        ExpertEngine(1).layer_from_tensors(wide, wide, wide.transpose(1, 2).contiguous(), name)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_dense_matrices_beyond_it_are_refused(name: str) -> None:
    width = MAX_SUM_INPUTS + 1
    shape = (32, width)
    source = SimpleNamespace(
        name="model.layers.0.mlp.down_proj.weight", role=Role.DENSE_MLP, shape=shape, dtype="BF16"
    )
    with pytest.raises(InvalidInputError, match=f"down_proj.*132105 inputs in {name}.*use bf16"):
        shard_tensor(source, make_recipe("int8", name, 64))  # type: ignore[arg-type]
    parts = {"qweight": torch.zeros(shape, dtype=torch.int8), "row_scale": torch.ones(32)}
    with pytest.raises(InvalidInputError, match="at most 132104"):
        LinearWeights("x", width, "int8", parts)
    assert LinearWeights("x", width, "float", {"weight": torch.zeros(shape)}).out_features == 32
