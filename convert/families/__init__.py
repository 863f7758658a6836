"""Architectures as data: the table, and how a model finds its entry."""

from __future__ import annotations

from rehead.convert.families.spec import Family, Names
from rehead.convert.families.table import FAMILIES

__all__ = ["FAMILIES", "Family", "Names"]
