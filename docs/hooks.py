"""What the site does beside Markdown: options, names and figures in code and tables do not break at their hyphens."""

from __future__ import annotations

import re
from typing import Any

_PARTS = re.compile(r"<pre.*?</pre>|<code>.*?</code>|<t[dh][ >].*?</t[dh]>", re.S)
#: A word with a hyphen in it: a tag, an entity or a space ends it. Longer ones would leave a phone's screen.
_WORD = re.compile(r'(?<![^\s>])(?=[^\s<>&"]*-)[^\s<>&"]{2,28}(?![^\s<])')


def on_page_content(html: str, **_: Any) -> str:
    """Mark such words for the style sheet."""

    def mark(found: re.Match[str]) -> str:
        return found[0] if found[0].startswith("<pre") else _WORD.sub(r'<span class="whole">\g<0></span>', found[0])

    return _PARTS.sub(mark, html)
