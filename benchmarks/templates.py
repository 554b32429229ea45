"""HTML pages from the templates of this folder, with the charts' style."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined  # a dependency of torch
from markupsafe import Markup

from himo_charts.svg import page_style


def render(template: str, **values: Any) -> str:
    """Returns the page of a template that extends base.html; every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(chart_style=Markup(page_style()), **values)
