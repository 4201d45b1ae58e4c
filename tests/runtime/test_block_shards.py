"""GGUF's blocks in shards: the gguf package's numbers, the linears made of them, and each way to be wrong."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kttools_runtime.block_formats import BLOCK_FORMATS
from kttools_runtime.embedding import BlockRows
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.hybrid.linears import CodesLinear, as_int8, linear_maker
from kttools_runtime.linear import LinearSpec, PackedCpuLinear, Placement, TorchLinear
from kttools_runtime.shards import ShardWeights
from kttools_runtime.weights import LinearWeights, stack
from tests.compare import assert_close
from tests.engine import ggml_blocks as blocks
from tests.forge import save

N, K = 37, 512
FORMS = tuple(BLOCK_FORMATS)
Parts = dict[str, Tensor]


def rows_of(form: str, rows: int = N, columns: int = K, seed: int = 0) -> Tensor:
    return torch.from_numpy(blocks.random_rows(np.random.default_rng(seed), form, rows, columns))


def weights_of(form: str, rows: Tensor) -> Tensor:
    return torch.from_numpy(blocks.weights(form, rows.numpy()))


def matrix(form: str, seed: int = 0, rows: int = N) -> LinearWeights:
    return LinearWeights("x", K, form, {"blocks": rows_of(form, rows, seed=seed)})


def opened(path: Path, parts: Parts, form: str | None) -> ShardWeights:
    save(path / "model-00001-of-00001.safetensors", parts)
    return ShardWeights(sorted(path.glob("*.safetensors")), {"x": form} if form else {})


@pytest.mark.parametrize("form", FORMS)
def test_the_shards_numbers_are_the_files(tmp_path: Path, form: str) -> None:
    rows = rows_of(form)
    found = opened(tmp_path, {"x.blocks": rows}, form).linear("x", N, K)
    assert (found.format, found.out_features, found.in_features) == (form, N, K)
    assert torch.equal(found.parts["blocks"], rows)
    assert torch.equal(found.dequantized(), weights_of(form, rows))


@pytest.mark.parametrize("form", FORMS)
def test_order_and_stacking(form: str) -> None:
    a, b = matrix(form), matrix(form, 1, 5)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    assert torch.equal(a.rows(order).dequantized(), a.dequantized()[order])
    assert torch.equal(stack([a, b]).dequantized(), torch.cat([a.dequantized(), b.dequantized()]))
    assert len({matrix(form).kind for form in FORMS}) == len(FORMS)


def set_half(at: int, value: float) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        parts["x.blocks"][3, at : at + 2] = torch.from_numpy(np.array([value], dtype="<f2").view(np.uint8))

    return apply


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        parts["x.blocks"] = change(parts["x.blocks"])

    return apply


WRONG: dict[str, tuple[str, str | None, Callable[[Parts], object], str]] = {
    "missing": ("q4_k", "q4_k", lambda parts: parts.clear(), "no shard holds x.weight"),
    "unlisted": ("q4_k", None, lambda parts: None, "x: the manifest says None, the shards hold blocks"),
    "listed as int8": ("q4_k", "int8", lambda parts: None, "the manifest says int8, the shards hold blocks"),
    "another format": ("q4_k", "q6_k", lambda parts: None, "x.blocks: expected shape (37, 420)"),
    "short rows": ("q4_k", "q4_k", changed(lambda t: t[:, :-1].clone()), "x.blocks: expected shape"),
    "long rows": ("q8_0", "q8_0", changed(lambda t: torch.cat([t, t], 1)), "x.blocks: expected shape"),
    "one dimension": ("q4_k", "q4_k", changed(lambda t: t.reshape(-1)), "x.blocks: expected shape"),
    "dtype": ("q4_k", "q4_k", changed(lambda t: t.view(torch.int8)), "x.blocks: expected uint8"),
    "rows": ("q4_k", "q4_k", changed(lambda t: t[:-1].clone()), "x: expected 37 output rows, got 36"),
    "nan d": ("q4_k", "q4_k", set_half(0, np.nan), "x.blocks: the scale of the block at [3, 0] is not"),
    "inf dmin": ("q5_k", "q5_k", set_half(178, np.inf), "the scale of the block at [3, 256] is not finite"),
    "nan q6_k": ("q6_k", "q6_k", set_half(208, np.nan), "the scale of the block at [3, 0] is not finite"),
    "inf q8_0": (
        "q8_0",
        "q8_0",
        set_half(34 * 3, -np.inf),
        "the scale of the block at [3, 96] is not finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_matrix_is_refused(tmp_path: Path, case: str) -> None:
    form, listed, change, message = WRONG[case]
    parts = {"x.blocks": rows_of(form)}
    change(parts)
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        opened(tmp_path, parts | {"other": torch.zeros(1)}, listed).linear("x", N, K)


def test_blocks_that_are_listed_but_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="the manifest says q4_k, the shards hold float"):
        opened(tmp_path, {"x.weight": torch.zeros(N, K)}, "q4_k").linear("x", N, K)


class Source:
    """One matrix "m" and its bias."""

    def __init__(self, form: str) -> None:
        self.matrix, self.bias = matrix(form), torch.linspace(-1, 1, N)

    def linear(self, base: str, out_features: int, in_features: int) -> LinearWeights:
        return self.matrix

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.bias


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [1, 4, 33])
def test_linears(form: str, num_tokens: int) -> None:
    """The float32 path exactly, the kernels within int8 activations, a device's within int8 of both."""
    source, cpu = Source(form), torch.device("cpu")
    x = torch.randn(num_tokens, K, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ source.matrix.dequantized().double().T + source.bias
    spec = LinearSpec("m", N, has_bias=True)
    reference = Placement(source, cpu, torch.float32).linear(spec, K)
    assert isinstance(reference, TorchLinear)
    assert_close(reference(x), expected, 1e-5)
    native = Placement(source, cpu, torch.bfloat16, ExpertEngine(2).native).linear(spec, K)
    assert isinstance(native, PackedCpuLinear)
    assert_close(native(x), expected, 2**-6)
    device = linear_maker(cpu, torch.bfloat16)(source.matrix, source.bias)
    assert isinstance(device, CodesLinear)
    assert_close(device(x), expected, 2**-5)


def test_a_device_can_be_told_to_hold_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTTOOLS_DEVICE_LINEAR", "dense")
    held = linear_maker(torch.device("cpu"), torch.bfloat16)(matrix("q4_k"), None)
    assert isinstance(held, TorchLinear)
    assert torch.equal(held.weight, matrix("q4_k").dequantized().to(torch.bfloat16))


def test_int8_of_a_matrix_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = as_int8(matrix("q6_k"))
    monkeypatch.setattr("kttools_runtime.hybrid.linears.EXPANDED_BYTES", 3 * 4 * K)
    pieces = as_int8(matrix("q6_k"))
    assert all(torch.equal(whole.parts[name], pieces.parts[name]) for name in whole.parts)
    step = whole.parts["row_scale"][:, None]
    assert bool(((whole.dequantized() - matrix("q6_k").dequantized()).abs() <= 0.501 * step).all())


def test_rows_of_an_embedding() -> None:
    held, expected = BlockRows(matrix("q4_k")), matrix("q4_k").dequantized()
    assert torch.equal(held[torch.tensor([3, 0, 3])], expected[[3, 0, 3]])
    assert torch.equal(held[36], expected[36])
