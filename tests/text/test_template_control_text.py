"""Templates that look at a control token's text: refused by its name, or as plain Jinja has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.filters
import jinja2.sandbox
import jinja2.tests
import pytest

from apertus_mlx.errors import RejectedError
from apertus_mlx.text.messages import read_messages
from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import load_tokenizer, write_tokenizer, written_by

MESSAGES: list[Any] = [{"role": "user", "content": "Hi <s> there"}]
TEXTS = {"bos_token": "<s>", "eos_token": "</s>"}
ARGUMENTS = ("", "'<s>'", "2", "'b', '<s>'", "attribute='<s>'")
# Each writes something else where another text stands for the token's.
LOOKS = {
    "comparison": "{{ bos_token == '<s>' }}",
    "order": "{{ 'a' < bos_token }}",
    "chain": "{{ 'a' < 'b' < bos_token }}",
    "two tokens": "{{ bos_token < eos_token }}",
    "in": "{{ 's' in bos_token }}",
    "in a list": "{{ '<s>' in [bos_token] }}",
    "not in": "{{ '<' not in eos_token }}",
    "length": "{{ '</s>' | length }}",
    "slice": "{{ '<|user_start|>'[2:6] }}",
    "subscript": "{{ bos_token[0] }}",
    "upper": "{{ '<s>' | upper }}",
    "filter block": "{% filter upper %}{{ bos_token }}{% endfilter %}",
    "block with a filter": "{% set x | upper %}{{ bos_token }}{% endset %}{{ x }}",
    "map": "{{ [bos_token] | map('upper') | join }}",
    "characters": "{% for c in bos_token %}{{ c }},{% endfor %}",
    "characters as a list": "{{ bos_token | list | length }}",
    "characters joined": "{{ bos_token | join('-') }}",
    "characters joined by a method": "{{ '-'.join(bos_token) }}",
    "names": "{% set a, b, c = bos_token %}{{ b }}",
    "names in a loop": "{% for a, b, c in [bos_token] %}{{ b }}{% endfor %}",
    "names in a lazy loop": "{% for a, b, c in [bos_token] | map('string') %}{{ b }}{% endfor %}",
    "replace": "{{ (bos_token ~ 's') | replace('s', 't') }}",
    "replace method": "{{ bos_token.replace('s', 't') }}",
    "replace what a message has": "{% set t = '<s>' %}{{ messages[0].content.replace(t, '') }}",
    "startswith": "{{ bos_token.startswith('<s') }}",
    "a key": "{% set d = {'<s>': 'yes'} %}{{ d[messages[0].content[3:6]] }}",
    "representation": "{{ [bos_token] }}",
    "representation by string": "{{ [bos_token] | string }}",
    "json": "{{ bos_token | tojson(ensure_ascii=true) }}",
    "passed through a macro": "{% macro f(t) %}{{ t | length }}{% endmacro %}{{ f('<s>') }}",
    "width": "{{ '%9s' % bos_token }}",
    "namespace": "{% set ns = namespace(t='') %}{% set ns.t = '<s>' %}{{ ns.t == '<s>' }}",
    "prompt by the text": "{% if bos_token == '<s>' %}{{ bos_token }}<|user_start|>"
    "{{ messages[0].content }}<|user_end|>{% else %}{{ messages[0].content }}{% endif %}",
}
# These move a token, compare it with itself, or look at a message for one's text.
MOVES = {
    "safe": "{{ bos_token | safe }}",
    "concatenation": "{{ bos_token ~ 'a' + eos_token }}",
    "repetition": "{{ bos_token * 2 }}",
    "truth": "{{ bos_token if eos_token and not none }}",
    "kind": "{{ bos_token is string }} {{ bos_token is defined }} {{ bos_token is none }}"
    "{{ bos_token is sequence }}{{ bos_token is iterable }}{{ bos_token is mapping }}",
    "kind of nothing": "{{ nothing is sequence }}{{ nothing is iterable }}{{ nothing is string }}",
    "default": "{{ nothing | default(bos_token) }}{{ bos_token | default('x') }}",
    "trim": "{{ (' ' + bos_token + '\n') | trim }}{{ (eos_token ~ ' ').strip() }}",
    "join": "{{ [bos_token, 'a'] | join(eos_token) }}{{ ', '.join(['a', bos_token]) }}",
    "list": "{{ [bos_token, 'a'] | list | first }}{{ [bos_token, eos_token][::-1] | last }}",
    "list of lists": "{% for a, b in [[bos_token, 1]] %}{{ a }}{{ b }}{% endfor %}",
    "dict": "{% for k, v in {'a': bos_token}.items() %}{{ k }}{{ v }}{% endfor %}",
    "comparison deep in a list": "{{ [[bos_token]] == [['<s>']] }}",
    "select": "{{ [bos_token] | select('equalto', '<s>') | list | length }}",
    "attribute": "{{ [{'a': bos_token}] | selectattr('a', 'equalto', '<s>') | list | length }}",
    "get": "{{ {'a': 1}.get(bos_token, 'no') == {}.get('<s>', 'no') }}",
    "length of a list": "{{ [bos_token] | length }}",
    "arguments from a list": "{{ 'a'.strip(*['a']) }}",
    "percent": "{{ '%s-%%' % bos_token }}{{ 2 ** 3 }}",
    "block": "{% block a %}{{ bos_token }}{% endblock %}",
    "a key that is computed": "{{ {messages[0].role: 1} }}",
    "seen in a message": "{{ '<s>' in messages[0].content }}{{ messages[0].content[:2] == '<s>' }}",
    "split at": "{{ messages[0].content.split('<s>') | join('|') }}",
    "taken from a message": "{{ messages[0].content | replace('<s>', '') }}"
    "{{ messages[0].content.replace('<s>', '') }}",
}
# What chat templates do not have.
MISSING = {
    "recursive loop": "{% for a in [[]] recursive %}{{ loop(a) }}{% endfor %}",
    "subscript in a format": "{{ '{0[0]}'.format(bos_token) }}",
    "sort": "{{ ['x', bos_token] | sort | first }}",
    "unique": "{{ ['<S>', bos_token] | unique | list | length }}",
    "a key by dict": "{{ dict([('<s>', 'yes')])[messages[0].content[3:6]] }}",
    "representation by format": "{{ '{!r}'.format(bos_token) }}",
    "width": "{{ '{:>9}'.format(bos_token) }}",
    "width by the filter": "{{ '%.1s' | format(bos_token) }}",
    "same": "{{ bos_token is sameas '<s>' }}",
    "lower": "{{ bos_token is lower }}",
    "changed": "{% for t in ['<s>'] %}{{ loop.changed(t) }}{% endfor %}",
    "count in a list": "{{ [bos_token].count('<s>') }}",
    "format": "{{ '{}-{x}'.format(bos_token, x=eos_token) }}{{ '<s>%s%%' % bos_token }}",
    "format filter": "{{ '%s<s>' | format(bos_token) }}",
    "indent": "{{ ('a\n' + bos_token) | indent(2) }}",
    "cycle": "{% for i in [1, 2] %}{{ loop.cycle(bos_token, eos_token) }}{% endfor %}",
    "dictsort": "{{ {'a': 1} | dictsort }}",
    "sum": "{{ [1, 2] | sum }}",
    "groupby": "{{ messages | groupby('role') }}",
    "rsplit": "{{ 'a b'.rsplit(' ') }}",
    "rfind": "{{ 'ab'.rfind('b') }}",
    "partition": "{{ 'a-b'.partition('-') }}",
}
JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
# As transformers has it.
JINJA.filters["tojson"] = lambda value, ensure_ascii=False, indent=None: json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent
)
TEXT_METHODS = sorted(
    name for name in dir(str) if not name.startswith("_") and name != "format_map"
)
_TOKENIZER: list[Tokenizer] = []


@pytest.fixture(autouse=True, scope="module")
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    _TOKENIZER[:] = [load_tokenizer(Path(tmp_path_factory.mktemp("t")))]


def ours(source: str) -> str:
    template = ChatTemplate(source, _TOKENIZER[0], name="chat_template.jinja", texts=TEXTS)
    return written_by(template, MESSAGES)


def plain_jinja(source: str) -> str:
    """What Jinja itself writes in the environment that transformers gives to chat templates."""
    return JINJA.from_string(source).render(messages=MESSAGES, tools=None, **TEXTS)


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_a_control_token_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(RejectedError, match=r"control token '(<s>|</s>|<\|user_start\|>)'") as info:
        ours(LOOKS[name])
    assert info.value.exit_code == 3
    assert "\n" not in str(info.value)


def test_the_token_that_is_looked_at_is_named_among_others() -> None:
    tokens = "".join(f"<|{role}_start|>" for role in ("system", "developer", "user", "assistant"))
    with pytest.raises(RejectedError, match=r"looks at the text of control token '</s>',"):
        ours(f"{{{{ bos_token }}}}{tokens}{{{{ eos_token | length }}}}")
    with pytest.raises(RejectedError, match=r"looks at the text of control token '<\|user_start"):
        ours(f"{{{{ bos_token ~ eos_token }}}}{tokens}{{{{ '<|user_start|>' | upper }}}}")


def test_a_text_that_is_looked_for_and_one_that_is_written_are_kept_apart_in_many_places() -> None:
    source = "{{ '<s>' in messages[0].content }}{{ '<s>' }}" * 300
    template = ChatTemplate(source, _TOKENIZER[0], name="chat_template.jinja")
    pieces = template._render(read_messages(MESSAGES), False, (), True)
    assert pieces == ["True", 1] * 300
    assert ours(source) == plain_jinja(source)


@pytest.mark.parametrize("private", ["\ue000\ue001", "\ue000" * 9, "\U000f0000"])
def test_characters_that_could_be_marks_are_texts(private: str) -> None:
    source = f"{{{{ bos_token }}}}{private}{{{{ eos_token ~ '{private}' ~ messages[0].content }}}}"
    template = ChatTemplate(source, _TOKENIZER[0], name="chat_template.jinja", texts=TEXTS)
    messages: Any = [{"role": "user", "content": f"\ue002{private}\ue003"}]
    assert template._render(read_messages(messages), False, (), True) == [
        1, private, 2, f"{private}\ue002{private}\ue003",
    ]  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_a_moved_token_is_written_as_jinja_writes_it(name: str) -> None:
    assert ours(MOVES[name]) == plain_jinja(MOVES[name])


def every_operation() -> list[str]:
    """Every filter, test and method with a token's text as its value, and as its argument."""
    sources = []
    for value in ("bos_token", "('a' ~ bos_token)", "[bos_token, 'b']", "'a-b'"):
        for arguments in ARGUMENTS:
            for name in jinja2.filters.FILTERS:
                call = f"({arguments})" if arguments else ""
                sources.append(f"{{{{ {value} | {name}{call} }}}}")
                if not arguments:
                    sources.append(f"{{% set x = {value} | {name} %}}{{{{ x ~ '<s>' }}}}")
            for name in TEXT_METHODS:
                sources.append(f"{{{{ {value}.{name}({arguments}) }}}}")
            if "=" not in arguments:
                for name in jinja2.tests.TESTS:
                    call = f"({arguments})" if arguments else ""
                    sources.append(f"{{{{ {value} is {name}{call} }}}}")
    return sources


def test_every_filter_test_and_method_is_refused_or_right() -> None:
    written = 0
    for source in every_operation():
        try:
            result = ours(source)
        except RejectedError:
            continue
        try:
            wanted = plain_jinja(source)
        except (jinja2.TemplateError, LookupError, TypeError, ValueError) as error:
            pytest.fail(f"{source}: {result!r}, but Jinja says {error}")
        assert result == wanted, source
        written += 1
    assert written > 120


def test_transformers_writes_what_is_written_here(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), **TEXTS
    )
    for source in MOVES.values():
        wanted = reference.apply_chat_template(MESSAGES, chat_template=source, tokenize=False)
        assert ours(source) == wanted, source


@pytest.mark.parametrize(
    "source",
    [
        "{% for a, (b, c) in [[bos_token, 'bc']] %}{{ a ~ b }}{% endfor %}",
        "{% with (a, b) = [1, eos_token] %}{{ b }}{% endwith %}",
        "{% set a, b = 'ab' %}{{ b }}",
    ],
)
def test_names_take_a_value_apart_as_in_jinja(source: str) -> None:
    assert ours(source) == plain_jinja(source)


@pytest.mark.parametrize("source", MISSING.values())
def test_what_chat_templates_do_not_have_is_refused(source: str) -> None:
    says = "not available to chat templates|No (filter|test) named|'dict' is undefined"
    with pytest.raises(RejectedError, match=says):
        ours(source)


def test_a_refusal_of_the_template_names_the_token_it_names() -> None:
    with pytest.raises(RejectedError, match="refuses these messages: no <s> here"):
        ours("{{ raise_exception('no ' ~ bos_token ~ ' here') }}")
