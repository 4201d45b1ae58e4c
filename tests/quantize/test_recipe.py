"""Which tensor gets which format."""

import pytest

from kttools.families import Role
from kttools.quantize.recipe import SMALLEST_SIDE, Recipe, make_recipe
from kttools_runtime.errors import UsageError

WIDE = (256, 256)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("gpu_format", ["int4", "int8", "bf16"])
def test_only_linears_are_quantised(role: Role, gpu_format: str) -> None:
    recipe = Recipe("int8", gpu_format, 128)
    expected = gpu_format if role.is_linear else None
    assert recipe.shard_format("model.layers.0.x.weight", role, WIDE) == expected


@pytest.mark.parametrize(("gpu_format", "head"), [("int4", "int8"), ("int8", "int8"), ("bf16", "bf16")])
def test_the_head_is_never_int4(gpu_format: str, head: str) -> None:
    assert Recipe("int8", gpu_format, 128).shard_format("lm_head.weight", Role.HEAD, WIDE) == head


def test_small_linears_stay_bf16() -> None:
    recipe = Recipe("int8", "int4", 128)
    name = "model.layers.0.self_attn.q_a_proj.weight"
    for shape, expected in (
        ((SMALLEST_SIDE - 1, 4096), "bf16"),
        ((4096, SMALLEST_SIDE - 1), "bf16"),
        ((SMALLEST_SIDE, 4096), "int4"),
    ):
        assert recipe.shard_format(name, Role.ATTENTION, shape) == expected


def test_the_user_words() -> None:
    assert make_recipe("int4", "int4", 64).cpu_format.startswith("int4_g")
    assert make_recipe("int4_g32", "bf16", 64).cpu_format == "int4_g32"
    with pytest.raises(UsageError, match="unknown expert format 'q3_k'"):
        make_recipe("q3_k", "int4", 128)
    with pytest.raises(UsageError, match="unknown gpu format 'int3'"):
        make_recipe("int8", "int3", 128)
    with pytest.raises(UsageError, match="unknown group size 16"):
        make_recipe("int8", "int4", 16)


def test_the_manifest_says_what_was_decided() -> None:
    assert Recipe("int8", "int4", 64).to_dict() == {
        "cpu_format": "int8",
        "gpu_format": "int4",
        "group_size": 64,
        "exceptions": {"lm_head": "int8", "kv_a_proj_with_mqa": "int8", "kv_b_proj": "int8"},
        "smallest_side": SMALLEST_SIDE,
    }
    assert Recipe("int8", "bf16", 64).to_dict()["exceptions"] == {}
