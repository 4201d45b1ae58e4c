"""Interleaving dense matrices: set while they are packed, put back after, refused softly."""

import platform
from pathlib import Path

import pytest

import kttools_runtime as kt
from kttools_runtime import linear, mempolicy
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.mempolicy import MPOL_INTERLEAVE, interleaved, nodes_with_cpus

pytestmark = pytest.mark.skipif(
    platform.machine() not in mempolicy._CALLS, reason="no call numbers for this machine"
)


def test_the_policy_holds_inside_and_is_put_back() -> None:
    before = mempolicy._policy()
    if before is None or not nodes_with_cpus():
        pytest.skip("this system says nothing of memory policies")
    with interleaved(2) as is_set:
        inside = mempolicy._policy()
    after = mempolicy._policy()
    assert after is not None
    assert (after[0], list(after[1])) == (before[0], list(before[1]))
    if not is_set:
        pytest.skip("this system refuses memory policies")
    assert inside is not None
    assert inside[0] == MPOL_INTERLEAVE
    assert list(inside[1]) == list(mempolicy._mask(nodes_with_cpus()))


def test_an_error_inside_puts_it_back_too() -> None:
    before = mempolicy._policy()
    with pytest.raises(ZeroDivisionError), interleaved(2):
        _ = 1 / 0
    after = mempolicy._policy()
    assert (before and before[0]) == (after and after[0])


def test_with_one_node_the_system_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mempolicy, "_syscall", lambda *_: pytest.fail("asked"))
    with interleaved(1) as is_set:
        assert not is_set


def test_a_refusal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mempolicy, "_syscall", lambda *_: -1)
    monkeypatch.setattr(mempolicy, "nodes_with_cpus", lambda: [0, 1])
    with interleaved(2) as is_set:
        assert not is_set


@pytest.mark.parametrize(
    ("text", "found"), [("0-1\n", [0, 1]), ("0,2-3\n", [0, 2, 3]), ("5", [5]), ("\n", []), ("9999", [])]
)
def test_node_lists(text: str, found: list[int], tmp_path: Path) -> None:
    (tmp_path / "has_cpu").write_text(text)
    assert nodes_with_cpus(tmp_path / "has_cpu") == found


def test_every_matrix_is_packed_over_the_nodes_of_the_engine(
    nano_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def spread(nodes: int):  # type: ignore[no-untyped-def]
        asked.append(nodes)
        return interleaved(nodes)

    monkeypatch.setattr(linear, "interleaved", spread)
    plain = kt.load(nano_bundle, threads=2).logits([1, 2, 3])
    assert set(asked) == {ExpertEngine(2, numa="auto").nodes}
    count = len(asked)
    monkeypatch.setattr("kttools_runtime.loader.ExpertEngine", lambda t, i, n: ExpertEngine(t, i, "shard", 2))
    found = kt.load(nano_bundle, threads=2).logits([1, 2, 3])
    assert asked[count:] == [2] * count
    assert bool((found == plain).all())
