"""Harness tasks from local files, with no network."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from rehead.cli import main
from rehead.errors import UnsupportedError, UsageError
from rehead.recipes.evaluation import tasks
from rehead.recipes.evaluation.models import load_model

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "The year"
doc_to_choice: ["{{{{a}}}}", "{{{{b}}}}"]
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    rows = [{"a": f" {year} brought", "b": f" {year} zqxj#"} for year in range(1800, 1812)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "years.yaml").write_text(TASK.format(name="years_local", data=place / "rows.jsonl"))
    (place / "gone.yaml").write_text(TASK.format(name="gone_local", data=place / "nowhere.jsonl"))
    return place


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@torch.no_grad()
def test_scores_equal_those_counted_by_hand(folder, original, load, tokenizer, capfd, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)  # no git repository, which git would say
    loaded = load_model("model", str(original), device=torch.device("cpu"))
    manager = tasks.task_manager(["years_local"], str(folder))
    done = []
    capfd.readouterr()
    rows = tasks.task_scores(loaded, ["years_local"], manager, progress=lambda at, total: done.append((at, total)))
    assert capfd.readouterr() == ("", "")
    row = next(row for row in rows if row.metric == "acc")
    model, right = load(original), 0
    for line in (folder / "rows.jsonl").read_text().splitlines():
        scores = []
        for choice in json.loads(line).values():
            head, whole = tokenizer("The year").input_ids, tokenizer("The year" + choice).input_ids
            log_p = model(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            start = len(head) - 1
            scores.append(float(log_p[range(start, len(whole) - 1), whole[len(head) :]].sum()))
        right += scores[0] > scores[1]
    assert row.value == pytest.approx(right / 12)
    assert (row.who, row.task, row.samples, row.shots, row.higher_is_better) == ("model", "years_local", 12, 0, True)
    assert row.stderr is not None
    assert done == [(0, 1)]
    limited = tasks.task_scores(loaded, ["years_local"], manager, limit=5)
    assert limited[0].samples == 5


def test_mistakes_are_one_line(folder, original, tmp_path, monkeypatch):
    harness = pytest.importorskip("lm_eval.tasks")
    # Listing the harness's own thousands of tasks takes ten seconds, and no name here is among them.
    own = harness.TaskManager
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, include_defaults=True: own(None, include_path, False)
    )
    with pytest.raises(UsageError, match="did you mean 'years_local'"):
        tasks.task_manager(["year_local"], str(folder))
    with pytest.raises(UsageError, match="no such folder"):
        tasks.task_manager(["years_local"], str(tmp_path / "nowhere"))
    loaded = load_model("model", str(original), device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="gone_local: cannot be run"):
        tasks.task_scores(loaded, ["gone_local"], tasks.task_manager(["gone_local"], str(folder)))
    loaded.tokenizer = None
    with pytest.raises(UsageError, match="has no tokenizer"):
        tasks.task_scores(loaded, ["years_local"], None)


def test_the_extra_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r'pip install "rehead\[tasks\]"'):
        tasks.require_harness()


def test_from_the_command_line(folder, original, converted, capsys):
    pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(converted), "--baseline", str(original), "--tasks", "years_local", "--tasks-dir",
              str(folder), "--json", "--quiet", "--tokens", "512"])  # fmt: skip
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert [(row["who"], row["task"]) for row in json.loads(out)["tasks"] if row["metric"] == "acc"] == [
        ("baseline", "years_local"),
        ("model", "years_local"),
    ]
