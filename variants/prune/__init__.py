"""Query heads that a layer can do without, with the output projection refitted to those that stay."""
