"""What all commands share: spellings, environment variables, the config file, and options used by several.

A command is an ordinary click command. adopt() gives each of its options an environment variable per long
spelling (KTTOOLS_CPU_INFER for --cpu_infer) and the hidden --quiet, --debug and --yes. normalise_token()
makes - and _ the same everywhere, so an option is declared once, in the spelling people know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from . import config_file

ENV_PREFIX = "KTTOOLS"
GGUF_META = "kttools.gguf_path"
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Settings:
    """What --quiet, --debug and --yes set; the context's obj."""

    quiet: bool = False
    debug: bool = False
    yes: bool = False


def settings() -> Settings:
    """The running command's settings; defaults outside of a command."""
    context = click.get_current_context(silent=True)
    return (context.find_object(Settings) if context else None) or Settings()


def normalise_token(token: str) -> str:
    """- and _ are the same in option and command names."""
    return token.replace("-", "_")


def long_spellings(option: click.Parameter) -> list[str]:
    """Long names without dashes, with _: ["model", "model_path"] for -m/--model/--model_path."""
    names = [*option.opts, *option.secondary_opts] if isinstance(option, click.Option) else []
    return [normalise_token(name[2:]) for name in names if name.startswith("--")]


def adopt(command: click.Command) -> click.Command:
    """Completes a loaded command in place; safe to call again."""
    present = {spelling for param in command.params for spelling in long_spellings(param)}
    command.params.extend(o for o in global_options(hidden=True) if o.name not in present)
    for param in command.params:
        if isinstance(param, click.Option) and param.envvar is None and param.allow_from_autoenv:
            off = {normalise_token(name[2:]) for name in param.secondary_opts}
            names = [name for name in long_spellings(param) if name not in off]
            param.envvar = [f"{ENV_PREFIX}_{name.upper()}" for name in names]
    return command


def config_values(command: click.Command, name: str) -> dict[str, Any]:
    """Values of the config files for this command's parameters, for click's default_map.

    A group's table holds the options of the commands below it; each gets those it has.
    """
    if isinstance(command, click.Group):
        below = command.commands.items()
        spellings = {s for _, sub in below for p in sub.params for s in long_spellings(p)}
        values = config_file.option_values(name, {s: s for s in spellings})
        return {title: _chosen(sub, values) for title, sub in below}
    known = {s: p.name for p in command.params for s in long_spellings(p) if p.name is not None}
    return config_file.option_values(name, known)


def _chosen(command: click.Command, values: dict[str, Any]) -> dict[str, Any]:
    spelt = {s: p.name for p in command.params for s in long_spellings(p) if p.name is not None}
    return {spelt[s]: value for s, value in values.items() if s in spelt}


def global_options(hidden: bool = False) -> list[click.Option]:
    """--quiet, --debug and --yes, accepted before and after the command's name."""
    return [
        click.Option(
            ["--quiet"],
            is_flag=True,
            hidden=hidden,
            expose_value=False,
            callback=_set_quiet,
            help="No progress and no notices on stderr.",
        ),
        click.Option(
            ["--debug"],
            is_flag=True,
            hidden=hidden,
            expose_value=False,
            is_eager=True,
            callback=_set_debug,
            help="Show the traceback of an error.",
        ),
        click.Option(
            ["--yes"],
            is_flag=True,
            hidden=hidden,
            expose_value=False,
            callback=_set_yes,
            help="Download a model that is not here without asking.",
        ),
    ]


def _set_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Settings).quiet = True


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Settings).debug = True


def _set_yes(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Settings).yes = True


def notice(message: str) -> None:
    """A line on stderr, unless --quiet."""
    if not settings().quiet:
        click.echo(message, err=True)


def model_argument(function: F) -> F:
    """MODEL as an argument or as -m/--model/--model_path; the command receives `model` from pick_model().

    --gguf_path alone is another spelling of MODEL; beside it, it names the weights (see weights_path()).
    """
    function = click.argument("model_argument", metavar="[MODEL]", required=False)(function)
    function = click.option(
        "--gguf_path",
        "gguf_path",
        metavar="GGUF",
        expose_value=False,
        callback=_remember_gguf,
        help="GGUF weights; config and tokenizer come from MODEL where that is given too.",
    )(function)
    return click.option(
        "-m",
        "--model",
        "--model_path",
        "model_option",
        metavar="MODEL",
        help="The model, instead of the argument.",
    )(function)


def _remember_gguf(context: click.Context, _: click.Parameter, value: str | None) -> None:
    context.meta[GGUF_META] = value


def weights_path(context: click.Context, model: str) -> str | None:
    """--gguf_path where it is more than another spelling of MODEL: weights for the config of `model`."""
    gguf = context.meta.get(GGUF_META)
    return None if gguf == model else gguf


def pick_model(
    argument: str | None, option: str | None, context: click.Context, takes_weights: bool = False
) -> str:
    """The one MODEL given. Raises a usage error for none, or for two that differ.

    takes_weights: the command also asks weights_path(); without it, MODEL and --gguf_path are two models.
    """
    gguf = context.meta.get(GGUF_META)
    if gguf is not None and argument is None and option is None:
        return str(gguf)
    if gguf is not None and not takes_weights:
        raise click.UsageError("--gguf_path beside MODEL is for quantize and chat")
    source = context.get_parameter_source("model_option")
    if argument is not None and option is not None and argument != option:
        if source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"MODEL is given twice: {argument} and {option}")
        return argument
    chosen = argument if argument is not None else option
    if not chosen:
        raise click.UsageError("Missing argument 'MODEL': a bundle, a checkpoint, a GGUF file or a hub id")
    return chosen


def cpu_infer_option(function: F) -> F:
    """-t/--threads/--cpu_infer as `cpu_infer`."""
    return click.option(
        "-t",
        "--threads",
        "--cpu_infer",
        "cpu_infer",
        type=click.IntRange(min=1),
        metavar="N",
        help="CPU threads [default: all this process may use].",
    )(function)


def isa_option(function: F) -> F:
    """--isa as `isa`; the engine refuses names it does not have."""
    return click.option("--isa", metavar="NAME", help="Force a kernel table; `kttools doctor` lists them.")(
        function
    )


def numa_option(function: F) -> F:
    """--numa as `numa`."""
    return click.option(
        "--numa",
        type=click.Choice(["auto", "off", "shard", "replicate"]),
        default="auto",
        show_default=True,
        help="Memory nodes: each computes its share of every expert (shard), or holds a copy of all.",
    )(function)


def preload_option(function: F) -> F:
    """--preload as `preload`."""
    return click.option(
        "--preload",
        type=click.Choice(["background", "wait", "off"]),
        default="background",
        show_default=True,
        help="Read the expert packs into memory: beside the first answer, before it, or as they are needed.",
    )(function)


def overcommit_option(function: F) -> F:
    """--overcommit as `overcommit`."""
    return click.option(
        "--overcommit", is_flag=True, help="Load even where the plan says that memory is too small."
    )(function)


def device_options(function: F) -> F:
    """--device, --defer-experts, --gpu-experts, --prefill and --graphs, as kt.load() calls them."""
    for decorate in reversed(_DEVICE_OPTIONS):
        function = decorate(function)
    return function


def device_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """What device_options() gave, as keyword arguments of kt.load()."""
    names = ("device", "gpu_experts", "defer_experts", "prefill", "graphs")
    return {name: given[name] for name in names}


_DEVICE_OPTIONS: list[Callable[[Any], Any]] = [
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        metavar="DEVICE",
        help="Where all but the routed experts is computed: cpu, cuda:0, or cuda:0,cuda:1 by layers. "
        "cpu:0,cpu:1 simulates devices.",
    ),
    click.option(
        "--gpu-experts",
        metavar="auto|N|FILE",
        help="Routed experts on the device: as many as fit, N per layer, or those of a list; auto:FILE and "
        "N:FILE choose by an expert profile.",
    ),
    click.option(
        "--defer-experts",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Deliver a token's N lowest-weight experts one layer later [default: 0].",
    ),
    click.option(
        "--prefill",
        type=click.Choice(["auto", "cpu", "gpu"]),
        default="auto",
        show_default=True,
        help="Experts of a prompt: on the CPU, streamed to the device, or split by what was measured here.",
    ),
    click.option("--graphs/--no-graphs", default=True, help="Capture decode steps of a device as graphs."),
]


def json_option(function: F) -> F:
    """--json as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(
        function
    )
