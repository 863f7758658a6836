"""Names in place of paths, in everything that an evaluation of a recipe writes."""

import pytest

from rehead.recipes.pipeline.labels import renamed

SHOWN = {"/m/texts/a.txt#lines": "a.txt#lines", "/out/": "", "/m": "m", "/mm": "big"}


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("/m", "m"),
        ("/m, (/m) and '/m'.", "m, (m) and 'm'."),
        ("ends in /m.", "ends in m."),
        ("/m/config.json", "m/config.json"),
        ("/m2, /m-2, /m.txt, /tmp/m", "/m2, /m-2, /m.txt, /tmp/m"),
        ("/mm", "big"),
        ("/out/stage/model", "stage/model"),
        ("/x/out/stage", "/x/out/stage"),
        ("/m/texts/a.txt#lines", "a.txt#lines"),
        (r"a name with \\1 in it", r"a name with \\1 in it"),
    ],
)
def test_paths_are_replaced_whole(told, shown):
    assert renamed({told: [told, 3, None]}, SHOWN) == {shown: [shown, 3, None]}


def test_a_name_is_taken_as_it_is():
    assert renamed("/m", {"/m": r"\\1"}) == r"\\1"
