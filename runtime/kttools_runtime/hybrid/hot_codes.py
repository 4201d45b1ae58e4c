"""The codes in which a device holds hot experts: int4 whatever the pack has, or as the pack has them.

A device's memory is scarce and int4 is what its product reads fastest, so that an int8 or bf16 pack's experts
are requantised once, at load, as `quantize` makes int4 shards. An int4 pack is taken as it is: nothing is
rounded twice. float32, the reference path, keeps the pack's own numbers.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kttools_runtime import _kernels, env
from kttools_runtime.errors import UsageError
from kttools_runtime.weights import PARTS, LinearWeights

from .untile import INT4_GROUPS, ExpertCodes, PackFile, expert_device_bytes

CODES = ("auto", "int4", "pack")
FORMAT = "int4_g128"  # the group of quantize's int4 shards


def is_requantised(dtype: torch.dtype) -> bool:
    """What KTTOOLS_DEVICE_EXPERTS asks for, or what the dtype does. Raises UsageError."""
    kind = env.device_experts()
    if kind not in CODES:
        raise UsageError(f"KTTOOLS_DEVICE_EXPERTS must be one of {', '.join(CODES)}, got {kind!r}")
    return kind == "int4" or (kind == "auto" and dtype != torch.float32)


def hot_format(names: Iterable[str], requantise: bool) -> str | None:
    """The format that hot experts of a layer get; None: as the pack has them. names: all the layer's."""
    found = set(names)
    if not requantise or (len(found) == 1 and found <= set(INT4_GROUPS)):
        return None
    return FORMAT


def hot_expert_bytes(
    layers: Iterable[Iterable[str]], hidden: int, inner: int, dtype: torch.dtype = torch.bfloat16
) -> int:
    """The largest that a hot expert is on a device. layers: the formats that occur in each MoE layer."""
    requantise = is_requantised(dtype)
    held: set[str] = set()
    for names in {frozenset(names) for names in layers}:
        form = hot_format(names, requantise)
        held |= names if form is None else {form}
    return max((expert_device_bytes(name, hidden, inner) for name in held), default=0)


def hot_codes(
    pack: PackFile, experts: Sequence[int], device: torch.device, requantise: bool, threads: int = 1
) -> list[ExpertCodes]:
    """The experts on the device; their bytes leave the page cache again."""
    form = hot_format(pack.names, requantise)

    def one(expert: int) -> ExpertCodes:
        if form in (None, pack.name_of(expert)):
            return pack.codes(expert, device, keep_cached=False)
        return ExpertCodes(
            *(int4_weights(w, INT4_GROUPS[form], device) for w in pack.matrices(expert, False))
        )

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, experts))


def int4_weights(weight: Tensor, group_size: int, device: torch.device) -> LinearWeights:
    """weight float32 [N, K] on the host -> its int4 codes, as a shard has them."""
    made = _kernels.quantize_int4(weight.numpy(), group_size)
    parts = {name: torch.from_numpy(part).to(device) for name, part in zip(PARTS["int4"], made, strict=True)}
    return LinearWeights("expert", weight.shape[1], "int4", parts)
