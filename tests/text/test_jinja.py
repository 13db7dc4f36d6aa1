"""Hostile templates are refused or stopped, and reach nothing but the messages."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from edgelm.bundle.chat_template import MAX_TEMPLATE_CHARACTERS
from edgelm.errors import BundleError, EdgelmError, PromptError
from edgelm.text.jinja import MAX_TEMPLATE_NODES, JinjaTemplate

NOW = datetime(2026, 7, 4, 12, 30)
MESSAGES = [{"role": "user", "content": "hi <b> " * 100}]
NESTED = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(30) %}{% set ns.x = [ns.x, ns.x] %}"
LAUGHS = NESTED + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
TUPLES = "{% set ns = namespace(x=(1, 2)) %}{% for i in range(30) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
LONG = "{% set s = 'a' * 1000000 %}"


def render(source: str, **variables: object) -> str:
    return JinjaTemplate(source, "the template").render({"messages": MESSAGES, **variables}, NOW)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 100000000 }}",
        "{{ [1] * 100000000 }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for a in range(1000) %}" * 5 + "{% endfor %}" * 5,
        "{% for a in range(100000) %}" + "y" * 50_000 + "{% endfor %}",
        "{% macro f() %}{% for a in range(100000) %}" + "y" * 50_000 + "{% endfor %}{% endmacro %}{% set z = f() %}",
        "{% for a in range(10000) %}" + "{% if x and x and x %}{% endif %}" * 1000 + "{% endfor %}",
        "{% for a in range(100000) if a < 0 %}{% endfor %}" * 100,
        "{% set ns = namespace(x='aaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(40) %}{% set z %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = z %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        LAUGHS + "{{ ns.x }}",
        LAUGHS + "{{ ns.x | tojson }}",
        LAUGHS + "{{ ns.x == ns.y }}",
        LAUGHS + "{{ ns.x in [ns.y] }}",
        LAUGHS + "{{ ns.x is eq(ns.y) }}",
        LAUGHS + "{{ [ns.x, ns.y] | sort }}",
        LAUGHS + "{{ [ns.x, ns.y] | unique }}",
        LAUGHS + "{{ [ns.x].index(ns.y) }}",
        LAUGHS + "{{ 'a' ~ ns.x }}",
        LAUGHS + "{{ [ns.x] | join }}",
        TUPLES + "{{ {ns.x: 1} }}",
        TUPLES + "{{ {1: 1}[ns.x] }}",
        TUPLES + "{{ {1: 1}.get(ns.x) }}",
        LONG + "{{ s | replace('', s) }}",
        LONG + "{{ s.replace('a', s) }}",
        LONG + "{{ s.join(s.split('a')) }}",
        LONG + "{% for i in range(100000) %}{{ s.find('b') }}{% endfor %}",
        LONG + "{% for i in range(100000) %}{{ 'b' in s }}{% endfor %}",
        LONG + "{% for i in range(100000) %}{{ s | upper | length }}{% endfor %}",
        "{% set ns = namespace(x=[messages[0]] * 10000) %}{% for i in range(100000) %}"
        "{% set y = ns.x | selectattr('content', 'equalto', 'user') %}{% endfor %}",
        "{{ [1] | map(':paid', -99999999999) | list }}",
    ],
)
def test_too_much_work_is_stopped(source: str) -> None:
    with pytest.raises(PromptError, match="the template was stopped, because it does more work than 8,000,000 units"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "not " * 10_000 + "1 }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{{ " + "[" * 30_000 + "]" * 30_000 + " }}",
        "{{ 1" + "+1" * 30_000 + " }}",
        "{{ 1" + "<1" * 30_000 + " }}",
        "{{ x" + ".a" * 30_000 + " }}",
        "{{ x" + "|e" * 30_000 + " }}",
        "{% if 1 %}" * 5000,
        "{% for x in [1] %}" * 3000 + "{% endfor %}" * 3000,
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% from 'os' import system %}",
        "{% extends 'x' %}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% autoescape true %}{% endautoescape %}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ 2 ** 1000000000 }}",
        "{{ '%999999999s' | format(1) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ ''|attr('__class__') }}",
        "{% debug %}",
        "{% do messages.append(1) %}",
        "{{ unclosed",
        "x" * (MAX_TEMPLATE_CHARACTERS + 1),
        "{{ a }}" * MAX_TEMPLATE_NODES,
    ],
    ids=range(26),
)
def test_what_no_template_needs_is_refused_when_it_is_read(source: str) -> None:
    with pytest.raises(BundleError, match=r"^the template "):
        JinjaTemplate(source, "the template")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{0.__class__}'.format_map(messages) }}",
        "{{ '%s' % messages }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x'.encode() }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ namespace.__init__.__globals__.os }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ self }}",
        "{{ range }}",
        "{{ namespace() }}",
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ [ns] }}",
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ [ns] == [ns] }}",
        "{% for x in [1] %}{{ loop }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(30000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=3) %}{% for i in range(20) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
        "{{ ('f' * 10000) | int(0, 16) }}",
        "{{ 'x' | indent(1000000000) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ messages | tojson(separators=('a' * 100, 'b')) }}",
        "{{ range(10 // 0) }}",
        "{{ range(99999999999999999999999999) }}",
        "{{ unknown() }}",
        "{{ unknown.more }}",
        "{{ strftime_now('%Y' * 1000) }}",
    ],
)
def test_what_would_reach_further_fails_in_one_sentence(source: str) -> None:
    with pytest.raises(PromptError, match=r"^the template cannot render these messages: .+") as caught:
        render(source)
    assert "\n" not in str(caught.value)
    assert MESSAGES == [{"role": "user", "content": "hi <b> " * 100}]


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ ''.__class__ }}|{{ messages.__len__ }}|{{ messages[0]['__class__'] }}", "||"),
        ("{% for x in [1] %}{{ loop._iterator }}{{ loop['__class__'] }}{% endfor %}", ""),
        ("{% set ns = namespace() %}{{ ns.__class__ }}{{ ns['_Namespace__attrs'] }}", ""),
        ("{{ raise_exception._function }}{{ range.__call__ }}{{ dict.mro }}", ""),
        ("{% for x in ['a'] | map(attribute='__class__') %}{{ x }}{% endfor %}", ""),
        ("{{ ['a'] | sort(attribute='__class__') }}", "['a']"),
    ],
)
def test_attributes_that_are_not_listed_are_undefined(source: str, written: str) -> None:
    assert render(source) == written


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(PromptError) as caught:
        render("{{ raise_exception('Roles must\\n alternate\x1b[31m') }}")
    assert str(caught.value) == "the template refuses these messages: Roles must alternate [31m"


def test_the_time_is_the_callers() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "04 Jul 2026"
    assert render("{{ strftime_now('%99999999999Y') }}") == "2026"


def test_long_messages_may_cost_more() -> None:
    source = "{% for i in range(20) %}{{ messages[0].content.strip() | length }}{% endfor %}"
    long = [{"role": "user", "content": "a" * 1_000_000}]
    template = JinjaTemplate(source, "the template")
    with pytest.raises(PromptError, match="stopped"):
        template.render({"messages": long}, NOW)
    assert template.render({"messages": long}, NOW, 50_000_000) == "1000000" * 20


def test_a_stopped_template_works_again() -> None:
    template = JinjaTemplate("{% for i in range(n) %}{{ i }}{% endfor %}", "the template")
    with pytest.raises(EdgelmError):
        template.render({"n": 10**7}, NOW)
    assert template.render({"n": 3}, NOW) == "012"


def test_threads_have_budgets_and_times_of_their_own() -> None:
    template = JinjaTemplate("{{ strftime_now('%Y') }}{% for i in range(n) %}{{ i }}{% endfor %}", "the template")

    def rendered(number: int) -> str:
        try:
            return template.render({"n": 10**6 if number % 2 else 3}, datetime(2000 + number, 1, 1))
        except PromptError:
            return "stopped"

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(rendered, range(40)))
    assert found == ["stopped" if number % 2 else f"{2000 + number}012" for number in range(40)]
