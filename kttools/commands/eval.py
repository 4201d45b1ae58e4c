"""kttools eval: perplexity, and the distance from a reference."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from kttools import options
from kttools.model_source import names_model
from kttools.progress import ByteProgress
from kttools_runtime.errors import UsageError

EPILOG = """\b
Examples:
  kttools eval ./bundle --data code=jsonl:code.jsonl#text --reference ./bundle-bf16
  kttools eval ./bundle-bf16 --data jsonl:text.jsonl --write-reference full.ktref
  kttools eval ./bundle --reference full.ktref
  kttools eval ./bundle --device cuda:0 --defer-up-to 4 --data jsonl:text.jsonl
"""
# A reference that is no bundle becomes one of this form in the cache.
FULL_FORMATS = ("--cpu-format", "bf16", "--gpu-format", "bf16")


@click.command("eval", epilog=EPILOG, short_help="Measure perplexity, and the distance from a reference.")
@options.model_argument
@click.option("--data", multiple=True, metavar="SPEC", help="Text, one spec per domain.")
@click.option(
    "--reference",
    metavar="MODEL|FILE",
    help="The full model (a checkpoint or GGUF is kept in bf16), or a file of --write-reference.",
)
@click.option(
    "--write-reference",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write MODEL's own predictions: the text's tokens, the best ids and their probabilities.",
)
@click.option(
    "--top-k", type=click.IntRange(1, 4096), default=64, show_default=True, help="Ids per token there."
)
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens at a time.")
@click.option("--tokens", type=click.IntRange(2), metavar="N", help="At most N tokens of each domain.")
@click.option(
    "--defer-up-to",
    type=click.IntRange(min=1),
    metavar="N",
    help="What --defer-experts 1 to N cost, against the same model without; needs --device.",
)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16")), help="Of MODEL; a reference is float32.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@options.cpu_infer_option
@options.isa_option
@options.device_options
@options.overcommit_option
@options.json_option
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Measure MODEL's perplexity on text; with a reference, also KL and how often the best token is the same.

    Intervals are 95 % bootstrap intervals over documents. A reference file brings its own text. Its KL is
    over the ids it lists and all others as one: at most the whole KL.
    """
    model = options.pick_model(given.pop("model_argument"), given.pop("model_option"), ctx)
    _check(given)
    _run(model, given)


def _check(given: dict[str, Any]) -> None:
    reference, target = given["reference"], given["write_reference"]
    is_file = is_reference_file(reference)
    if is_file and given["data"]:
        raise UsageError("a reference file brings its own text: leave out --data")
    if not is_file and not given["data"]:
        raise UsageError("--data is missing: the text to predict, for example --data jsonl:FILE#text")
    if given["defer_up_to"] is not None and (reference or target or given["defer_experts"]):
        raise UsageError(
            "--defer-up-to compares with MODEL itself: leave out --reference, --write-reference and"
            " --defer-experts"
        )
    if target is not None and reference is not None:
        raise UsageError("--write-reference writes MODEL's own predictions: leave out --reference")
    if target is not None:
        _check_target(target, given["force"])


def is_reference_file(text: str | None) -> bool:
    """Whether --reference names a file of answers; a file may also mean a model."""
    path = Path(text) if text else None
    return path is not None and path.is_file() and not names_model(path)


def _check_target(target: Path, is_forced: bool) -> None:
    """Before the work: the file will be written after hours of it."""
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"{target}: expected the name of a file in a directory that exists")
    if target.exists() and not is_forced:
        raise UsageError(f"{target}: already exists; choose another name, or --force to replace it")


def _run(model_name: str, given: dict[str, Any]) -> None:
    import kttools_runtime as kt
    from kttools.chat.launch import quantise_in_cache
    from kttools.eval import deferral, run
    from kttools.eval.reference_file import read_reference
    from kttools.eval.windows import read_windows
    from kttools.model_source import ensure_bundle, resolve_model

    reference = given["reference"]
    file = read_reference(Path(reference)) if is_reference_file(reference) else None
    bundle = ensure_bundle(resolve_model(model_name), quantise_in_cache)
    is_checked = not given["overcommit"]
    model: Any = kt.load(
        bundle,
        dtype=given["dtype"],
        threads=given["cpu_infer"],
        isa=given["isa"],
        cache_len=given["window"],
        check_memory=is_checked,
        **{
            **options.device_arguments(given),
            "defer_experts": given["defer_up_to"] or given["defer_experts"],
        },
    )
    with ByteProgress("eval", is_quiet=options.settings().quiet) as progress:
        if file is not None:
            run.check_vocabularies(model.config.vocab_size, file.vocab_size, reference)
            progress.start(sum(window.predicted for window in file.windows))
            tally = run.evaluate_against_file(model, file, progress.advance)
        else:
            windows = read_windows(given["data"], model.tokenizer, given["window"], given["tokens"])
            progress.start(sum(window.predicted for window in windows))
            if given["defer_up_to"] is not None:
                _print_sweep(
                    model_name, deferral.sweep(model, windows, given["defer_up_to"], progress.advance), given
                )
                return
            if given["write_reference"] is not None:
                _write(model, model_name, windows, given, progress)
                return
            other = None
            if reference:
                quantise = partial(quantise_in_cache, formats=FULL_FORMATS)
                other = kt.load(
                    ensure_bundle(resolve_model(reference), quantise, form="bf16"),
                    dtype="float32",
                    threads=given["cpu_infer"],
                    expert_table="none",
                    cache_len=given["window"],
                    check_memory=is_checked,
                )
                run.check_vocabularies(model.config.vocab_size, other.config.vocab_size, reference)
            tally = run.evaluate(model, windows, other, progress.advance)
    _print(model_name, reference, file.top_k if file else None, tally, given["as_json"])


def _print_sweep(model: str, tallies: Any, given: dict[str, Any]) -> None:
    from kttools.eval.deferral import as_text

    if not given["as_json"]:
        click.echo(as_text(tallies))
        return
    rows = [
        {"defer_experts": count, "scores": [score.to_dict() for score in tally.scores()]}
        for count, tally in tallies.items()
    ]
    click.echo(json.dumps({"model": model, "reference": model, "deferral": rows}, indent=1))


def _write(model: Any, name: str, windows: Any, given: dict[str, Any], progress: ByteProgress) -> None:
    from kttools.bundle.render import size
    from kttools.eval.reference_file import write_reference
    from kttools.eval.run import answers_of

    target = given["write_reference"]
    answers = answers_of(model, windows, given["top_k"], progress.advance)
    write_reference(target, name, model.config.vocab_size, windows, answers)
    tokens = sum(window.predicted for window in windows)
    document = {"file": str(target), "bytes": target.stat().st_size, "tokens": tokens}
    if given["as_json"]:
        click.echo(json.dumps(document, indent=1))
    else:
        click.echo(f"{target}: {tokens} predictions, {size(document['bytes'])}")


def _print(model: str, reference: str | None, top_k: int | None, tally: Any, as_json: bool) -> None:
    from kttools.eval.scores import as_text

    scores = tally.scores()
    if as_json:
        document = {"model": model, "reference": reference, "reference_top_k": top_k}
        click.echo(json.dumps(document | {"scores": [score.to_dict() for score in scores]}, indent=1))
        return
    click.echo(as_text(scores))
    if top_k is not None:
        click.echo(f"KL over the reference's best {top_k} ids and all others as one.")
