"""Architectures as data: the table, and how a model finds its entry."""

from __future__ import annotations

from rehead.convert.families.refusals import REFUSALS
from rehead.convert.families.resolve import resolve_family
from rehead.convert.families.spec import Family, Names, Refusal
from rehead.convert.families.table import FAMILIES

__all__ = ["FAMILIES", "REFUSALS", "Family", "Names", "Refusal", "resolve_family"]
