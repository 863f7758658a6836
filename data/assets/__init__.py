"""Texts that ship with Rehead."""
