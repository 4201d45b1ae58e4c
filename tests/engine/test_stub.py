"""The type stub is the extension: the same names, arguments and defaults; and bad arguments are refused."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kttools_runtime import _kernels, experts

STUB = ast.parse(Path(experts.__file__).with_name("_kernels.pyi").read_text(encoding="utf-8"))
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"}
FUNCTIONS: dict[str, list[ast.FunctionDef]] = {}
for function in STUB.body:
    if isinstance(function, ast.FunctionDef):
        FUNCTIONS.setdefault(function.name, []).append(function)
VALUES = [node.target for node in STUB.body if isinstance(node, ast.AnnAssign)]
NAMES = {name.id for name in VALUES if isinstance(name, ast.Name) and name.id[0] != "_"}
Arguments = list[tuple[str, str | None]]


def public(thing: Any) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


def methods(name: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in CLASSES[name].body if isinstance(node, ast.FunctionDef)}


def signatures(thing: Any) -> list[Arguments]:
    """Of every overload, from the docstring that pybind11 writes: a Python signature on each first line."""
    lines = re.findall(r"^(?:\d+\. )?\w+(\(.*\)) ->", inspect.getdoc(thing) or "", re.M)
    parsed = [ast.parse(f"def f{line}: ...").body[0] for line in lines]
    return [arguments(node) for node in parsed if isinstance(node, ast.FunctionDef)]


def arguments(function: ast.FunctionDef) -> Arguments:
    """(name, default) of each argument."""
    names = [argument.arg for argument in function.args.args]
    defaults: list[str | None] = [ast.unparse(value) for value in function.args.defaults]
    return list(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))


def test_every_name_of_the_module_is_in_the_stub() -> None:
    assert public(_kernels) == {*CLASSES, *FUNCTIONS, *NAMES}


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_of_a_class_is_in_the_stub(name: str) -> None:
    assert public(getattr(_kernels, name)) == set(methods(name)) - {"__init__"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_arguments(name: str) -> None:
    assert signatures(getattr(_kernels, name)) == [arguments(node) for node in FUNCTIONS[name]]


@pytest.mark.parametrize("name", CLASSES)
def test_method_arguments(name: str) -> None:
    for method, node in methods(name).items():
        bound = getattr(_kernels, name).__dict__[method]
        if isinstance(bound, property):
            assert [ast.unparse(d) for d in node.decorator_list] == ["property"]
            continue
        if isinstance(bound, staticmethod):
            bound = bound.__func__
        assert signatures(bound) == [arguments(node)], method


F32 = np.float32


@pytest.mark.parametrize(
    ("x", "ids", "weights", "out", "message"),
    [
        (np.zeros((2, 64)), None, None, None, "x must be float32 or uint16"),
        (np.zeros((2, 63), F32), None, None, None, "expected 64 columns"),
        (np.zeros(64, F32), None, None, None, "x must have 2 dimensions"),
        (np.zeros((4, 64), F32)[::2], None, None, None, "x must be C-contiguous"),
        (None, np.zeros((2, 1), np.int32), None, None, "expert_ids must be int64, got int32"),
        (None, np.zeros((3, 1), np.int64), None, None, "expert_ids has shape"),
        (None, np.zeros((2, 0), np.int64), None, None, "expert_ids must have 1 to 1024 columns"),
        (None, np.zeros(2, np.int64), None, None, "expert_ids must have 2 dimensions"),
        (None, None, np.zeros((2, 2), F32), None, "expert_weights has shape"),
        (None, None, np.zeros((2, 1)), None, "expert_weights must be float32"),
        (None, None, None, np.zeros((2, 65), F32), "out has shape"),
        (None, None, None, np.zeros((2, 64)), "out must be float32"),
        (None, None, None, np.frombuffer(bytes(512), F32).reshape(2, 64), "out must be writeable"),
    ],
)
def test_forward_refuses(x: Any, ids: Any, weights: Any, out: Any, message: str) -> None:
    blob = experts.aligned_bytes(_kernels.expert_bytes("int8", 64, 32))
    blob[:] = 0
    layer = _kernels.ExpertLayer(_kernels.Engine(1), 64, 32, ["int8"], [blob])
    given: list[Any] = [
        np.zeros((2, 64), F32) if x is None else x,
        np.zeros((2, 1), np.int64) if ids is None else ids,
        np.zeros((2, 1), F32) if weights is None else weights,
        np.zeros((2, 64), F32) if out is None else out,
    ]
    with pytest.raises(ValueError, match=message):
        layer.forward(given[0], given[1], given[2], given[3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: _kernels.expert_bytes("int5", 64, 32),
            "unknown format 'int5': expected one of bf16, int8, int4_g32",
        ),
        (lambda: _kernels.expert_bytes("int8", 0, 32), "hidden_size must be 1 to 1048576, got 0"),
        (
            lambda: _kernels.expert_bytes("int8", 64, (1 << 20) + 1),
            "moe_intermediate_size must be 1 to 1048576",
        ),
        (
            lambda: _kernels.quantize_int4(np.ones((1, 8), F32), 48),
            "group_size must be 32, 64 or 128, got 48",
        ),
        (lambda: _kernels.quantize_int8(np.ones((1, 0), F32)), "must be 1 to 1048576, got 0"),
        (lambda: _kernels.unpack_expert("int8", np.zeros(4096, np.uint8), 64, 32), "blob has shape"),
        (
            lambda: _kernels.ExpertLayer(_kernels.Engine(1), 64, 32, ["int8"], []),
            "formats and blobs differ in length",
        ),
        (lambda: _kernels.ExpertLayer(_kernels.Engine(1), 64, 32, [], []), "at least one expert"),
        (
            lambda: _kernels.ExpertLayer(
                _kernels.Engine(1), 64, 32, ["int8"], [experts.aligned_bytes(12289)[1:]]
            ),
            "expert blobs must be 64-byte aligned",
        ),
        (
            lambda: _kernels.pack_expert(
                "int8",
                np.ones((32, 64), F32),
                np.ones((32, 63), F32),
                np.ones((64, 32), F32),
                np.zeros(12288, np.uint8),
            ),
            "up has shape",
        ),
        (
            lambda: _kernels.pack_expert(
                "int8",
                np.ones((32, 64), F32),
                np.ones((32, 64), F32),
                np.ones((32, 64), F32),
                np.zeros(12288, np.uint8),
            ),
            "down has shape",
        ),
    ],
)
def test_bad_values_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
