"""kttools profile-experts: fewer experts per token, with a certificate. One command, and its steps."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kttools import options

from . import profile_steps as steps

if TYPE_CHECKING:
    from kttools.profiling.plain_policies import PlainPolicy

EPILOG = """\b
Examples:
  kttools profile-experts BUNDLE --data code=jsonl:code.jsonl#text --data zh=jsonl:zh.jsonl#text
      --eval code=jsonl:code-test.jsonl#text --eval law=jsonl:law.jsonl#text -o profile/
  kttools profile-experts collect BUNDLE --shard 2/8 --data code=jsonl:code.jsonl#text -o part2/
  kttools profile-experts merge part1/ part2/ -o profile/
  kttools profile-experts evaluate BUNDLE --eval law=jsonl:law.jsonl#text --table ds3-nano-6-static
      --policies flat:6,ser:5:0.79 -o judged/
  kttools profile-experts install BUNDLE profile/experts.expert-table.json
A bundle that is called like a step is written ./collect.
"""
DEFAULT_STEP = "all"


class Steps(click.Group):
    """A group whose default command needs no name: `profile-experts MODEL ...` is `... all MODEL ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *self.get_help_option_names(ctx)}:
            args = [DEFAULT_STEP, *args]
        return super().parse_args(ctx, args)


class PartType(click.ParamType):
    """I/N as a pair of numbers."""

    name = "part"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        index, _, count = str(value).partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            self.fail(f"{value!r}: expected I/N with I from 1 to N, as 1/4", param)
        return int(index), int(count)


class Means(click.ParamType):
    """Comma-separated mean numbers of experts."""

    name = "means"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r}: expected numbers separated by commas, as 4,5,7", param)


class PlainPolicies(click.ParamType):
    """Comma-separated policies given by their parameters."""

    name = "policies"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple["PlainPolicy", ...]:
        from kttools.profiling.plain_policies import parse_plain

        if isinstance(value, tuple):
            return value
        return tuple(parse_plain(part) for part in str(value).split(",") if part.strip())


def _several(*decorators: Any) -> Any:
    def decorate(function: options.F) -> options.F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_directory = click.Path(path_type=Path, file_okay=False)
_output = click.option("-o", "--output", type=_directory, required=True, metavar="DIR", help="Where it goes.")
_tokens = click.IntRange(min=2)
_window = click.option(
    "--window", type=click.IntRange(2, 2048), default=1024, show_default=True, metavar="N",
    help="Tokens of a document that are read.",
)  # fmt: skip
_engine = _several(options.cpu_infer_option, options.isa_option)
_stream = click.option(
    "--stream-layers/--no-stream-layers", default=None,
    help="Hold one layer in memory at a time, hidden states on disk [default: if the bundle exceeds RAM].",
)  # fmt: skip
_collecting = _several(
    click.option("--data", multiple=True, required=True, metavar="SPEC", help="Text, one per domain."),
    click.option("--tokens", type=_tokens, metavar="N", help="Most tokens per profiled domain."),
    click.option(
        "--gram-every", type=click.IntRange(1, 1024), default=8, show_default=True, metavar="N",
        help="Observe expert outputs of one token in N; choices are counted for all.",
    ),
    _stream,
)  # fmt: skip
_goal = _several(
    click.option("--mean-experts", type=float, default=6.0, show_default=True, metavar="K"),
    click.option("--kind", type=click.Choice(("static", "adaptive")), help="[default: what measures better]"),
    click.option("--name", default="experts", show_default=True, metavar="NAME", help="The table's name."),
)
_judging = _several(
    click.option(
        "--max-kl", type=float, metavar="KL", help="Quality floor: most mean KL the table may have."
    ),
    click.option("--eval-tokens", type=_tokens, metavar="N", help="Most tokens per judged domain."),
    click.option("--pareto", type=Means(), default="", metavar="K,K,...", help="Also judge these means."),
)
_DIR = click.argument("directory", type=_directory, metavar="DIR")


@click.group(
    cls=Steps,
    epilog=EPILOG,
    short_help="Find out what fewer experts per token cost.",
    context_settings={"token_normalize_func": options.normalise_token},
)
def command() -> None:
    """Profile a model's experts on text, make an expert table and judge it against the full model.

    Without a step's name all steps run. A run that was cut off goes on where it stopped.
    """


@command.command(DEFAULT_STEP, short_help="All steps; what runs without a step's name.")
@options.model_argument
@_collecting
@click.option("--eval", "evaluation", multiple=True, metavar="SPEC", help="Text to judge on.")
@_output
@_window
@_goal
@_judging
@_engine
@options.json_option
@click.pass_context
def everything(ctx: click.Context, **given: Any) -> None:
    """Collect, merge, allocate, evaluate and report into DIR.

    Writes shards/, a profile, a table, evaluation.json and a report. The exit code is 6 when the table does
    not pass. Without --eval it ends with the table.
    """
    steps.everything(_picked(ctx, given), **given)


@command.command(short_help="Text into shards of statistics.")
@options.model_argument
@_collecting
@_output
@_window
@click.option(
    "--shard", type=PartType(), default="1/1", show_default=True, metavar="I/N", help="Part I of N."
)
@click.option("--ray", metavar="ADDRESS", help="Share the work out on a Ray cluster; `local` starts one.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Ray tasks.")
@_engine
@options.json_option
@click.pass_context
def collect(ctx: click.Context, **given: Any) -> None:
    """Record what the experts do on text, into DIR/shards.

    Shards do not depend on how the work is split: parts made anywhere merge to the same bytes.
    """
    steps.collect(_picked(ctx, given), **given)


@command.command(short_help="Shards of several directories into one profile.")
@click.argument("sources", nargs=-1, required=True, type=_directory, metavar="DIR...")
@_output
@options.json_option
def merge(**given: Any) -> None:
    """Add up the shards/ of the directories into a profile. Needs no model."""
    steps.merge(**given)


@command.command(short_help="A table from a profile.")
@options.model_argument
@_output
@_goal
@_engine
@options.json_option
@click.pass_context
def allocate(ctx: click.Context, **given: Any) -> None:
    """Make a table of the wanted mean from the profile in DIR (-o)."""
    steps.allocate(_picked(ctx, given), **given)


@command.command(short_help="Tables and policies against the full model.")
@options.model_argument
@click.option(
    "--eval", "evaluation", multiple=True, required=True, metavar="SPEC", help="Text, one per domain."
)
@click.option(
    "--table", "tables", multiple=True, metavar="FILE|NAME", help="A table to judge; needs no profile."
)
@click.option(
    "--policies", type=PlainPolicies(), default="", metavar="POLICY,...",
    help="Policies to judge: flat:K, flat-alpha:K:A, ser:KMIN:T, top-p:P.",
)  # fmt: skip
@_output
@_window
@_goal
@_judging
@_engine
@options.json_option
@click.pass_context
def evaluate(ctx: click.Context, **given: Any) -> None:
    """Judge the table in DIR (-o) and its rivals; the exit code is 6 when it does not pass.

    With --table or --policies those are judged instead, and DIR needs no profile: it gets evaluation.json and
    summary.md. The exit code is then 6 when a table's mean KL is above --max-kl.
    """
    if given["tables"] or given["policies"]:
        _refuse_goal(ctx)
    steps.evaluate(_picked(ctx, given), **given)


@command.command(short_help="HTML, Markdown and pictures of a directory.")
@_DIR
def report(**given: Any) -> None:
    """Write the report of a directory that the other steps filled."""
    steps.report(**given)


@command.command(short_help="Make a table a bundle's default.")
@click.argument("bundle", type=_directory, metavar="BUNDLE")
@click.argument("table", type=click.Path(path_type=Path, dir_okay=False), metavar="TABLE")
def install(**given: Any) -> None:
    """Store TABLE in BUNDLE: it is used there unless --expert-table says otherwise."""
    steps.install(**given)


@command.command(short_help="Files for other programs.")
@_DIR
@click.option("-o", "--output", type=_directory, metavar="DIR", help="Where [default: DIR/exports].")
def export(**given: Any) -> None:
    """Write hot experts, logical counts and llama.cpp's override of a profiled directory."""
    steps.export(**given)


def _refuse_goal(ctx: click.Context) -> None:
    """What asks for a table of a profile means nothing to tables that are there."""
    for name in ("mean_experts", "kind", "name", "pareto"):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is for the table of a profile; leave it out with --table", ctx)


def _picked(ctx: click.Context, given: dict[str, Any]) -> str:
    return options.pick_model(given.pop("model_argument"), given.pop("model_option"), ctx)


for _command in command.commands.values():
    options.adopt(_command)
