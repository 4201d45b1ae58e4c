"""Chat for every family: a template of its manner through the sandbox, and `kttools chat` on its bundle.

The templates are ours; what they do is what the families' own do: turn markers, a default system prompt,
errors for roles in the wrong order, thinking cut out of earlier turns, tools as JSON, content in parts.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kttools.cli import main
from kttools_runtime.chat_template import ChatTemplate
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.tokenizer import Tokenizer
from tests.family_oracle import FIRST_CASES, hf_model, quantize, save

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "deepseek_v2": """{% if not tools is defined %}{% set tools = none %}{% endif %}
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{ 'User: ' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}
{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}
{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""",
    "qwen3_moe": """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}{{- '<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\n' }}{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
        and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last_query %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content.strip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "qwen2_moe": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "mixtral": """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('turns of user and assistant must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token}}
    {%- endif %}
{%- endfor %}""",
    "glm4_moe": """[gMASK]<sop>
{%- macro text_of(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}
            {%- elif item is string -%}{{- item }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- content }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last_user = loop.index0 -%}{%- endif %}
{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ text_of(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set content = text_of(m.content) %}
{%- if '</think>' in content %}
    {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last_user and thought %}
{{ '\\n<think>' + thought.strip() + '</think>' }}
{%- else %}
{{ '\\n<think></think>' }}
{%- endif %}
{%- if content.strip() %}{{ '\\n' + content.strip() }}{% endif -%}
{%- elif m.role == 'system' -%}<|system|>
{{ text_of(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{- '\\n<think></think>' if enable_thinking is false else '' -}}
{%- endif -%}""",
    "gpt_oss": """{%- macro turn(role, text, channel=none) -%}
<|start|>{{ role }}{% if channel %}<|channel|>{{ channel }}{% endif %}<|message|>{{ text }}<|end|>
{%- endmacro -%}
{{- turn('system', 'Reasoning: ' + (reasoning_effort if reasoning_effort is defined else 'medium')) }}
{%- if tools %}
    {%- for tool in tools %}{{- turn('developer', 'type ' + tool.function.name) }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- turn('developer', '# Instructions\\n\\n' + message.content) }}
    {%- elif message.role == 'assistant' %}
        {{- turn('assistant', message.content, 'final') }}
    {%- else %}
        {{- turn(message.role, message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}""",
}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi <there> \u00e9"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d <x> \u00e9"}}]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "turns": ([SYSTEM, USER, ANSWER, USER], {}),
    "no thinking": ([USER, ANSWER, USER], {"enable_thinking": False}),
    "tools": ([SYSTEM, USER], {"tools": TOOLS}),
    "no prompt for an answer": ([USER, ANSWER], {"add_generation_prompt": False}),
}
ENDINGS = {
    "deepseek_v2": "User: Hi <there> \u00e9\n\nAssistant:",
    "qwen3_moe": "<|im_start|>user\nHi <there> \u00e9<|im_end|>\n<|im_start|>assistant\n",
    "qwen2_moe": "<|im_start|>user\nHi <there> \u00e9<|im_end|>\n<|im_start|>assistant\n",
    "mixtral": " [INST] Hi <there> \u00e9 [/INST]",
    "glm4_moe": "<|user|>\nHi <there> \u00e9<|assistant|>",
    "gpt_oss": "<|start|>user<|message|>Hi <there> \u00e9<|end|><|start|>assistant",
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_template_equals_transformers(family: str, name: str) -> None:
    """The renderer that transformers uses is the oracle."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages, changes = CONVERSATIONS[name]
    variables = {**TOKENS, "add_generation_prompt": True, "tools": None, **changes}
    expected = utils._compile_jinja_template(TEMPLATES[family]).render(messages=messages, **variables)
    got = ChatTemplate(TEMPLATES[family]).render(messages, **variables)
    assert got == expected
    if name == "turns":
        assert got.endswith(ENDINGS[family])
        assert ("<think>\nhm" in got) is (family not in ("qwen3_moe", "glm4_moe"))


def test_a_template_may_refuse_the_order_of_roles() -> None:
    with pytest.raises(InvalidInputError, match="turns of user and assistant must alternate"):
        ChatTemplate(TEMPLATES["mixtral"]).render([USER, USER], **TOKENS)


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    got = ChatTemplate(TEMPLATES["glm4_moe"]).render([{"role": "user", "content": parts}], **TOKENS)
    assert got == "[gMASK]<sop><|user|>\nab"


@pytest.mark.parametrize(("family", "case"), FIRST_CASES)
def test_chat(
    tmp_path: Path, nano_checkpoint: Path, capsys: pytest.CaptureFixture[str], family: str, case: str
) -> None:
    """From checkpoint to an answer: tokenizer and template travel in the bundle, the exit status is 0."""
    vocab_size = json.loads((nano_checkpoint / "config.json").read_text())["vocab_size"]
    checkpoint = save(hf_model(family, case, vocab_size=vocab_size), tmp_path / "hf")
    for file in nano_checkpoint.glob("*token*.json"):
        shutil.copy(file, checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATES[family])
    bundle = quantize(checkpoint, tmp_path / "bundle", "int8", "int4")
    prompt = Tokenizer(bundle / "tokenizer").apply_chat_template([{"role": "user", "content": "Hi"}])
    options = ["-p", "Hi", "-n", "4", "--temp", "0", "--cpu_infer", "1", "--json"]
    assert main(["chat", str(bundle), *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_tokens"] == len(prompt)
    assert (answer["generated_tokens"] == 4) is (answer["finish_reason"] == "length")
