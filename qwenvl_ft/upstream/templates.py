"""Renders chat templates with jinja2's public interface, in the same environment as transformers.

`tokenizer.apply_chat_template` copies its input and takes twice as long as the rendering alone, for each record of a
plan. This module compiles a template once, and renders it from messages that contain nothing but texts and kinds of
media.

Uses no private names. Relies on the features that transformers 5.5 to 5.24 offers to templates: trimmed blocks, loop
controls, ``{% generation %}`` blocks, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now``, and since
5.23 a ``dict`` and a ``namespace`` that hide Python's own. Each template is compared with
`tokenizer.apply_chat_template` when it is first used; if a later transformers renders another text, that method is
used.
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
"""Messages on which the two ways of rendering a template are compared."""

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
"""A template that uses every feature listed above."""


class TemplateRenderer:
    """Renders messages of texts and kinds of media as ``tokenizer.apply_chat_template`` does.

    Raises:
        jinja2.TemplateError: in a call, if the template raises it.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.template = template
        self.special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        """The tokenizer's special tokens at construction; templates may use them by name."""
        self._tokenizer = tokenizer
        self.is_compiled = _agree(self._compiled, self._public)

    def __call__(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        return (self._compiled if self.is_compiled else self._public)(messages, **variables)

    def _compiled(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        names = self.special_tokens | variables
        return compiled_template(self.template).render(messages=messages, tools=None, documents=None, **names)

    def _public(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        return render_with_tools(self._tokenizer, self.template, messages, None, **variables)


def render_with_tools(tokenizer: Any, template: str, messages: list[Any], tools: Any, **variables: Any) -> str:
    """Render with transformers' own method, which accepts any objects in messages and tools.

    Args:
        variables: further variables of the template, such as ``add_generation_prompt``.
    """
    return str(
        tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False, **variables)
    )


def _agree(ours: Callable[..., str], theirs: Callable[..., str]) -> bool:
    """Return True if both give the same for the probe messages: at least one text, else the same type of error."""
    outcomes = [
        (_outcome(ours, TURNS[first:last], flag), _outcome(theirs, TURNS[first:last], flag))
        for first, last, flag in ((0, 4, True), (1, 3, False))
    ]
    return all(own == other for own, other in outcomes) and any(isinstance(own, str) for own, _ in outcomes)


def _outcome(render: Callable[..., str], messages: list[dict[str, Any]], flag: bool) -> Any:
    try:
        return render(messages, add_generation_prompt=flag, add_vision_id=flag)
    except (TemplateError, TypeError, ValueError) as error:
        return type(error)


@cache
def _renders_otherwise() -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="<end>")
    return "" if TemplateRenderer(tokenizer, PROBE).is_compiled else "renders a test template to another text"


@lru_cache(maxsize=32)
def compiled_template(template: str) -> jinja2.Template:
    """Return a template compiled in transformers' environment; cached, so it is compiled once per process."""
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
    """The tag ``{% generation %}``, which marks an assistant's turn and does not change the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("render"), [], [], body).set_lineno(line)

    def render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """``dict`` of templates, which gives no access to Python's type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` of templates, which accepts no name that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_hidden(name)
        jinja2.utils.Namespace.__init__(self, values)

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
    name="compiled chat templates",
    packages=("transformers", "jinja2"),
    missing=_renders_otherwise,
    instead="each record goes through apply_chat_template, and planning takes 50% longer",
)
FEATURES = (COMPILED,)
