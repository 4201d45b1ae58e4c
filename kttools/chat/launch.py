"""From MODEL and options to a session: find or make the bundle, load it, set the defaults."""

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kttools.model_source import ensure_bundle, resolve_model
from kttools.options import notice
from kttools.trust_options import check_trust
from kttools_runtime.errors import InvalidInputError, UsageError

from .session import ChatOptions, ChatSession, sampling_params

LARGE_BYTES = 1 << 30  # a load of less is over before its plan is read


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What kt.load() is told; None means its own default."""

    device: str = "cpu"
    cpu_infer: int | None = None
    isa: str | None = None
    expert_table: str | None = None
    experts: int | None = None
    cache_lens: int | None = None
    numa: str = "auto"
    gpu_experts: str | None = None
    defer_experts: int = 0
    prefill: str = "auto"
    graphs: bool = True
    overcommit: bool = False
    preload: str = "background"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling options as given; None means the model's own default."""

    temp: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None


def open_session(
    model_name: str,
    load: LoadOptions,
    sampling: Sampling,
    n_predict: int,
    gguf_path: str | None = None,
    **options: Any,
) -> tuple[ChatSession, float]:
    """The session and the seconds that loading took.

    options: other fields of ChatOptions, and what signature_options() gives.
    gguf_path: weights that replace those of model_name.
    """
    from kttools.plan.before_quantize import check_loadable

    weights = resolve_model(gguf_path) if gguf_path else None
    path = resolve_model(model_name)
    check_trust(path, options)

    def quantise(source: Path, target: Path, gguf: Path | None) -> None:
        if load.device == "cpu" and not load.overcommit:
            check_loadable(source, gguf, load.cache_lens, load.numa, load.cpu_infer)
        quantise_in_cache(source, target, gguf)

    bundle = ensure_bundle(path, quantise, weights)
    started = time.perf_counter()
    model = load_model(bundle, load)
    load_s = time.perf_counter() - started
    tokenizer = model.tokenizer
    params = sampling_params(
        tokenizer.generation_config,
        str(bundle),
        temperature=sampling.temp,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repeat_penalty,
        seed=sampling.seed,
    )
    chosen = ChatOptions(sampling=params, max_new_tokens=None if n_predict < 0 else n_predict, **options)
    return ChatSession(model, tokenizer, load.cache_lens, chosen), load_s


def load_model(bundle: Path, load: LoadOptions) -> Any:
    """kt.load() with our options' names, its packs being read unless they are larger than RAM. Raises what it
    raises."""
    import kttools_runtime as kt

    plans = []

    def planned(plan: Any) -> None:
        announce(load, plan)
        plans.append(plan)

    model = kt.load(
        bundle,
        device=load.device,
        threads=load.cpu_infer,
        cache_len=load.cache_lens,
        expert_table=load.expert_table,
        num_experts=load.experts,
        isa=load.isa,
        numa=load.numa,
        gpu_experts=load.gpu_experts,
        defer_experts=load.defer_experts,
        prefill=load.prefill,
        graphs=load.graphs,
        check_memory=not load.overcommit,
        on_plan=planned,
    )
    if load.preload != "off" and all(plan.fits for plan in plans):
        reader = model.pack_reader()
        reader.start()
        if load.preload == "wait":
            reader.wait()
    return model


def announce(load: LoadOptions, plan: Any) -> None:
    """Says what a load will take, unless that is little, and what each of several memory nodes gets."""
    if plan.ram.total >= LARGE_BYTES:
        notice(plan.line())
    numa = plan.ram.numa
    if len(numa.node_bytes) > 1 or load.numa in ("shard", "replicate"):
        notice(numa.line())


def quantise_in_cache(
    source: Path, target: Path, weights: Path | None = None, formats: tuple[str, ...] = ()
) -> None:
    """Makes the bundle of a checkpoint; the plan goes to stderr (the answer alone belongs on stdout).

    formats: options of quantize; the default formats without.
    """
    from kttools.commands.quantize import command as quantize

    notice(f"{source} is a checkpoint, not a bundle: quantising it once into {target}")
    context = click.get_current_context()
    with context.scope(), contextlib.redirect_stdout(sys.stderr):
        arguments = [str(source), "-o", str(target), *(["--gguf_path", str(weights)] if weights else [])]
        arguments += formats
        with quantize.make_context("quantize", arguments, parent=context.parent) as inner:
            quantize.invoke(inner)


def check_combination(raw: bool, system: str | None, force_think: bool) -> None:
    """Raises UsageError for options that contradict each other."""
    if raw and (system is not None or force_think):
        raise UsageError("--raw completes plain text: it excludes -sys and --force_think")
    if system is not None and not system.strip():
        raise InvalidInputError("the system message is empty")
