"""The other end of kt_peer.py's pipe: JSON lines in and out. Run by an interpreter that has kt_kernel.

Imports nothing of kttools, which that environment need not have.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

import torch

CLASSES = {"int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE", "bf16": "AMXBF16_MOE"}
BITS = {"int8": 8, "int4": 4, "bf16": 16}
ROW_STEP = 64  # max_len has to be a multiple of its tile height


def thread_ids() -> set[int]:
    """Of this process."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def put_in_background(threads: set[int]) -> None:
    """kt-kernel's queue thread spins while its workers compute: let it run only where a core is idle."""
    for thread in threads:
        with open(f"/proc/self/task/{thread}/comm", encoding="utf-8") as name:
            if name.read().startswith("numa_"):
                continue  # a worker
        with contextlib.suppress(OSError):
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


class Layer:
    """One MoE layer of kt-kernel."""

    def __init__(self, extension: Any, request: dict[str, Any]) -> None:
        self.num_experts, self.top_k = request["num_experts"], request["top_k"]
        self.hidden_size = request["hidden_size"]
        self._queue = self._start(extension, request["threads"])
        source = self._source(request)
        self._map = torch.arange(self.num_experts, dtype=torch.int64)
        self._mask = torch.zeros(self.num_experts, dtype=torch.bool)
        config = self._config(extension, request, source)
        self._moe = getattr(extension.moe, CLASSES[request["format"]])(config)
        self._queue.submit(self._moe.load_weights_task(self._map.data_ptr()))
        self._queue.sync()
        self._keep = source if request["format"] == "bf16" else ()  # the others hold quantised copies
        self._generator = torch.Generator().manual_seed(2)

    def _start(self, extension: Any, threads: int) -> Any:
        config = extension.WorkerPoolConfig()
        config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [threads]
        before = thread_ids()
        queue = extension.CPUInfer(config)
        put_in_background(thread_ids() - before)
        return queue

    def _source(self, request: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """gate, up [E, I, H] and down [E, H, I] in bf16: of files, or one random expert for all."""
        hidden, intermediate = request["hidden_size"], request["moe_intermediate_size"]
        sizes = [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
        if request["files"]:
            pairs = zip(request["files"], sizes, strict=True)
            return tuple(read(path, torch.bfloat16, (self.num_experts, *size)) for path, size in pairs)
        one = (torch.randn(size).mul_(size[1] ** -0.5).to(torch.bfloat16) for size in sizes)
        if request["format"] == "bf16":  # takes a pointer per expert, so one is enough
            return tuple(matrix.expand(self.num_experts, -1, -1) for matrix in one)
        return tuple(matrix.repeat(self.num_experts, 1, 1) for matrix in one)

    def _config(self, extension: Any, request: dict[str, Any], source: Any) -> Any:
        sizes = self.num_experts, self.top_k, self.hidden_size, request["moe_intermediate_size"]
        config = extension.moe.MOEConfig(*sizes, self._mask.data_ptr())
        rows = -(-request["max_tokens"] // ROW_STEP) * ROW_STEP
        config.layer_idx, config.pool, config.max_len = 0, self._queue.backend_, rows
        config.physical_to_logical_map = self._map.data_ptr()
        for name, tensor in zip(("gate", "up", "down"), source, strict=True):
            if request["format"] == "bf16":
                pointers = [expert.data_ptr() for expert in tensor]
                setattr(config, f"{name}_projs", [pointers])
                setattr(config, f"{name}_scales", [[0] * self.num_experts])
            else:
                setattr(config, f"{name}_proj", tensor.data_ptr())
        return config

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> float:
        """Seconds of one call."""
        count = torch.tensor([x.shape[0]], dtype=torch.int32)
        tensors = (t.data_ptr() for t in (ids, weights, x, out))
        start = time.perf_counter()
        self._queue.submit(self._moe.forward_task(count.data_ptr(), self.top_k, *tensors, False))
        self._queue.sync()
        return time.perf_counter() - start

    def random_call(self, num_tokens: int) -> tuple[float, int]:
        """(seconds, experts hit) with fresh ids."""
        x = torch.randn(num_tokens, self.hidden_size, generator=self._generator).to(torch.bfloat16)
        keys = torch.rand(num_tokens, self.num_experts, generator=self._generator)
        ids = keys.topk(self.top_k, dim=1).indices.contiguous()
        weights = torch.rand(num_tokens, self.top_k, generator=self._generator)
        out = torch.zeros_like(x)
        return self.forward(x, ids, weights, out), int(ids.unique().numel())


def read(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A raw file as a tensor."""
    with open(path, "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=dtype).view(shape)


def answer(state: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request; state holds the extension and the layer."""
    op = request["op"]
    if op == "hello":
        package = importlib.import_module("kt_kernel")
        state["extension"], state["variant"] = package.kt_kernel_ext, package.__cpu_variant__
        return {"version": package.__version__}
    if op == "load":
        state.pop("layer", None)
        state["layer"] = Layer(state["extension"], request)
        weights = 3 * request["hidden_size"] * request["moe_intermediate_size"]
        return {"variant": str(state["variant"]), "expert_bytes": weights * BITS[request["format"]] // 8}
    layer: Layer = state["layer"]
    if op == "call":
        layer.random_call(1)
        seconds, experts_hit = layer.random_call(request["num_tokens"])
        return {"seconds": seconds, "experts_hit": experts_hit}
    if op == "forward":
        tokens = request["num_tokens"]
        x = read(request["x"], torch.bfloat16, (tokens, layer.hidden_size))
        ids = read(request["ids"], torch.int64, (tokens, layer.top_k))
        weights = read(request["weights"], torch.float32, (tokens, layer.top_k))
        out = torch.zeros_like(x)
        layer.forward(x, ids, weights, out)
        out.view(torch.uint16).numpy().tofile(request["out"])
        return {}
    raise ValueError(f"unknown op {op}")


def private_stdout() -> TextIO:
    """The pipe, out of reach of kt-kernel's own prints, which go where stderr goes."""
    sys.stdout.flush()
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def main() -> None:
    torch.set_num_threads(1)  # its team must not spin beside the workers
    with contextlib.suppress(OSError):
        # A real-time caller's priority is inherited; with spinning threads it would lock up the cores.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    pipe = private_stdout()
    state: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            reply = answer(state, json.loads(line))
        except Exception as error:  # whatever it is, the other side reports it
            reply = {"error": f"{type(error).__name__}: {error}"}
        pipe.write(json.dumps(reply) + "\n")
        pipe.flush()


if __name__ == "__main__":
    main()
