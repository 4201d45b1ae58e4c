"""kttools profile-experts: fewer experts per token, with a certificate."""

import json
from pathlib import Path
from typing import Any

import click

from kttools import options

EPILOG = """\b
Examples:
  kttools profile-experts BUNDLE --data code=jsonl:code.jsonl#text --data zh=jsonl:zh.jsonl#text
      --eval code=jsonl:code-test.jsonl#text --eval law=jsonl:law.jsonl#text -o profile/
  kttools profile-experts BUNDLE --step collect --shard 2/8 --data ... -o part2/
  kttools profile-experts --step merge --from part1 --from part2 -o profile/
"""
STEPS = ("all", "collect", "merge", "allocate", "evaluate", "report")


@click.command("profile-experts", epilog=EPILOG, short_help="Find out what fewer experts per token cost.")
@options.model_argument
@click.option("--data", multiple=True, metavar="SPEC", help="Text to profile, one per domain.")
@click.option("--eval", "evaluation", multiple=True, metavar="SPEC", help="Text to judge on.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR")
@click.option("--mean-experts", type=float, default=6.0, show_default=True, metavar="K")
@click.option(
    "--kind", type=click.Choice(("static", "adaptive")), help="Table [default: what measures better]."
)
@click.option("--name", default="experts", show_default=True, metavar="NAME", help="The table's name.")
@click.option("--max-kl", type=float, metavar="KL", help="Quality floor: most mean KL the table may have.")
@click.option("--tokens", type=click.IntRange(min=2), metavar="N", help="Most tokens per profiled domain.")
@click.option("--eval-tokens", type=click.IntRange(min=2), metavar="N", help="Most tokens per judged domain.")
@click.option(
    "--window",
    type=click.IntRange(2, 2048),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens of a document that are read.",
)
@click.option("--pareto", default="", metavar="K,K,...", help="Also judge tables of these means.")
@click.option("--shard", default="1/1", show_default=True, metavar="I/N", help="Collect part I of N.")
@click.option("--step", type=click.Choice(STEPS), default="all", show_default=True, help="One step alone.")
@click.option(
    "--from", "sources", multiple=True, type=click.Path(path_type=Path), metavar="DIR", help="Merge these."
)
@options.cpu_infer_option
@options.isa_option
@options.json_option
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Profile MODEL's experts on text, make an expert table and judge it against the full model.

    Writes shards/, a profile, a table, evaluation.json and a report into DIR. A run that was cut off goes on
    where it stopped. The exit code is 6 when the table does not pass.
    """
    argument, option = given.pop("model_argument"), given.pop("model_option")
    model = None if given["step"] in ("merge", "report") else options.pick_model(argument, option, ctx)
    _run(model, **given)


def _run(model: str | None, step: str, output: Path, sources: tuple[Path, ...], **given: Any) -> None:
    from kttools.profiling import run

    as_json = given["as_json"]
    say = options.notice
    if step == "merge":
        profile = run.merge_step(sources or (output,), output)
        _print(as_json, {"shards": len(profile.header["shards"]), "domains": profile.header["domains"]})
        return
    if step != "report":
        runner = _runner(str(model), given["cpu_infer"], given["isa"])
        goal = run.Goal(given["mean_experts"], given["kind"], given["name"], given["max_kl"])
        limits = run.TextLimits(given["window"], given["tokens"])
        if step in ("all", "collect"):
            _collect(run, runner, given, output, limits, str(model))
        if step == "all":
            run.merge_step((output,), output)
        if step == "collect":
            return
        allocator, allocation, path = run.allocate_step(runner, output, goal, say)
        if step == "allocate" or not given["evaluation"]:
            _print(as_json, {"table": str(path), "kl_on_probes": allocation.best.measured.kl_mean})
            return
        judged = run.TextLimits(given["window"], given["eval_tokens"])
        means = [float(part) for part in given["pareto"].split(",") if part]
        document = run.evaluate_step(
            runner, given["evaluation"], output, judged, goal, allocator, allocation, means, say
        )
    else:
        from kttools_runtime import strict_json

        document = strict_json.read_object(output / run.EVALUATION_NAME)
    _report(output)
    _finish(as_json, document, output)


def _runner(model: str, threads: int | None, isa: str | None) -> Any:
    import kttools_runtime as kt
    from kttools.model_source import resolve_model
    from kttools.profiling.layerwise import LayerRunner

    return LayerRunner(kt.load(resolve_model(model), threads=threads, expert_table="none", isa=isa))


def _collect(run: Any, runner: Any, given: dict[str, Any], output: Path, limits: Any, model: str) -> None:
    from tqdm import tqdm

    from kttools.profiling.collect import Part
    from kttools_runtime.errors import UsageError

    if not given["data"]:
        raise UsageError("no text to profile: give --data SPEC, once per domain")
    try:
        index, count = map(int, given["shard"].split("/"))
    except ValueError:
        raise UsageError(f"--shard {given['shard']}: expected I/N, as 1/4") from None
    is_quiet = options.settings().quiet
    with tqdm(desc="collect", unit=" tokens", unit_scale=True, disable=is_quiet or None) as bar:
        done = run.collect_step(
            runner, given["data"], output, limits, Path(model).name, Part(index, count), bar.update
        )
    recorded, seconds = sum(d.recorded_tokens for d in done), sum(d.seconds for d in done)
    kept = sum(d.kept_tokens for d in done)
    speed = f", {recorded / seconds:.0f} tokens/s" if seconds else ""
    options.notice(f"collect: {recorded} tokens recorded{speed}, {kept} kept from an earlier run")


def _report(output: Path) -> None:
    from kttools.profiling.report import write_report

    for path in write_report(output):
        options.notice(f"wrote {path}")


def _finish(as_json: bool, document: dict[str, Any], output: Path) -> None:
    from kttools_runtime.errors import QualityGateError

    verdict = document["verdict"]
    if as_json:
        _print(True, {"directory": str(output), "verdict": verdict, "policies": document["policies"]})
    else:
        for policy in document["policies"]:
            pooled = policy["metrics"]["pooled"]
            click.echo(f"{policy['label']:44} {policy['k_mean']:.3f} experts  KL {pooled['kl_mean']:.5f}")
        click.echo(f"verdict for the {verdict['policy']} table: {'pass' if verdict['pass'] else 'no pass'}")
    if not verdict["pass"]:
        raise QualityGateError(f"{output}: the table does not pass: {'; '.join(verdict['reasons'])}")


def _print(as_json: bool, document: dict[str, Any]) -> None:
    click.echo(
        json.dumps(document, indent=1) if as_json else "\n".join(f"{k}: {v}" for k, v in document.items())
    )
