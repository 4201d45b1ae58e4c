"""Chat templates: what real ones use works, what hostile ones try is refused quickly."""

import time
from datetime import datetime

import pytest

from kttools_runtime.chat_template import ChatTemplate
from kttools_runtime.errors import InvalidInputError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source).render(MESSAGES, **variables)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m['role'] }}:{{ m.content }};{% endfor %}", "user:hi;assistant:yo;"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ loop.last }}{% endfor %}", "0True"),
        ("{% set a = namespace(n=0) %}{% for m in [1, 2] %}{% set a.n = a.n+1 %}{% endfor %}{{ a.n }}", "2"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f(1) }}", "<a><1>"),
        ("{{ messages | map(attribute='content') | join(', ') }}", "hi, yo"),
        ("{{ {'b': '\u00e9<', 'a': 1} | tojson }}", '{"b": "\u00e9<", "a": 1}'),
        ("{{ [1, 2] | tojson(indent=2) }}", "[\n  1,\n  2\n]"),
        ("{{ 'a<think>b</think> c'.split('</think>')[-1].strip() }}", "c"),
        ("{{ 'x' * 3 + 'y' }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ '%s!' % 'z' }}", "xxxy332z!"),
        ("{{ messages[::-1][0].content }}{{ messages[1:] | length }}", "yo1"),
        ("  {%- if tools is not none %}T{% else %}N{% endif %}\n", "N"),
        ("{% generation %}g{% endgeneration %}", "g"),
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{{ 'a\nb' | indent(2) }}{{ 'aXa' | replace('X', '-') }}{{ 'q'.replace('q', 'r') }}", "a\n  ba-ar"),
        ("{{ missing is defined }}{{ ', '.join(['a', 'b']) }}{{ ' t ' | trim | upper }}", "Falsea, bT"),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source, tools=None) == expected


def test_raise_exception_carries_its_words() -> None:
    with pytest.raises(InvalidInputError, match="stopped: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ messages['__class__'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).x }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum(100) }}",
        "{{ range(10 ** 9) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ 'a'.zfill(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '\\t'.expandtabs(10 ** 9) }}",
        "{{ ('a' * 9999999) | replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999999).replace('a', 'b' * 9999) }}",
        "{{ ('b' * 9999999).join(['', '', '', '']) }}",
        "{{ ['', '', '', ''] | join('b' * 9999999) }}",
        "{{ ('\\n' * 9999999) | indent(999) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ missing.attribute }}",
        "{{ missing | tojson }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | pprint }}",
    ],
)
def test_hostile_expressions(source: str) -> None:
    started = time.thread_time()
    with pytest.raises(InvalidInputError, match="chat template"):
        assert len(render(source)) < 0, "rendered"
    assert time.thread_time() - started < 5


LOOP = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
)


@pytest.mark.parametrize(
    ("start", "step"),
    [
        ("'ab'", "ns.x + ns.x"),
        ("'ab'", "ns.x ~ ns.x"),
        ("[1]", "ns.x + ns.x"),
        ("[1]", "[ns.x, ns.x]"),
        ("3", "ns.x * ns.x"),
        ("'ab'", "ns.x * 2"),
        ("'ab'", "ns.x | replace('a', 'aa')"),
        ("'ab'", "(ns.x, ns.x) | join"),
    ],
)
def test_growth_by_doubling(start: str, step: str) -> None:
    with pytest.raises(InvalidInputError, match="exceeds a limit"):
        render(LOOP % (start, step))


def test_growth_in_a_captured_block() -> None:
    body = "{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}"
    with pytest.raises(InvalidInputError, match="exceeds a limit"):
        render("{% set ns = namespace(x='ab') %}" + body)


def test_endless_loops_end() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidInputError, match="loop steps"):
        render(loop)


def test_output_is_bounded() -> None:
    with pytest.raises(InvalidInputError, match="exceeds a limit"):
        render("{% set a = 'x' * 999999 %}{% for i in range(99) %}{{ a }}{% endfor %}")


def test_limits_apply_to_every_render_anew() -> None:
    template = ChatTemplate("{% for i in range(60000) %}{% endfor %}ok")
    for _ in range(8):
        assert template.render(MESSAGES) == "ok"


@pytest.mark.parametrize("source", ["{% if %}", "{{ " + "(" * 5000, "{% endfor %}", "{{ 'a' | nofilter }}"])
def test_templates_that_do_not_compile(source: str) -> None:
    with pytest.raises(InvalidInputError, match="does not compile"):
        ChatTemplate(source, "x.jinja")
