"""From a bundle on disk to a Model: options checked first, then headers, then weights."""

from pathlib import Path

import torch

from .config import ModelConfig
from .errors import HardwareError, UsageError
from .expert_table import locate_table
from .experts import ExpertEngine, ExpertLayer
from .linear import Placement
from .manifest import Manifest, load_manifest
from .model import Model, build_model
from .moe import RoutedExperts
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
) -> Model:
    """Open a bundle for computing.

    device: "cpu" or "cuda:N". dtype: "float32" (activations never rounded; with bf16 packs and shards this is
    the reference path), "bfloat16", or None for the fastest that keeps quality, today bfloat16: inputs of
    matrix products and the KV cache are bfloat16, everything between them float32. threads: CPU threads;
    None: KTTOOLS_CPU_INFER or every CPU of this process. cache_len: default length of new caches in tokens.
    expert_table: a file, the name of a table in the bundle or among the project's own, None for the bundle's
    default (the native router where it has none) or "none". num_experts: fewer routed experts per token,
    without a table. isa: kernel table. numa: see numa.py. stream_layers: hold one
    layer at a time, for models larger than RAM
    and passes that take a layer for many texts (see layer_stream); expert_table must be "none" then. Raises
    UsageError, HardwareError, InvalidInputError and its subclasses.
    """
    where = _device(device)
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    if cache_len is not None and cache_len < 1:
        raise UsageError(f"cache_len must be positive, got {cache_len}")
    if num_experts is not None and expert_table not in (None, "none"):
        raise UsageError("an expert table and a number of experts are both given: use one of them")
    if stream_layers and expert_table != "none":
        raise UsageError('layers that are streamed run the native router: expert_table must be "none"')
    manifest = load_manifest(path)
    asked = "none" if num_experts is not None else expert_table
    table = locate_table(asked, manifest.path, list(manifest.files))
    engine = ExpertEngine(threads, isa, numa)
    model = _load(manifest, where, DTYPES[dtype], engine, cache_len, num_experts, stream_layers)
    if table is not None:
        model.use_table(table)
    return model


def _load(
    manifest: Manifest,
    device: torch.device,
    dtype: torch.dtype,
    engine: ExpertEngine,
    cache_len: int | None,
    num_experts: int | None,
    stream_layers: bool,
) -> Model:
    shards = ShardWeights(
        [manifest.path(name) for name in manifest.files if name.endswith(".safetensors")], manifest.linears
    )

    def experts(layer: int) -> RoutedExperts:
        # int8 and int4 kernels quantise their input themselves: rounding it to bf16 first would only lose
        # bits. bf16 experts among them need it for the matrix unit.
        is_bf16 = "bf16" in manifest.experts[layer].names
        mapped = engine.layer_from_pack(manifest.expert_path(layer))
        configure_experts(mapped, manifest.model, shards, layer)
        return RoutedExperts(mapped, dtype if is_bf16 else torch.float32)

    return build_model(
        manifest.model,
        Placement(shards, device, dtype, engine.native),
        experts,
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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UsageError(f"unknown device {name!r}: expected cpu or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}: expected cpu or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HardwareError(
            f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device
