"""What each step of kttools profile-experts does, between the command line and kttools.profiling."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kttools import options
from kttools.progress import TokenProgress

if TYPE_CHECKING:
    from kttools.profiling.gather import Job
    from kttools.profiling.plain_policies import PlainPolicy


def everything(model: str, evaluation: tuple[str, ...], output: Path, **given: Any) -> None:
    """All steps; without evaluation text it ends with the table. They share one model, unless layers are
    streamed for collecting."""
    from kttools.profiling.gather import merge_directories

    job = _job(model, output, **given)
    runner = None if job.is_streamed else _runner(model, given)
    _collect_here(job, runner)
    merge_directories((output,), output)
    step = evaluate if evaluation else allocate
    step(model, output=output, evaluation=evaluation, runner=runner, **given)


def collect(model: str, output: Path, ray: str | None, workers: int, as_json: bool, **given: Any) -> None:
    """Text into shards, here or on a Ray cluster."""
    job = _job(model, output, **given)
    found = _collect_here(job) if ray is None else _collect_there(job, ray, workers)
    if as_json:
        _print(True, {"directory": str(output), **found})


def merge(sources: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Shards into a profile."""
    from kttools.profiling.gather import merge_directories

    header = merge_directories(sources, output).header
    _print(as_json, {"shards": len(header["shards"]), "domains": header["domains"]})


def allocate(model: str, output: Path, as_json: bool, **given: Any) -> None:
    """A table from the profile in `output`."""
    from kttools.profiling import run

    goal = _goal(run, given)
    _, allocation, path = run.allocate_step(_runner(model, given), output, goal, options.notice)
    chosen = getattr(allocation, goal.kind_of(allocation))
    _print(as_json, {"table": str(path), "kl_on_probes": chosen.measured.kl_mean})


def evaluate(
    model: str,
    evaluation: tuple[str, ...],
    output: Path,
    as_json: bool,
    tables: tuple[str, ...] = (),
    policies: tuple["PlainPolicy", ...] = (),
    **given: Any,
) -> None:
    """Tables and baselines against the full model, then the report. Raises QualityGateError."""
    if tables or policies:
        _judge(model, evaluation, output, as_json, tables, policies, **given)
        return
    from kttools.profiling import run
    from kttools.profiling.gather import TextLimits

    runner, goal = _runner(model, given), _goal(run, given)
    made = run.allocate_step(runner, output, goal, options.notice)
    limits = TextLimits(given["window"], given["eval_tokens"])
    document = run.evaluate_step(
        runner, evaluation, output, limits, goal, *made[:2], given["pareto"], options.notice
    )
    report(output)
    _finish(as_json, document, output)


def report(directory: Path) -> None:
    """HTML, Markdown, JSON and pictures."""
    from kttools.profiling.report import write_report

    for path in write_report(directory):
        options.notice(f"wrote {path}")


def install(bundle: Path, table: Path) -> None:
    """The table becomes the bundle's default."""
    from kttools.profiling.gather import open_runner
    from kttools.profiling.install import install_table

    install_table(bundle, table, open_runner(bundle, 1, None, streamed=True).fingerprint)
    options.notice(f"{table} is now the default of {bundle}")


def export(directory: Path, output: Path | None) -> None:
    """Files for other programs."""
    from kttools.profiling.run import export_step

    for path in export_step(directory, output):
        options.notice(f"wrote {path}")


def _job(model: str, output: Path, **given: Any) -> "Job":
    from kttools.model_source import resolve_model
    from kttools.profiling.collect import Part
    from kttools.profiling.gather import Job, TextLimits

    return Job(
        bundle=resolve_model(model),
        data=given["data"],
        output=output,
        limits=TextLimits(given["window"], given["tokens"]),
        gram_every=given["gram_every"],
        part=Part(*given.get("shard", (1, 1))),
        stream_layers=given["stream_layers"],
        threads=given["cpu_infer"],
        isa=given["isa"],
    )


def _collect_here(job: "Job", runner: Any = None) -> dict[str, Any]:
    from kttools.profiling.gather import collect_part

    with TokenProgress("collect", is_quiet=options.settings().quiet) as bar:
        done = collect_part(job, options.notice, bar.start, bar.advance, runner)
    return _collected([done])


def _collect_there(job: "Job", address: str, workers: int) -> dict[str, Any]:
    from dataclasses import replace

    from kttools.profiling.gather import collect_part, parts
    from kttools.profiling.ray_adapter import run_shards

    threads = job.threads or 1
    job = replace(job, bundle=job.bundle.absolute(), output=job.output.absolute(), threads=threads)
    where = None if address == "local" else address
    shared = run_shards(collect_part, parts(job, workers), where, threads)
    done = []
    for index, result in shared:
        options.notice(f"part {index + 1} of {workers}: {result.recorded_tokens} tokens recorded")
        done.append(result)
    return _collected(done)


def _collected(done: list[Any]) -> dict[str, Any]:
    recorded, kept = sum(d.recorded_tokens for d in done), sum(d.kept_tokens for d in done)
    seconds = max(d.seconds for d in done)
    speed = f" at {recorded / seconds:.0f} tokens/s" if recorded else ""
    options.notice(f"collect: {recorded} tokens recorded{speed}, {kept} kept from an earlier run")
    return {"recorded_tokens": recorded, "kept_tokens": kept, "seconds": seconds}


def _runner(model: str, given: dict[str, Any]) -> Any:
    """The model that a step before has loaded, else one that is loaded now."""
    if given.get("runner") is not None:
        return given["runner"]
    from kttools.model_source import resolve_model
    from kttools.profiling.gather import open_runner

    return open_runner(resolve_model(model), given["cpu_infer"], given["isa"])


def _goal(run: Any, given: dict[str, Any]) -> Any:
    return run.Goal(given["mean_experts"], given["kind"], given["name"], given.get("max_kl"))


def _judge(
    model: str,
    evaluation: tuple[str, ...],
    output: Path,
    as_json: bool,
    tables: tuple[str, ...],
    policies: tuple["PlainPolicy", ...],
    **given: Any,
) -> None:
    """Any tables and policies, without a profile. Raises QualityGateError for a table above the floor."""
    from kttools.model_source import resolve_model
    from kttools.profiling.gather import TextLimits
    from kttools.profiling.judge_any import judge_any
    from kttools_runtime.errors import QualityGateError

    document = judge_any(
        _runner(model, given),
        resolve_model(model),
        evaluation,
        output,
        TextLimits(given["window"], given["eval_tokens"]),
        tables,
        policies,
        given["max_kl"],
        options.notice,
    )
    if as_json:
        names = ("policies", "comparisons", "floor")
        _print(True, {"directory": str(output), **{name: document[name] for name in names}})
    else:
        _print_policies(document)
    if document["floor"] and not document["floor"]["pass"]:
        raise QualityGateError(f"{output}: {'; '.join(document['floor']['reasons'])}")


def _finish(as_json: bool, document: dict[str, Any], output: Path) -> None:
    from kttools_runtime.errors import QualityGateError

    verdict = document["verdict"]
    if as_json:
        _print(True, {"directory": str(output), "verdict": verdict, "policies": document["policies"]})
    else:
        _print_policies(document)
        click.echo(f"verdict for the {verdict['policy']} table: {'pass' if verdict['pass'] else 'no pass'}")
    if not verdict["pass"]:
        raise QualityGateError(f"{output}: the table does not pass: {'; '.join(verdict['reasons'])}")


def _print_policies(document: dict[str, Any]) -> None:
    for policy in document["policies"]:
        pooled = policy["metrics"]["pooled"]
        click.echo(f"{policy['label']:44} {policy['k_mean']:.3f} experts  KL {pooled['kl_mean']:.5f}")


def _print(as_json: bool, document: dict[str, Any]) -> None:
    click.echo(
        json.dumps(document, indent=1) if as_json else "\n".join(f"{k}: {v}" for k, v in document.items())
    )
