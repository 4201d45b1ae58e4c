"""The engine under many callers and more threads than cores; every test must finish within a limit."""

import faulthandler
import gc
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from kttools_runtime import _kernels
from kttools_runtime.errors import UsageError
from kttools_runtime.experts import ExpertEngine
from tests.engine import reference as ref

LIMIT_S = 240


@pytest.fixture(autouse=True)
def finishes() -> Iterator[None]:
    """A deadlock inside the extension cannot be interrupted: say where everybody stands, end the process."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def problem(seed: int, name: str, tokens: int) -> tuple[list[ref.Expert], ref.Array, ref.Array, ref.Array]:
    rng = np.random.default_rng(seed)
    experts = [ref.random_expert(rng, 320, 96, name) for _ in range(8)]
    ids, weights = ref.routing(rng, tokens, 4, 8, missing=0.1)
    return experts, ref.bf16_matrix(rng, tokens, 320), ids, weights


@pytest.mark.parametrize("threads", [2, 7])
def test_many_small_forwards(threads: int) -> None:
    experts, x, ids, weights = problem(71, "int8", 2)
    layer = ref.make_layer(_kernels.Engine(threads), experts)
    expected = ref.forward(layer, x, ids, weights)
    for _ in range(2000 if threads == 2 else 500):
        assert np.array_equal(ref.forward(layer, x, ids, weights), expected)


def test_seven_threads_on_a_long_forward() -> None:
    experts, x, ids, weights = problem(72, "int4_g64", 700)
    got = ref.forward(ref.make_layer(_kernels.Engine(7), experts), x, ids, weights)
    ref.within(got, *ref.layer(experts, x, ids, weights))


@pytest.mark.parametrize("threads", [1, 3])
def test_callers_share_an_engine(threads: int) -> None:
    """Two layers and a matrix on one engine from four Python threads: results are as if alone."""
    engine = _kernels.Engine(threads)
    problems = [problem(73 + i, name, tokens) for i, (name, tokens) in enumerate([("int8", 1), ("bf16", 37)])]
    layers = [ref.make_layer(engine, experts) for experts, *_ in problems]
    linear = _kernels.PackedLinear.from_int8(engine, *_kernels.quantize_int8(problems[0][0][0].gate))
    expected = [ref.forward(layer, *p[1:]) for layer, p in zip(layers, problems, strict=True)]
    x = problems[1][1]
    matrix_out = np.empty((len(x), 96), dtype=np.float32)
    linear.forward(x, matrix_out)
    wrong: list[str] = []

    def call(which: int) -> None:
        for _ in range(100):
            if which < 2:
                got = ref.forward(layers[which], *problems[which][1:])
                good = np.array_equal(got, expected[which])
            else:
                out = np.empty_like(matrix_out)
                linear.forward(x, out)
                good = np.array_equal(out, matrix_out)
            if not good:
                wrong.append(f"caller {which}")

    callers = [threading.Thread(target=call, args=(which,)) for which in (0, 1, 2, 0)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_engines_come_and_go() -> None:
    """Threads end with their engine, used or not, while others run."""
    experts, x, ids, weights = problem(76, "int8", 3)
    steady = ref.make_layer(_kernels.Engine(2), experts)
    expected = ref.forward(steady, x, ids, weights)
    gc.collect()  # engines of other tests
    before = threads_of_process()
    for i in range(60):
        engine = _kernels.Engine(1 + i % 7)
        if i % 2:
            assert np.array_equal(ref.forward(ref.make_layer(engine, experts), x, ids, weights), expected)
        assert np.array_equal(ref.forward(steady, x, ids, weights), expected)
        del engine
    gc.collect()
    assert threads_of_process() == before


def threads_of_process() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


def test_layer_keeps_engine_and_blobs_alive() -> None:
    """The caller keeps the layer alone: not the engine, not the blobs, and the list of blobs is emptied."""
    experts, x, ids, weights = problem(77, "int8", 5)
    blobs = [expert.blob() for expert in experts]
    alive = [weakref.ref(blob) for blob in blobs]
    layer = _kernels.ExpertLayer(_kernels.Engine(2), 320, 96, ["int8"] * 8, blobs)
    expected = ref.forward(layer, x, ids, weights)
    blobs.clear()
    gc.collect()
    assert [blob() is not None for blob in alive] == [True] * 8
    assert np.array_equal(ref.forward(layer, x, ids, weights), expected)
    del layer
    gc.collect()
    assert [blob() for blob in alive] == [None] * 8


def test_other_python_threads_run_meanwhile() -> None:
    """forward gives the interpreter lock away: a counter in Python moves while one long forward runs."""
    experts, x, ids, weights = problem(78, "bf16", 4096)
    layer = ref.make_layer(_kernels.Engine(1, "scalar"), experts)
    done = threading.Event()

    def call() -> None:
        ref.forward(layer, x[:600], ids[:600], weights[:600])
        done.set()

    caller = threading.Thread(target=call)
    caller.start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    caller.join()
    assert turns > 5


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_thread_counts_out_of_range(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads must be 1 to 1024, got {threads}"):
        _kernels.Engine(threads)
    with pytest.raises(UsageError, match=f"threads must be 1 to 1024, got {threads}"):
        ExpertEngine(threads)
