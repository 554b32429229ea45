"""Fills templates. Text from data is always escaped."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from himo_charts import svg


def render(template: str, **values: Any) -> str:
    """The text of a template of this package, filled with `values`."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("himo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "colour_class": svg.colour_class,
        "series_class": svg.series_class,
        "colours": svg.COLOURS,
        "chart_style": Markup(svg.page_style()),  # HTML knows no escapes inside <style>
    }
    return environment


def _finalize(value: Any) -> Any:
    # Charts and the results of macros are HTML already.
    return value if hasattr(value, "__html__") else svg.readable(value)
