"""What every page is rendered with."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from popalign_core.reporting.formatting import as_text, estimate, number, plain_words


@cache
def environment() -> Environment:
    """Templates of this package, with the filters for numbers and names."""
    found = Environment(
        loader=PackageLoader("popalign_core.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(number=number, estimate=estimate, words=plain_words, as_text=as_text)
    return found
