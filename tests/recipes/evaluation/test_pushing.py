"""``rehead evaluate --push-to-hub`` and ``--revision``, on a Hub in memory."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from fake_hub import FakeHub

from rehead.errors import UsageError
from rehead.recipes.evaluation.models import at_revision
from rehead.recipes.evaluation.output import REPORTS, without_paths
from rehead.recipes.evaluation_schema import Evaluation

SMALL = ("--window", 64, "--tokens", 512, "--sample-tokens", 4, "--convention", "disjoint")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_a_report_is_pushed_beside_the_model_and_without_this_machines_paths(
    run, hub, original, converted, text, tmp_path
):
    hub.repositories["me/model"] = {"config.json": b"{}", "model.safetensors": b"weights"}
    arguments = ("evaluate", converted, "--baseline", original, "--data", text, *SMALL, "--out", tmp_path / "r")
    code, out, err = run(*arguments, "--push-to-hub", "me/model")
    assert code == 0, err
    assert "pushed: https://hub/me/model/commit/1" in out
    there = hub.repositories["me/model"]
    assert {f"evaluation/{name}" for name in REPORTS} | {"config.json", "model.safetensors"} == there.keys()
    for name in REPORTS:
        assert str(original.parent).encode() not in there[f"evaluation/{name}"]
    document = Evaluation.model_validate_json(there["evaluation/evaluation.json"])
    assert (document.model.name, document.baseline.name) == ("converted", "original")
    assert document.conditions.data[0].name == document.divergence[0].data == "text.txt"
    # On this machine the document keeps them; its report, which is meant for a card, does not.
    assert json.loads((tmp_path / "r" / "evaluation.json").read_text())["model"]["name"] == str(converted)
    assert str(original.parent) not in (tmp_path / "r" / "report.md").read_text()
    assert run(*arguments, "--quiet", "--push-to-hub", "me/model")[0] == 0  # again, in the place of the first


def test_nothing_is_sent_that_was_not_asked_for(run, hub, original, text):
    assert run("evaluate", original, "--data", text, *SMALL)[0] == 0
    assert hub.calls == []


def test_somebody_elses_report_is_not_replaced(run, hub, original, text):
    hub.repositories["me/theirs"] = {"evaluation/report.md": b"mine"}
    code, _, err = run("evaluate", original, "--data", text, *SMALL, "--push-to-hub", "me/theirs")
    assert code == 2
    assert "me/theirs: holds 'evaluation/report.md', which Rehead did not write" in err
    assert hub.repositories["me/theirs"] == {"evaluation/report.md": b"mine"}


def test_models_of_one_name_stay_apart(tmp_path):
    import made

    found = made.evaluation(name=str(tmp_path / "a" / "model"))
    found.baseline.name = str(tmp_path / "b" / "model")
    found.notes = [f"{tmp_path}/b/model: is slow"]
    shown = without_paths(found)
    assert (shown.model.name, shown.baseline.name) == ("model", "b/model")
    assert shown.notes == ["b/model: is slow"]
    assert without_paths(made.evaluation(name="owner/model")).model.name == "owner/model"


def test_a_revision_is_of_the_judged_model(run, original, text):
    assert at_revision("owner/model", "v1") == "owner/model@v1"
    assert at_revision("owner/model", None) == "owner/model"
    with pytest.raises(UsageError, match="says its revision itself"):
        at_revision("owner/model@v1", "v2")
    code, _, err = run("evaluate", original, "--data", text, "--revision", "main")
    assert code == 2
    assert "has no revisions; leave --revision out" in err
