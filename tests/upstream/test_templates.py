"""upstream/templates.py: a template compiled once renders the same text as transformers, or is not used."""

import pickle

import jinja2
import pytest
from transformers import PreTrainedTokenizerBase

from qwenvl_ft.upstream import templates
from qwenvl_ft.upstream.templates import COMPILED, PROBE, TURNS, TemplateRenderer, compiled_template

ODD = (
    "{% for message in messages %}{% if loop.first %}{% continue %}{% endif %}{{ message | tojson(indent=2) }}"
    "{% endfor %}",
    "{%- generation -%} {{ messages[0].role }} {%- endgeneration -%}\n   {% set x = namespace(a=1) %}\n{{ x.a }}\n",
    "{{ dict(b=1, a=2) | tojson(sort_keys=true) }}{{ dict.fromkeys(['a']) }}{{ strftime_now('%Y') }}",
    "{{ pad_token }}{{ tools }}{{ documents }}{{ add_vision_id }}{{ nothing }}",
    "{{ '<&>' | tojson }}{{ ['é'] | tojson(ensure_ascii=true) }}",
)
HOSTILE = (
    "{{ namespace(__class__=1) }}",
    "{% set x = namespace() %}{% set x._hidden = 1 %}",
    "{{ dict.__subclasses__() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
)


def public(processor, template, messages, **variables):
    return processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)


@pytest.mark.parametrize("invite", [False, True])
def test_the_checkpoints_own_template_is_compiled_and_says_the_same(processor, invite):
    renderer = TemplateRenderer(processor.tokenizer, processor.chat_template)
    assert renderer.is_compiled
    variables = {"add_generation_prompt": invite, "add_vision_id": True}
    assert renderer(TURNS, **variables) == public(processor, processor.chat_template, TURNS, **variables)
    assert renderer(TURNS, **variables) == processor.apply_chat_template(TURNS, tokenize=False, **variables)


@pytest.mark.parametrize("template", ODD)
def test_what_transformers_gives_to_templates_is_there(processor, template):
    """Compare compiled and transformers' own text for templates that use every feature."""
    renderer = TemplateRenderer(processor.tokenizer, template)
    assert renderer.is_compiled
    assert renderer(TURNS, add_vision_id=True) == public(processor, template, TURNS, add_vision_id=True)


def test_a_template_that_refuses_every_probe_is_left_to_transformers(processor):
    """Two errors of the same type say nothing of the texts that the template renders for other messages."""
    renderer = TemplateRenderer(processor.tokenizer, "{{ raise_exception('no') }}")
    assert not renderer.is_compiled
    with pytest.raises(jinja2.TemplateError, match="no"):
        renderer(TURNS)


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_gets_at_nothing_of_python(template):
    with pytest.raises(jinja2.TemplateError):
        compiled_template(template).render(messages=[])


def test_the_probe_is_missed_where_an_environment_lacks_a_name(processor, monkeypatch):
    """A made-up later transformers offers templates one more feature: nothing is lost but time."""
    assert COMPILED.missing() == ""
    template = "{{ 'kept' if shout is defined else 'lost' }}{{ messages[0].role }}"
    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", lambda *_, **__: "kept system")
    renderer = TemplateRenderer(processor.tokenizer, template)
    assert not renderer.is_compiled
    assert renderer(TURNS) == "kept system"
    templates._renders_otherwise.cache_clear()
    assert "another text" in COMPILED.line()
    monkeypatch.undo()
    templates._renders_otherwise.cache_clear()
    assert COMPILED.line() == ""


def test_a_renderer_travels_to_workers(processor):
    renderer = pickle.loads(pickle.dumps(TemplateRenderer(processor.tokenizer, PROBE)))
    assert renderer(TURNS, add_generation_prompt=True) == public(processor, PROBE, TURNS, add_generation_prompt=True)
