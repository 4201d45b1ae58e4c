"""Routing ids: -1 is never read, what is out of range is refused untouched, anything else is legal."""

import numpy as np
import pytest

from kttools_runtime import _kernels
from tests.engine import reference as ref

HIDDEN, INNER, EXPERTS = 96, 48, 5
TOKENS = [1, 2, 3, 5, 40, 530]


def setup(isa: str | None, name: str, threads: int = 2) -> tuple[list[ref.Expert], _kernels.ExpertLayer]:
    rng = np.random.default_rng(11)
    experts = [ref.random_expert(rng, HIDDEN, INNER, name) for _ in range(EXPERTS)]
    return experts, ref.make_layer(_kernels.Engine(threads, isa), experts)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("name", ref.FORMATS)
def test_none_is_never_read(isa: str, name: str, dtype: str) -> None:
    """Tokens whose ids are all -1, and the weights of -1, are NaN; the others must not notice."""
    experts, native = setup(isa, name)
    rng = np.random.default_rng(12)
    for tokens in TOKENS:
        ids, weights = ref.routing(rng, tokens, 3, EXPERTS, missing=0.4)
        ids[rng.random(tokens) < 0.3] = -1
        x = ref.bf16_matrix(rng, tokens, HIDDEN)
        rounds = name == "bf16" and dtype == "bf16" and isa == "amx"
        expected, bound = ref.layer(experts, x, ids, weights, rounds_hidden=rounds)
        weights[ids == -1] = np.nan
        unused = (ids == -1).all(axis=1)
        given = x.copy() if dtype == "float32" else ref.to_bf16(x)
        given[unused] = np.nan if dtype == "float32" else 0x7FC0
        got = ref.forward(native, given, ids, weights)
        ref.within(got, expected, bound)
        assert not got[unused].any()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ref.FORMATS)
def test_all_none_is_zero(isa: str, name: str, tokens: int) -> None:
    _, native = setup(isa, name)
    x = np.full((tokens, HIDDEN), np.nan, dtype=np.float32)
    ids = np.full((tokens, 4), -1, dtype=np.int64)
    got = ref.forward(native, x, ids, np.full((tokens, 4), np.nan, dtype=np.float32))
    assert np.array_equal(got, np.zeros_like(got))


@pytest.mark.parametrize("bad", [-2, EXPERTS, EXPERTS + 1, 2**31, 2**32, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("place", [(0, 0), (4, 1), (4999, 2)])
def test_out_of_range_is_refused(bad: int, place: tuple[int, int]) -> None:
    """The message names id and token; `out` is untouched even when earlier tokens were fine."""
    _, native = setup(None, "int8")
    ids = np.zeros((5000, 3), dtype=np.int64)
    ids[place] = bad
    out = np.full((5000, HIDDEN), 7.0, dtype=np.float32)
    message = rf"expert id {bad} of token {place[0]} is not in \[-1, {EXPERTS}\)"
    with pytest.raises(ValueError, match=message):
        native.forward(np.zeros((5000, HIDDEN), np.float32), ids, np.ones((5000, 3), np.float32), out)
    assert (out == 7.0).all()


@pytest.mark.parametrize("name", ref.FORMATS)
def test_duplicate_ids_add_up(isa: str, name: str) -> None:
    experts, native = setup(isa, name)
    rng = np.random.default_rng(13)
    for tokens in (1, 2, 3, 9):
        x = ref.bf16_matrix(rng, tokens, HIDDEN)
        ids = np.full((tokens, 3), 2, dtype=np.int64)
        weights = rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)
        ref.within(ref.forward(native, x, ids, weights), *ref.layer(experts, x, ids, weights))


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_more_ranks_than_experts(isa: str, tokens: int) -> None:
    experts, native = setup(isa, "int8")
    rng = np.random.default_rng(14)
    ids = rng.integers(-1, EXPERTS, (tokens, 3 * EXPERTS))
    weights = rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)
    x = ref.bf16_matrix(rng, tokens, HIDDEN)
    ref.within(ref.forward(native, x, ids, weights), *ref.layer(experts, x, ids, weights))


@pytest.mark.parametrize("name", ref.EXACT)
def test_a_token_does_not_depend_on_its_company(isa: str, name: str) -> None:
    """Integer sums are exact and experts are added in their order: alone or in a batch, the same bits."""
    _, native = setup(isa, name)
    rng = np.random.default_rng(15)
    x = ref.bf16_matrix(rng, 80, HIDDEN)
    ids, weights = ref.routing(rng, 80, 3, EXPERTS)
    whole = ref.forward(native, x, ids, weights)
    for part in (slice(0, 1), slice(7, 9), slice(20, 63)):
        assert np.array_equal(ref.forward(native, x[part], ids[part], weights[part]), whole[part])


def test_weights_may_be_zero_or_negative(isa: str) -> None:
    experts, native = setup(isa, "int8")
    rng = np.random.default_rng(16)
    x = ref.bf16_matrix(rng, 6, HIDDEN)
    ids, weights = ref.routing(rng, 6, 3, EXPERTS)
    weights[:, 0], weights[:, 1] = 0.0, -weights[:, 1]
    ref.within(ref.forward(native, x, ids, weights), *ref.layer(experts, x, ids, weights))
