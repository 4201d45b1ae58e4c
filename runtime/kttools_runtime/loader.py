"""From a bundle on disk to a Model: options checked first, then headers, then weights."""

from collections.abc import Callable
from pathlib import Path

import torch

from .config import ModelConfig
from .env import bound_kernel_caches
from .errors import UsageError
from .expert_table import locate_table
from .experts import ExpertEngine, ExpertLayer
from .footprint import stored_tensors
from .hybrid.devices import parse_devices
from .hybrid.options import HybridOptions, needs_device
from .linear import Placement
from .load_plan import LoadPlan, LoadRequest, make_load_plan
from .manifest import Manifest, load_manifest
from .model import DEFAULT_CACHE_LEN, Model, build_model
from .moe import RoutedExperts
from .pack_match import check_pack
from .shards import ShardWeights
from .weights import WeightSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: torch.bfloat16}


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    cache_len: int | None = None,
    expert_table: str | Path | None = None,
    num_experts: int | None = None,
    isa: str | None = None,
    stream_layers: bool = False,
    numa: str = "auto",
    check_memory: bool = True,
    on_plan: Callable[[LoadPlan], object] | None = None,
    defer_experts: int = 0,
    gpu_experts: str | None = None,
    prefill: str = "auto",
    graphs: bool = True,
) -> Model:
    """Open a bundle for computing.

    device: "cpu", or where all but the routed experts goes: "cuda:0", "cuda:0,cuda:1", or simulated devices
    "cpu:0,cpu:1" (see hybrid/, with defer_experts, gpu_experts, prefill, graphs). dtype: "float32"
    (activations never rounded; with bf16 packs and shards this is the reference path), "bfloat16", or None
    for the fastest that keeps quality, today bfloat16: inputs of
    matrix products and the KV cache are bfloat16, everything between them float32. threads: CPU threads;
    None: KTTOOLS_CPU_INFER or every CPU of this process. cache_len: default length of new caches in tokens.
    expert_table: a file, the name of a table in the bundle or among the project's own, None for the bundle's
    default (the native router where it has none) or "none". num_experts: fewer routed experts per token,
    without a table. isa: kernel table. numa: see numa.py. stream_layers: hold one layer at a time, for models
    larger than RAM and passes that take a layer for many texts (see layer_stream); expert_table must be
    "none" then. check_memory: refuse a model larger than what is free, before its weights are read. on_plan:
    told the sizes first. Raises UsageError, HardwareError, ResourceError, InvalidInputError and its
    subclasses.
    """
    bound_kernel_caches()
    devices = parse_devices(device)
    if devices is None:
        needs_device(defer_experts, gpu_experts, prefill)
    elif stream_layers:
        raise UsageError("layers are streamed with --device cpu only")
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    if cache_len is not None and cache_len < 1:
        raise UsageError(f"cache_len must be positive, got {cache_len}")
    if num_experts is not None and expert_table not in (None, "none"):
        raise UsageError("an expert table and a number of experts are both given: use one of them")
    if stream_layers and expert_table != "none":
        raise UsageError('layers that are streamed run the native router: expert_table must be "none"')
    manifest = load_manifest(path, allow_partial=stream_layers)
    asked = "none" if num_experts is not None else expert_table
    table = locate_table(asked, manifest.path, list(manifest.files))
    engine = ExpertEngine(threads, isa, numa)
    shards = ShardWeights(
        [manifest.path(name) for name in manifest.files if name.endswith(".safetensors")], manifest.linears
    )
    plan = make_load_plan(
        _request(
            manifest,
            shards,
            () if devices is None else devices.cuda_indices,
            DTYPES[dtype],
            engine,
            cache_len,
            stream_layers,
            numa,
            gpu_experts,
        )
    )
    if on_plan is not None:
        on_plan(plan)
    if check_memory:
        plan.check()
    if devices is None:
        model = _load(manifest, shards, DTYPES[dtype], engine, cache_len, num_experts, stream_layers)
    else:
        from .hybrid.load import load_hybrid

        asked_for = HybridOptions(devices, defer_experts, gpu_experts, prefill, graphs)
        model = load_hybrid(manifest, shards, DTYPES[dtype], engine, cache_len, num_experts, asked_for)
    if table is not None:
        model.use_table(table)
    return model


def _request(
    manifest: Manifest,
    shards: ShardWeights,
    devices: tuple[int, ...],
    dtype: torch.dtype,
    engine: ExpertEngine,
    cache_len: int | None,
    stream_layers: bool,
    numa: str,
    gpu_experts: str | None,
) -> LoadRequest:
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    longest = min(manifest.model.max_position_embeddings, DEFAULT_CACHE_LEN)
    hot, each = ((), 0) if gpu_experts is None or not devices else _hot_experts(manifest, gpu_experts, dtype)
    return LoadRequest(
        config=manifest.model,
        tensors=tuple(stored_tensors(shards.infos, manifest.linears)),
        experts=sum(sizes[file] for file in {expert.file for expert in manifest.experts.values()}),
        tokenizer=sum(size for name, size in sizes.items() if name.startswith("tokenizer/")),
        cache_len=1 if stream_layers else cache_len or longest,
        dtype=dtype,
        threads=engine.threads,
        numa=numa,
        nodes=engine.nodes,
        devices=devices,
        is_streamed=stream_layers,
        hot_experts=hot,
        expert_bytes=each,
    )


def _hot_experts(
    manifest: Manifest, gpu_experts: str, dtype: torch.dtype
) -> tuple[tuple[tuple[int, int], ...], int]:
    """((layer, routed experts of it that are asked for), bytes of one); auto takes what is left."""
    from .hybrid.hot_codes import hot_expert_bytes
    from .hybrid.hot_request import read_request

    config = manifest.model
    layers = [file.names for file in manifest.experts.values()]
    each = hot_expert_bytes(layers, config.hidden_size, config.moe_intermediate_size, dtype)
    return read_request(gpu_experts, config).per_layer(config), each


def expert_source(
    manifest: Manifest, shards: ShardWeights, dtype: torch.dtype, engine: ExpertEngine
) -> Callable[[int], RoutedExperts]:
    """Maps the pack of a layer."""

    def experts(layer: int) -> RoutedExperts:
        # int8 and int4 kernels quantise their input themselves: rounding it to bf16 first would only lose
        # bits. bf16 experts among them need it for the matrix unit.
        is_bf16 = "bf16" in manifest.expert_file(layer).names
        check_pack(manifest, layer)
        mapped = engine.layer_from_pack(manifest.expert_path(layer))
        configure_experts(mapped, manifest.model, shards, layer)
        return RoutedExperts(mapped, dtype if is_bf16 else torch.float32)

    return experts


def _load(
    manifest: Manifest,
    shards: ShardWeights,
    dtype: torch.dtype,
    engine: ExpertEngine,
    cache_len: int | None,
    num_experts: int | None,
    stream_layers: bool,
) -> Model:
    return build_model(
        manifest.model,
        Placement(shards, torch.device("cpu"), dtype, engine.native),
        expert_source(manifest, shards, dtype, engine),
        threads=engine.threads,
        cache_len=cache_len,
        num_experts=num_experts,
        tokenizer_dir=manifest.root / "tokenizer",
        stream_layers=stream_layers,
    )


def configure_experts(experts: ExpertLayer, config: ModelConfig, source: WeightSource, layer: int) -> None:
    """The biases and the gate of a layer's experts, which a pack does not hold."""
    if config.expert_bias:
        count, inner = config.n_routed_experts, config.moe_intermediate_size
        widths = {"gate_proj": inner, "up_proj": inner, "down_proj": config.hidden_size}
        prefix = f"model.layers.{layer}.mlp.experts."
        biases = (source.tensor(f"{prefix}{name}_bias", (count, width)) for name, width in widths.items())
        experts.set_biases(*(bias.to(torch.float32) for bias in biases))
    if config.swiglu_alpha is not None and config.swiglu_limit is not None:
        experts.set_swiglu(config.swiglu_alpha, config.swiglu_limit)
