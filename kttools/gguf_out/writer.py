"""Streams a model into GGUF files: an expert or a block of rows at a time; whole files or none."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from kttools.bundle.atomic import replacing, translate_oserror
from kttools.bundle.render import size
from kttools.checkpoint.gguf.types import PLAIN, encode
from kttools_runtime.errors import InvalidInputError, ResourceError, UsageError

from .plan import Job, OutPlan, OutTensor

BLOCK_BYTES = 32 << 20


def check_target(plan: OutPlan, is_forced: bool) -> None:
    """Raises UsageError when a file exists and may not be replaced, ResourceError for too small a disk."""
    present = [file.path for file in plan.files if file.path.exists()]
    if present and not is_forced:
        raise UsageError(f"{present[0]}: already exists; choose another -o, or --force to replace it")
    folder = plan.files[0].path.absolute().parent
    if not folder.is_dir():
        raise InvalidInputError(f"{folder}: no such directory")
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if plan.bytes > free:
        raise ResourceError(
            f"{folder}: not enough disk: {size(plan.bytes)} needed, {size(free)} available; "
            f"free {size(plan.bytes - free)} or choose a smaller --type"
        )


def write(plan: OutPlan, on_bytes: Callable[[int], object] | None = None) -> None:
    """Writes all files. on_bytes: bytes written so far, piece by piece.

    Raises KTError or ResourceError (writing), InvalidInputError for a weight that is not finite.
    """
    with contextlib.ExitStack() as stack:
        sink = _Sink(on_bytes or _ignore)
        for file in plan.files:
            sink.add(stack.enter_context(_opened(file.path)), file.path, file.offsets, file.header)
        try:
            for job in plan.jobs:
                _write_job(plan, job, sink)
            for layer, outputs in plan.experts.items():
                _write_experts(plan, layer, outputs, sink)
            for file in plan.files:
                sink.finish(file.path, file.bytes)
            if len(plan.files) > 1:  # splits are named last to first: without the first they are no model
                plan.files[0].path.unlink(missing_ok=True)
        except OSError as error:
            raise translate_oserror(error, plan.files[0].path) from error


class _Sink:
    """Puts bytes at their places in one of several files."""

    def __init__(self, on_bytes: Callable[[int], object]) -> None:
        self._on_bytes = on_bytes
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: dict[Path, int] = {}

    def add(self, descriptor: int, path: Path, offsets: dict[str, int], header: bytes) -> None:
        self._descriptors[path] = descriptor
        self._places |= {name: (descriptor, offset) for name, offset in offsets.items()}
        _write_all(descriptor, memoryview(header), 0)

    def rows(self, tensor: OutTensor, first_row: int, values: torch.Tensor, where: str) -> None:
        """values: rows of the tensor taken as a matrix, from first_row on."""
        data = _stored(values, tensor, where)
        descriptor, offset = self._places[tensor.name]
        _write_all(descriptor, data.data.cast("B"), offset + first_row * tensor.row_bytes)
        self._on_bytes(data.nbytes)

    def finish(self, path: Path, file_bytes: int) -> None:
        """The file's full length, the last tensor's padding included."""
        os.ftruncate(self._descriptors[path], file_bytes)


def _write_job(plan: OutPlan, job: Job, sink: _Sink) -> None:
    source = job.source
    where = f"{plan.source.path}: tensor {source.name}"
    if job.arrange is not None:
        for out, values in zip(job.outputs, job.arrange(source.read()), strict=True):
            sink.rows(out, 0, values, where)
        return
    (out,) = job.outputs
    if len(source.shape) == 1:
        sink.rows(out, 0, source.read()[None], where)
        return
    step = max(1, BLOCK_BYTES // max(4 * source.shape[1], 1))
    for begin in range(0, source.shape[0], step):
        sink.rows(out, begin, source.read_rows(begin, min(begin + step, source.shape[0])), where)


def _write_experts(
    plan: OutPlan, layer: int, outputs: tuple[OutTensor, OutTensor, OutTensor], sink: _Sink
) -> None:
    for expert in range(plan.source.config.n_routed_experts):
        matrices = plan.source.read_expert(layer, expert)
        for out, matrix in zip(outputs, matrices, strict=True):
            where = f"{plan.source.path}: expert {expert} of layer {layer}, {out.name}"
            sink.rows(out, expert * out.shape[1], matrix, where)


def _stored(values: torch.Tensor, tensor: OutTensor, where: str) -> np.ndarray:
    """The bytes of rows in the tensor's type. Raises InvalidInputError for what does not stay finite."""
    rows = values.reshape(-1, tensor.shape[-1])
    plain = PLAIN.get(tensor.kind.name)
    kept = rows.to(plain) if plain is not None else rows.to(torch.float32)
    if not bool(torch.isfinite(kept).all()):
        row, column = torch.nonzero(~torch.isfinite(kept))[0].tolist()
        value = float(rows[row, column])
        raise InvalidInputError(f"{where}: the weight {value:g} cannot be written as {tensor.kind.name}")
    if plain is not None:
        return kept.contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(encode(kept.numpy(), tensor.kind))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    with replacing(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _ignore(_: int) -> None:
    return None
