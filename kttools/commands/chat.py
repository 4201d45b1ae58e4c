"""kttools chat: an interactive conversation, or the answer to one prompt."""

import json
import sys
from typing import Any

import click

from kttools import options
from kttools.chat.prompt_text import one_shot_prompt
from kttools.trust_options import signature_options
from kttools_runtime.errors import UsageError

EPILOG = """\b
Examples:
  kttools chat BUNDLE                          talk; /help lists the commands
  kttools chat BUNDLE -p "What is AMX?" --temp 0
  git diff | kttools chat BUNDLE -sys "Summarise the change."
"""


@click.command(epilog=EPILOG, short_help="Talk to a model, or answer one prompt.")
@options.model_argument
@click.option("-p", "--prompt", metavar="TEXT", help="Answer this prompt and leave.")
@click.option(
    "-f", "--prompt_file", metavar="FILE", help="Answer the prompt in a file (- is stdin) and leave."
)
@click.option("-sys", "--system", metavar="TEXT", help="System message.")
@click.option(
    "-n",
    "--n-predict",
    "--max_new_tokens",
    "n_predict",
    type=click.IntRange(min=-1),
    default=-1,
    metavar="N",
    help="Most tokens of an answer [default: until the model stops or the cache is full].",
)
@click.option("--temp", "--temperature", "temp", type=float, metavar="T", help="Temperature; 0 is greedy.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K most likely tokens; 0 is off.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the most likely tokens of total mass P.")
@click.option("--min-p", type=float, metavar="P", help="Drop tokens less likely than P times the likeliest.")
@click.option(
    "--repeat-penalty",
    "--repetition_penalty",
    "repeat_penalty",
    type=float,
    metavar="R",
    help="Penalty on tokens already seen; 1 is off.",
)
@click.option("-s", "--seed", type=int, metavar="S", help="Seed of the draws [default: a new one].")
@options.cpu_infer_option
@click.option(
    "-c",
    "--ctx-size",
    "--cache_lens",
    "cache_lens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of prompt and answers the KV cache holds [default: the model's context, at most 32768].",
)
@click.option("--chunk_size", type=click.IntRange(min=1), metavar="N", help="Tokens prefilled at a time.")
@options.device_options
@click.option(
    "--expert-table", metavar="FILE|NAME|none", help="Expert table; none is the model's own router."
)
@click.option("--experts", type=click.IntRange(min=1), metavar="K", help="Experts per token, renormalised.")
@click.option("--force_think", is_flag=True, help="Begin every answer with <think>.")
@options.isa_option
@options.numa_option
@options.preload_option
@options.overcommit_option
@signature_options
@click.option("--raw", is_flag=True, help="Continue the plain text, without the chat template.")
@options.json_option
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Talk to MODEL, or answer one prompt (-p, --prompt_file, or a pipe).

    MODEL is a bundle, a checkpoint directory or GGUF file (quantised once into the cache), or a hub id in the
    local cache.
    Sampling options left out come from the model's generation_config.json.
    """
    model = options.pick_model(given.pop("model_argument"), given.pop("model_option"), ctx, True)
    given["gguf_path"] = options.weights_path(ctx, model)
    prompt = one_shot_prompt(given.pop("prompt"), given.pop("prompt_file"))
    as_json = given.pop("as_json")
    if as_json and prompt is None:
        raise UsageError("--json needs a prompt: -p, --prompt_file or a pipe")
    _run(model, prompt, as_json, given)


def _run(model: str, prompt: str | None, as_json: bool, given: dict[str, Any]) -> None:
    from kttools.chat.launch import LoadOptions, Sampling, check_combination, open_session

    system = given.pop("system")
    check_combination(given["raw"], system, given["force_think"])
    load = LoadOptions(**{name: given.pop(name) for name in LoadOptions.__dataclass_fields__})
    sampling = Sampling(**{name: given.pop(name) for name in Sampling.__dataclass_fields__})
    session, load_s = open_session(model, load, sampling, **given)
    session.system = system
    if prompt is None:
        _interactive(session, load_s, model)
    elif as_json:
        click.echo(json.dumps(_document(session, model, prompt, load_s), ensure_ascii=False, indent=1))
    else:
        _answer(session, prompt, load_s)


def _answer(session: Any, prompt: str, load_s: float) -> None:
    from kttools.chat.terminal import Printer

    Printer(sys.stdout).answer(session.ask(prompt))
    options.notice(session.stats.line(load_s))


def _document(session: Any, model: str, prompt: str, load_s: float) -> dict[str, Any]:
    segments = list(session.ask(prompt))
    return {
        "model": model,
        "text": "".join(s.text for s in segments if not s.is_thinking),
        "thinking": "".join(s.text for s in segments if s.is_thinking),
        "finish_reason": session.stats.finish_reason,
        **session.stats.as_dict(load_s),
    }


def _interactive(session: Any, load_s: float, model: str) -> None:
    from kttools.chat import slash
    from kttools.chat.terminal import Terminal

    def say(message: str) -> None:
        click.echo(message, err=True)

    options.notice(f"{model}: loaded in {load_s:.2f} s. /help lists the commands, Ctrl-C stops an answer.")
    Terminal(session, slash.run, say, load_s).run()
