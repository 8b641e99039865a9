"""How a chat template is rendered: by jinja2's public interface, in the environment that transformers gives templates.

`tokenizer.apply_chat_template` copies all it is given and costs as much again as the rendering, for each record of a
plan. A template is compiled here once, and rendered from messages that hold nothing but texts and kinds of media.

Nothing private is borrowed; what is counted on is what a template can name (transformers 5.5 to 5.24): trimmed blocks,
loop controls, ``{% generation %}`` blocks, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now``, and
since 5.23 a ``dict`` and a ``namespace`` that hide what is Python's. A template of which a later transformers makes
another text is rendered by `tokenizer.apply_chat_template` itself: each is compared when it is first used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwenvl_ft.upstream.probe import Feature

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "Be <brief>."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\u00e9 & 'a'\n"}, {"type": "video"}]},
    {"role": "assistant", "content": [{"type": "text", "text": " One.\n"}]},
    {"role": "user", "content": [{"type": "text", "text": "And?"}]},
]
"""What a template is compared on."""

PROBE = """
{%- set seen = namespace(images=0) %}
{% for message in messages %}
    {{ '<|im_start|>' + message.role }}
    {% generation %}
    {% for part in message.content %}
        {% if part.type == 'image' %}
            {% set seen.images = seen.images + 1 %}
            {% continue %}
        {% endif %}
        {{ part | tojson }}
    {% endfor %}
    {% endgeneration %}
{% endfor %}
{{ seen.images }} {{ dict(a=tools, b=documents) | tojson(indent=1) }} {{ eos_token }}
{% if not add_generation_prompt %}
    {{ raise_exception('no') }}
{% endif %}
"""
"""A template that names what there is to name."""


class TemplateRenderer:
    """Renders messages of nothing but texts and kinds of media as ``tokenizer.apply_chat_template`` does.

    Raises:
        jinja2.TemplateError: in a call, as the template wants it.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.template = template
        self.special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        """Those that the tokenizer has now; templates may name them."""
        self._tokenizer = tokenizer
        self.is_compiled = _agree(self._compiled, self._public)

    def __call__(self, messages: list[dict[str, Any]], **told: Any) -> str:
        return (self._compiled if self.is_compiled else self._public)(messages, **told)

    def _compiled(self, messages: list[dict[str, Any]], **told: Any) -> str:
        named = self.special_tokens | told
        return compiled_template(self.template).render(messages=messages, tools=None, documents=None, **named)

    def _public(self, messages: list[dict[str, Any]], **told: Any) -> str:
        return render_with_tools(self._tokenizer, self.template, messages, None, **told)


def render_with_tools(tokenizer: Any, template: str, messages: list[Any], tools: Any, **told: Any) -> str:
    """transformers' own rendering, which takes any objects."""
    return str(tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False, **told))


def _agree(ours: Callable[..., str], theirs: Callable[..., str]) -> bool:
    return all(
        _shown(ours, TURNS[first:last], invite) == _shown(theirs, TURNS[first:last], invite)
        for first, last, invite in ((0, 4, True), (1, 3, False))
    )


def _shown(render: Callable[..., str], messages: list[dict[str, Any]], invite: bool) -> Any:
    try:
        return render(messages, add_generation_prompt=invite, add_vision_id=invite)
    except (TemplateError, TypeError, ValueError) as error:
        return type(error)


@cache
def _renders_otherwise() -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="<end>")
    return "" if TemplateRenderer(tokenizer, PROBE).is_compiled else "makes another text of a chat template"


@lru_cache(maxsize=32)
def compiled_template(template: str) -> jinja2.Template:
    """A template in the environment that transformers gives it; compiled once a process."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant says; it changes nothing of the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """``dict`` of templates, with no way to Python's type."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` of templates, which holds no name with an underscore in front."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, given = arguments[0], dict(*arguments[1:], **named)
        for name in given:
            _refuse_hidden(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} in a namespace")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


COMPILED = Feature(
    name="chat templates compiled once",
    packages=("transformers", "jinja2"),
    missing=_renders_otherwise,
    instead="each record goes through apply_chat_template, and planning takes half as long again",
)
FEATURES = (COMPILED,)
