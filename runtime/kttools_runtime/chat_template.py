"""Chat templates: a stranger's jinja2 program, run in a sandbox with bounds on time, steps and memory.

A template comes with the model (tokenizer_config.json `chat_template`, or chat_template.jinja) and may be
hostile. jinja2's ImmutableSandboxedEnvironment keeps it from attributes and mutation; on top of that every
loop and macro body counts a step, every string and collection it builds is measured before it is built, and
filters that only serve to make things large are not there.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from .errors import InvalidInputError
from .template_limits import (
    BINOP_CHECKS,
    MAX_VALUE_CHARS,
    MAX_WIDTH,
    TemplateLimitError,
    check_indent,
    check_join,
    check_replace,
    check_size,
    check_width,
    measure,
)

MAX_TEMPLATE_CHARS = 1 << 20
MAX_STEPS = 300_000
MAX_SECONDS = 20.0  # of this thread's CPU time, so that a busy machine changes nothing

FILTERS = frozenset(
    """abs attr capitalize count d default dictsort e escape first float groupby indent int items join last
    length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string
    title tojson trim truncate unique upper urlencode wordcount""".split()  # noqa: SIM905 - reads as a list
)
GLOBALS = frozenset({"range", "dict", "cycler", "joiner", "namespace"})
BLOCKED_METHODS = frozenset({"expandtabs", "translate", "format", "format_map", "maketrans"})


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The jinja2 filter `name`, with its result measured before it is built."""
    passes_environment = getattr(function, "jinja_pass_arg", None) is not None
    checks: dict[str, Callable[..., Any]] = {"replace": check_replace, "indent": check_indent}

    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if passes_environment else args
        if name == "join":
            listed = check_join(*given, *kwargs.values())
            args = (*args[: len(args) - len(given)], listed, *given[1:])
        elif name in checks:
            checks[name](*given, *kwargs.values())
        elif name in ("string", "list", "upper", "lower", "escape", "e"):
            measure(given[0])
        check_width([*given[1:], *kwargs.values()])
        return function(*args, **kwargs)

    if passes_environment:
        guarded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return guarded


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: nothing escaped for HTML, non-ASCII kept."""
    measure(value)
    check_width([indent])
    if indent is not None and abs(int(indent)) > MAX_WIDTH:
        raise TemplateLimitError(f"tojson indent {indent}, the limit is {MAX_WIDTH}")
    if isinstance(value, Undefined):
        raise TemplateLimitError("tojson of an undefined value")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or not re.fullmatch(r"(%-?[A-Za-z%]|[^%])*", pattern):
        raise TemplateLimitError(f"strftime_now pattern {pattern[:40]!r} is not a plain date format")
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %} marks assistant text for training; here, only its body."""

    tags = {"generation"}  # noqa: RUF012 - the name and type jinja2 wants

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BoundedCode(CodeGenerator):
    """Sends the ~ operator through the environment, so that it is measured too."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.bounded_concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox plus bounds; one environment per template, one render at a time."""

    intercepted_binops = frozenset(BINOP_CHECKS)
    code_generator_class = _BoundedCode

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would run filters before any bound applies
            finalize=self._finalize,
            extensions=[_GenerationBlock, loopcontrols],
        )
        self.filters = {n: _guarded(n, f) for n, f in self.filters.items() if n in FILTERS}
        self.filters["tojson"] = _tojson
        self.globals = {n: f for n, f in self.globals.items() if n in GLOBALS}
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.concat = self.bounded_concat  # type: ignore[method-assign]
        self.restart()

    def restart(self) -> None:
        self._steps = 0
        self._deadline = time.thread_time() + MAX_SECONDS

    def tick(self) -> str:
        """Called at the start of every loop and macro body."""
        self._steps += 1
        if self._steps > MAX_STEPS or time.thread_time() > self._deadline:
            raise TemplateLimitError(f"more than {MAX_STEPS} loop steps or {MAX_SECONDS:g} s")
        return ""

    def bounded_concat(self, parts: Iterable[object]) -> str:
        texts, total = [], 0
        for part in parts:
            text = part if isinstance(part, str) else str(self._finalize(part))
            total += len(text)
            check_size(total)
            texts.append(text)
        return "".join(texts)

    @staticmethod
    def _finalize(value: object) -> object:
        if isinstance(value, (list, tuple, dict)):
            measure(value)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        BINOP_CHECKS[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        blocked = isinstance(obj, (str, bytes)) and attr in BLOCKED_METHODS
        return not blocked and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """An attribute the sandbox hides; jinja2 alone would render it as nothing."""
        if attribute.startswith("_"):
            raise SecurityError(f"access to {attribute!r} is not allowed")
        return super().unsafe_undefined(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format is refused: its widths multiply, and no chat template needs it."""
        if getattr(value, "__name__", "") in BLOCKED_METHODS and isinstance(
            getattr(value, "__self__", None), str
        ):
            raise TemplateLimitError("str.format is not available to chat templates")
        return None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, RUF100
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if __obj is not range and name != "safe_range":
            check_width([*args, *kwargs.values()])
        if isinstance(owner, str) and name == "replace":
            check_replace(owner, *args)
        elif isinstance(owner, str) and name == "join":
            args = (check_join(args[0] if args else (), owner),)
        return super().call(__context, __obj, *args, **kwargs)


class ChatTemplate:
    """A compiled chat template.

    source: the jinja2 text; where: the file it came from, for messages.
    Raises InvalidInputError when it is too long or does not compile.
    """

    def __init__(self, source: str, where: str = "chat template") -> None:
        self.source, self.where = source, where
        if len(source) > MAX_TEMPLATE_CHARS:
            raise InvalidInputError(
                f"{where}: the chat template has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARS}"
            )
        self._environment = _BoundedEnvironment()
        try:
            tree = self._environment.parse(source)
            _count_steps(tree)
            self._template = self._environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise InvalidInputError(
                f"{where}: the chat template does not compile: line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:  # a stranger's program: whatever it makes jinja2 raise is bad input
            raise InvalidInputError(
                f"{where}: the chat template does not compile: {type(error).__name__}: {error}"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt text. Raises InvalidInputError when the template fails, refuses, or exceeds a bound."""
        self._environment.restart()
        try:
            text = self._template.render(messages=[dict(m) for m in messages], **variables)
        except TemplateLimitError as error:
            raise InvalidInputError(f"{self.where}: the chat template exceeds a limit: {error}") from error
        except TemplateError as error:
            raise InvalidInputError(f"{self.where}: the chat template stopped: {error.message}") from error
        except Exception as error:  # as above
            raise InvalidInputError(
                f"{self.where}: the chat template failed: {type(error).__name__}: {error}"
            ) from error
        if len(text) > MAX_VALUE_CHARS:
            raise InvalidInputError(
                f"{self.where}: the chat template's output exceeds {MAX_VALUE_CHARS} characters"
            )
        return text


def _count_steps(tree: nodes.Template) -> None:
    """Puts a call of tick() at the start of every loop and macro body of the parsed template."""
    loops: tuple[type[Any], ...] = (nodes.For, nodes.Macro, nodes.CallBlock)
    for node in tree.find_all(loops):
        call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        statement = nodes.ExprStmt(call)
        node.body.insert(0, statement.set_lineno(node.lineno))
