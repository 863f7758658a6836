"""The report as one HTML file that asks for nothing from outside."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from rehead.console import printable
from rehead.recipes.report.drawing import DASHES, Key, Plot
from rehead.recipes.report.tables import Table
from rehead.version import __version__

_TABLE = """{% if item.head | length > 4 %}<p class="cue" aria-hidden="true">more columns: scroll →</p>
{% endif %}<div class="scroll" tabindex="0" role="region" aria-label="{{ item.title }}"><table class="{{ kind }}">
{% if item.head | join %}
<thead><tr>{% for cell in item.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
{% endif %}
<tbody>
{% for row in item.rows %}
<tr><th scope="row">{{ row[0] | words }}</th>
{%- for cell in row[1:] %}
{%- set line, _, below = cell.partition("\n") %}<td{% if cell in marked %} class="{{ marked[cell] }}"{% endif %}>
{{- line }}
{%- if below %}<small>{{ below }}</small>{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if item.note %}
<p class="note">{{ item.note }}</p>
{% endif %}"""


#: Cells that are coloured by what they say.
_MARKED = {"FAILED": "bad", "passed": "good", "broken": "bad", "usable": "good", "uptrain first": "soso",
           "uptrain more": "soso"}  # fmt: skip


def html(**content: Any) -> str:
    """Render the page.

    Args:
        content: title, verdict, failed, notes, overview, samples, samples_note, plots, conditions, caveats, details;
            all its text is escaped; ``files``, what else holds the figures, where it is not the report's.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("rehead.recipes.report")

    def shown(value: Any) -> Any:
        """Text from a file without control characters, which escaping for HTML leaves in."""
        return printable(value, newlines=True) if type(value) is str else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=shown
    )
    environment.filters["words"] = words
    environment.filters["swatch"] = lambda key: Markup(swatch(key))
    environment.filters["drawing"] = lambda svg, alt: Markup(described(svg, alt))
    cell = environment.from_string(_TABLE)

    def table(item: Table, kind: str = "figures") -> Any:
        return Markup(cell.render(item=item, kind=kind, marked=_MARKED))

    page = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    css = Markup((folder / "report.css").read_text(encoding="utf-8"))
    content = {"files": "report.md, report.json", **content}
    return page.render(css=css, table=table, version=__version__, **content)


def words(text: str) -> Any:
    """Text that breaks between the parts of ``window:size=128,sinks=4``, not inside an option like ``--kv-cache``."""
    from markupsafe import Markup, escape

    safe = re.sub(r"([:=_](?=\w)|,(?=[^\W\d]))", r"\1<wbr>", str(escape(printable(text, newlines=True))))
    return Markup(re.sub(r"(?<!\S)--[\w-]+", r'<span class="whole">\g<0></span>', safe))


def described(svg: str, alt: str) -> str:
    """A drawing (made by :mod:`rehead.recipes.report.drawing`, so trusted) with its words for who cannot see it."""
    from markupsafe import escape

    return svg.replace("<svg", f'<svg class="plot" role="img" aria-label="{escape(alt)}"', 1)


def standalone(plot: Plot) -> str:
    """A plot as an SVG file of its own, in the page's colours and with its legend."""
    from markupsafe import escape

    css = (files("rehead.recipes.report") / "report.css").read_text(encoding="utf-8")
    colours = css[: css.index("* {")]
    _, _, width, height = map(float, plot.svg.split('viewBox="', 1)[1].split('"', 1)[0].split())
    legend = "".join(
        f'<g transform="translate(30 {height + 16 * at})"><svg width="28" height="12">{swatch(key)}</svg>'
        f'<text x="36" y="10" font-size="10" fill="var(--ink)">{escape(printable(key.text))}</text></g>'
        for at, key in enumerate(plot.keys)
    )
    whole = height + 16 * len(plot.keys) + 8
    inner = plot.svg.replace("<svg", f'<svg width="{width:g}" height="{height:g}"', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'viewBox="0 0 {width:g} {whole:g}" font-family="sans-serif"><title>{escape(printable(plot.title))}</title>'
        f'<style>{colours}</style><rect width="100%" height="100%" fill="var(--card)"/>{inner}{legend}</svg>\n'
    )


def swatch(key: Key) -> str:
    """A legend's line and marker."""
    colour = "var(--faint)" if key.colour < 0 else f"var(--c{key.colour})"
    dash = DASHES[key.dash]
    pattern = "" if isinstance(dash, str) else f' stroke-dasharray="{" ".join(str(1.6 * x) for x in dash[1])}"'
    fill = "var(--card)" if key.hollow else colour
    line = f'<line x1="0" y1="6" x2="28" y2="6" stroke="{colour}" stroke-width="1.8"{pattern}/>'
    return f'<svg viewBox="0 0 28 12" aria-hidden="true">{line}{_marker(key.marker, colour, fill)}</svg>'


def _marker(marker: str, colour: str, fill: str) -> str:
    style = f'fill="{fill}" stroke="{colour}" stroke-width="1.4"'
    shapes = {
        "o": f'<circle cx="14" cy="6" r="3.4" {style}/>',
        "s": f'<rect x="10.8" y="2.8" width="6.4" height="6.4" {style}/>',
        "^": f'<path d="M14 2.2 18 9.4H10z" {style}/>',
        "v": f'<path d="M14 9.8 18 2.6H10z" {style}/>',
        "<": f'<path d="M9.8 6 17 2V10z" {style}/>',
        "D": f'<path d="M14 1.8 18.2 6 14 10.2 9.8 6z" {style}/>',
        "P": f'<path d="M12.7 2.2h2.6v2.5h2.5v2.6h-2.5v2.5h-2.6V7.3h-2.5V4.7h2.5z" {style}/>',
        "X": f'<path d="M10.6 3.9 12 2.5 14 4.6 16 2.5 17.4 3.9 15.4 6 17.4 8.1 16 9.5 14 7.4 12 9.5 10.6 8.1 12.6 6z" '
        f"{style}/>",
    }
    return shapes.get(marker, "")
