"""HTML pages without other files: their style sheet, for light and dark screens and for paper, and their template."""

from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The Content-Security-Policy of a page: no script runs in it, and it loads nothing."""


def render_page(package: str, template: str, **values: Any) -> str:
    """Returns a page from the template in a package. The template has `style` and `policy` beside the values; all text
    is escaped that is no Markup.
    """
    style = Markup(files("dpo.base").joinpath("page.css").read_text(encoding="utf-8"))
    environment = Environment(loader=PackageLoader(package, ""), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"n": "{:,.0f}".format, "share": "{:.1%}".format}
    return environment.get_template(template).render(style=style, policy=POLICY, **values)
