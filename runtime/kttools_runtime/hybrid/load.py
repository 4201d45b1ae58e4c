"""From a bundle to a HybridModel: layers to devices, linears to packed ones, packs to the CPU engine."""

import torch

from kttools_runtime import _kernels, env
from kttools_runtime.device_footprint import DeviceFootprint, device_footprints
from kttools_runtime.embedding import as_tensor, read_embedding
from kttools_runtime.errors import HardwareError
from kttools_runtime.experts import ExpertEngine
from kttools_runtime.footprint import stored_tensors
from kttools_runtime.linear import Linear, LinearSpec, Placement, TorchLinear
from kttools_runtime.loader import expert_source
from kttools_runtime.manifest import Manifest
from kttools_runtime.model import DEFAULT_CACHE_LEN, DecoderLayer, build_layer, build_norm
from kttools_runtime.moe import MoELayer
from kttools_runtime.shards import ShardWeights

from .choose import hot_experts
from .feed import ExpertFeed
from .fused_router import fastest_route
from .gating import read_gating
from .handoff import Courier
from .hot import HotExperts
from .hot_codes import hot_codes, is_requantised
from .linears import linear_maker
from .mixture import Mixture
from .model import HybridModel
from .options import HybridOptions
from .prefill import Prefill
from .untile import PackFile


def load_hybrid(
    manifest: Manifest,
    shards: ShardWeights,
    dtype: torch.dtype,
    engine: ExpertEngine,
    cache_len: int | None,
    num_experts: int | None,
    options: HybridOptions,
) -> HybridModel:
    """Raises UsageError for options that the model cannot do, HardwareError, ResourceError and what reading
    shards and packs raises."""
    config = manifest.model
    options.check(config)
    if not options.devices.is_simulated and not _kernels.loaded_cudart():
        raise HardwareError("torch has no CUDA runtime in this process; use --device cpu")
    length = cache_len or min(config.max_position_embeddings, DEFAULT_CACHE_LEN)
    footprints = _footprints(manifest, shards, dtype, length, options)
    placed = [d for d, own in enumerate(footprints) for _ in range(*own.layers)]
    placements = [
        Placement(shards, device, dtype, None, linear_maker(device, dtype))
        for device in options.devices.torch_devices
    ]
    experts = expert_source(manifest, shards, dtype, engine)
    layers = [
        build_layer(config, placements[placed[index]], index, experts, num_experts)
        for index in range(config.num_hidden_layers)
    ]
    embedding = read_embedding(shards, config)
    last = placements[placed[-1]]
    head: Linear
    if config.tie_word_embeddings:
        head = TorchLinear(as_tensor(embedding).to(device=last.device, dtype=dtype))
    else:
        head = last.linear(LinearSpec("lm_head", config.vocab_size), config.hidden_size)
    courier = Courier(env.engine_timeout_s())
    return HybridModel(
        config,
        placements,
        embedding,
        layers,
        build_norm(config, last, "model.norm"),
        head,
        engine.threads,
        cache_len,
        manifest.root / "tokenizer",
        options=options,
        layer_devices=placed,
        mixtures=_mixtures(manifest, shards, layers, engine, dtype, courier, footprints, options),
        courier=courier,
    )


def _footprints(
    manifest: Manifest, shards: ShardWeights, dtype: torch.dtype, cache_len: int, options: HybridOptions
) -> tuple[DeviceFootprint, ...]:
    tensors = stored_tensors(shards.infos, manifest.linears)
    config, count = manifest.model, len(options.devices.names)
    packs = sum(manifest.files[file].bytes for file in {expert.file for expert in manifest.experts.values()})
    streamed = packs // max(1, len(config.moe_layers) * config.n_routed_experts)
    return device_footprints(config, tensors, cache_len, count, dtype, expert_bytes=streamed)


def _mixtures(
    manifest: Manifest,
    shards: ShardWeights,
    layers: list[DecoderLayer],
    engine: ExpertEngine,
    dtype: torch.dtype,
    courier: Courier,
    footprints: tuple[DeviceFootprint, ...],
    options: HybridOptions,
) -> dict[int, Mixture]:
    config = manifest.model
    packs = {index: PackFile(manifest.expert_path(index)) for index in config.moe_layers}
    chosen = hot_experts(options, config, packs, footprints, dtype)
    feeds = [ExpertFeed(device) for device in options.devices.torch_devices]
    placed = [d for d, own in enumerate(footprints) for _ in range(*own.layers)]
    mixtures = {}
    for index, pack in packs.items():
        layer = layers[index].mlp
        if not isinstance(layer, MoELayer):
            raise AssertionError("config.moe_layers names a dense layer")
        device = layer.router.weight.device
        gating = read_gating(config, shards, index, device)
        hot = None
        if chosen.get(index):
            ids = chosen[index]
            codes = hot_codes(pack, ids, device, is_requantised(dtype), engine.threads)
            held = dict(zip(ids, codes, strict=True))
            is_triton = device.type == "cuda" and _has_triton()
            hot = HotExperts(held, config.n_routed_experts, device, dtype, is_triton, gating)
        defer = 0 if index == config.num_hidden_layers - 1 else options.defer_experts
        feed = feeds[placed[index]]
        prefill = Prefill(options.prefill, pack, dtype, engine.threads, engine.isa, feed, gating)
        mixtures[index] = Mixture(layer, courier, hot, defer, prefill, fastest_route(layer.router))
    return mixtures


def _has_triton() -> bool:
    from .triton_kernels import has_triton

    return has_triton()
