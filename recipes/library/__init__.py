"""The recipes that ship with Rehead, one YAML file each; `rehead recipes ls` lists them."""
