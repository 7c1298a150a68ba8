"""The pages' one jinja environment: texts are escaped, a page is made of ``base.html`` and loads nothing.

Only the script that a page is written with may run in it: its hash stands in the page's content-security policy.
"""

import base64
import functools
import hashlib
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from caco_scale import __version__


def render(name: str, **values: Any) -> bytes:
    """A page of ``caco_scale``'s templates, such as ``report/page.html``, as UTF-8; ``values`` are what it shows.

    Characters that no text can have (of file names that are not UTF-8) become question marks.
    """
    common = {"version": __version__, "now": _now, "source": lambda file: Markup(_source(file))}
    return _environment().get_template(name).render(**common, **values).encode("utf-8", "replace")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update({"words": words, "sha256": _sha256})
    return environment


def _source(name):
    return (resources.files("caco_scale") / name).read_text(encoding="utf-8")


def _now():
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _sha256(text):
    """As a content-security policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def words(value: Any) -> str:
    """A value of a configuration or an environment as text."""
    if value in (None, "", (), [], {}):
        return "—"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return " ".join(words(item) for item in value)
    return str(value)
