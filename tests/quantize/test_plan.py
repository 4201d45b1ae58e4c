"""Sizes before work, and what is refused because of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from kttools.quantize.plan import BASE_BYTES, Resources, find_resources, render_plan
from kttools_runtime.errors import ResourceError
from kttools_runtime.pack import BrokenRule
from tests.forge import config, hub_tensors, save_model
from tests.quantize.conftest import SIZES, plan_for

GIB = 1 << 30


def test_ram_grows_by_the_worker(checkpoint: Path) -> None:
    one, four = plan_for(checkpoint), plan_for(checkpoint, workers=4)
    assert one.ram_bytes == BASE_BYTES + one.worker_bytes
    assert four.ram_bytes == BASE_BYTES + 4 * one.worker_bytes


def test_a_deepseek_v3_expert_fits_the_promise(checkpoint: Path) -> None:
    """2.5 GiB for one worker: 88 MB as read, 44 MB of blob, 176 MB of float32 to compare, and the base."""
    plan = plan_for(checkpoint)
    values = plan.source.config
    plan.source.config = replace(values, hidden_size=7168, moe_intermediate_size=2048)
    packs = (replace(plan.packs[0], header=_header(plan)),)
    plan = replace(plan, packs=packs)
    assert 88e6 + 44e6 + 176e6 < plan.worker_bytes < 450e6
    assert plan.ram_bytes < 2.5 * GIB


def _header(plan: object) -> object:
    from kttools_runtime.pack_writer import plan_header

    return plan_header(layer=1, hidden_size=7168, moe_intermediate_size=2048, formats=["int8"] * 6)


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (Resources(10, 64 * GIB), r"not enough disk: .* needed, 10 B available; free .* or choose smaller"),
        (
            Resources(64 * GIB, 10),
            r"not enough RAM for 4 workers: .* needed, 10 B available; free some memory",
        ),
        (Resources(64 * GIB, 1_000_000_000), r"use --workers 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(
    checkpoint: Path, resources: Resources, message: str
) -> None:
    plan = plan_for(checkpoint, workers=4)
    with pytest.raises(ResourceError, match=message) as caught:
        resources.check(plan, Path("b"))
    assert caught.value.exit_code == 4


def test_what_fits_is_not_refused(checkpoint: Path) -> None:
    plan = plan_for(checkpoint)
    needed = Resources(0, 0).disk_needed(plan)
    Resources(needed, plan.ram_bytes).check(plan, Path("b"))
    Resources(needed - 1000, plan.ram_bytes, finished_bytes=1000).check(plan, Path("b"))
    Resources(needed - 1000, plan.ram_bytes, replaced_bytes=1000).check(plan, Path("b"))
    with pytest.raises(ResourceError):
        Resources(needed - 1, plan.ram_bytes).check(plan, Path("b"))


def test_resources_are_those_of_the_target(tmp_path: Path) -> None:
    found = find_resources(tmp_path / "not" / "there" / "yet")
    assert found.disk_free_bytes > 0
    assert found.ram_available_bytes > 0
    assert not (tmp_path / "not").exists()


def test_the_plan_as_text(checkpoint: Path) -> None:
    text = render_plan(plan_for(checkpoint), Resources(GIB, GIB, finished_bytes=2048))
    for part in (
        "3 packs, int8",
        "1 shards, int4 in groups of 32",
        "1.00 GiB available",
        "2.00 KiB by an earlier",
    ):
        assert part in text
    assert "earlier run" not in render_plan(plan_for(checkpoint), Resources(GIB, GIB))


def test_a_model_no_pack_can_hold_is_refused(tmp_path: Path) -> None:
    values = config(**SIZES)
    source = save_model(tmp_path / "source", values, hub_tensors(values))
    plan = plan_for(source)
    plan.source.config = replace(plan.source.config, hidden_size=1 << 21)
    from kttools.quantize.plan import make_plan

    with pytest.raises(BrokenRule, match="hidden_size is 2097152"):
        make_plan(plan.source, plan.recipe)
