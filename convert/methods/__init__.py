"""Rehead."""
