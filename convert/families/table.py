"""The table: one entry for each architecture. Adding an architecture touches this file alone.

The whole test battery (tests/convert/test_families.py) runs on every entry by itself.
"""

from __future__ import annotations

from rehead.convert.families.spec import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
    )
}
