"""The engine where the system does not play along: no more threads, and processes that fork.

Each case runs in a process of its own with a time limit, because what it must not do is hang.
"""

import subprocess
import sys

COMMON = """
import os, resource, sys, threading, time
import numpy as np
from kttools_runtime import _kernels
from kttools_runtime.errors import EngineError, ResourceError
from kttools_runtime.experts import ExpertEngine
from tests.engine import reference as ref

def layer_and_input(engine, tokens=2):
    rng = np.random.default_rng(5)
    experts = [ref.random_expert(rng, 320, 96, "int8") for _ in range(8)]
    ids, weights = ref.routing(rng, tokens, 4, 8, missing=0.1)
    return ref.make_layer(engine, experts), ref.bf16_matrix(rng, tokens, 320), ids, weights

def threads_of_process():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("Threads:"))

def in_child(function):
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
FORKED = "RuntimeError: this process was forked from the one whose engine this is"


def output_of(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", COMMON + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_forked_child_is_told() -> None:
    """Before and after the workers went to sleep."""
    code = """
problem = layer_and_input(_kernels.Engine(3))
for pause in (0, 0.1):
    expected = ref.forward(*problem)
    time.sleep(pause)
    in_child(lambda: ref.forward(*problem))
    assert np.array_equal(ref.forward(*problem), expected)
print("the parent computes")
"""
    first, second, last = output_of(code)
    assert first.startswith(FORKED)
    assert second.startswith(FORKED)
    assert last == "the parent computes"


def test_child_makes_its_own_engine() -> None:
    """And lets go of the inherited one, whose workers slept when it was copied: nothing waits for them."""
    code = """
problem = layer_and_input(_kernels.Engine(3))
expected = ref.forward(*problem)
time.sleep(0.1)

def fresh():
    global problem
    problem = layer_and_input(_kernels.Engine(3))
    print(np.array_equal(ref.forward(*problem), expected), threads_of_process(), flush=True)
    in_child(lambda: ref.forward(*problem))

in_child(fresh)
"""
    own, grandchild = output_of(code)
    assert own == "True 3"
    assert grandchild.startswith(FORKED)


def test_fork_during_a_forward() -> None:
    """Another thread held the engine's lock when the process was copied; the child does not wait for it."""
    code = """
problem = layer_and_input(_kernels.Engine(2, "scalar"), 600)
caller = threading.Thread(target=lambda: ref.forward(*problem))
caller.start()
time.sleep(0.02)
in_child(lambda: ref.forward(*problem))
print("during", caller.is_alive())
caller.join()
"""
    told, during = output_of(code)
    assert told.startswith(FORKED)
    assert during == "during True"


def test_expert_engine_names_the_error() -> None:
    code = """
import torch
engine = ExpertEngine(2)
layer = engine.layer_from_tensors(torch.ones(1, 32, 64), torch.ones(1, 32, 64), torch.ones(1, 64, 32))
ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
in_child(lambda: layer.forward(torch.ones(1, 64), ids, weights))
"""
    (told,) = output_of(code)
    assert told.startswith("EngineError: expert layer: this process was forked")


def test_threads_that_do_not_start() -> None:
    """Stacks for a thousand threads do not fit the address space: those that started end, fewer work."""
    code = """
before = threads_of_process()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (256 << 20), resource.RLIM_INFINITY))
for _ in range(2):
    try:
        ExpertEngine(1024)
    except ResourceError as error:
        print(error)
    assert threads_of_process() == before
problem = layer_and_input(_kernels.Engine(2))
ref.forward(*problem)
print("two threads work")
"""
    *errors, last = output_of(code)
    assert len(errors) == 2
    assert all(line.startswith("the system started ") for line in errors)
    assert all("of 1023 worker threads" in line and "ask for fewer threads" in line for line in errors)
    assert last == "two threads work"
