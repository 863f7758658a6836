"""The command `rehead curve` and the page that it writes."""
