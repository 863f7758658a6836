"""Recipes: YAML in, convert -> uptrain -> evaluate -> report out, each stage skipped where its output verifies.

::

    schema.py, sections.py   what a recipe may say; options are checked by the models behind the commands' own flags
    load.py                  YAML, library names, ``--set``, paths
    sweep.py                 one recipe -> independent cells
    graph.py                 one cell -> stages, each with a key that everything it depends on goes into
    record.py                what a finished stage left, and whether that still holds
    stages.py, run.py        doing it
    gather.py                evaluations -> one report
"""
