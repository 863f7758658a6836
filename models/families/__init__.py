"""Architectures as data: the table, and how a model finds its entry."""

from __future__ import annotations

from rehead.models.families.refusals import REFUSALS
from rehead.models.families.resolve import resolve_family
from rehead.models.families.spec import Family, Names, Refusal
from rehead.models.families.table import FAMILIES

__all__ = ["FAMILIES", "REFUSALS", "Family", "Names", "Refusal", "resolve_family"]
