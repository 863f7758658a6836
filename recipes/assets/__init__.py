"""Texts and recipes that ship with Rehead."""
