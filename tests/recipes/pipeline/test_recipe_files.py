"""What recipes may say: keys, values, paths, settings, sweeps; and that those that ship are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rehead.errors import UsageError
from rehead.recipes.pipeline.graph import plan_cell
from rehead.recipes.pipeline.load import library_names, load_recipe, parse_setting, recipe_text
from rehead.recipes.pipeline.preview import preview
from rehead.recipes.pipeline.run import plan_recipe
from rehead.recipes.pipeline.schema import convert_options, share_of
from rehead.recipes.pipeline.sweep import cells

BAD = [
    # (lines added to the recipe, words of the one line)
    ("modle: x", "did you mean 'model'"),
    ("uptrain: {data: a.txt, toknes: 8M}", "did you mean 'tokens'"),
    ("evaluate: {data: a.txt, windwo: 8}", "did you mean 'window'"),
    ("convert: {num_key_value_head: 2}", "did you mean 'num_key_value_heads'"),
    ("convert: {num_key_value_heads: 2, method: meen}", "did you mean 'mean'"),
    ("convert: {num_key_value_heads: two}", "is not a whole number"),
    ("requires: {gpu: 8}", "did you mean 'requires.gpus'"),
    ("launch: {processes: 0}", "launch.processes"),
    ("uptrain: {data: a.txt, tokens: eight}", "tokens: 'eight'"),
    ("uptrain: {tokens: 8M}", "data is missing"),
    ("uptrain: {data: a.txt, tokens: 5%}", "pretraining_tokens, which is missing"),
    ("uptrain: {data: a.txt, tokens: inf%}\npretraining_tokens: 2T", "write 5% and 2T"),
    ("launch: {processes: 1000000000}", "launch.processes"),
    ("uptrain: {data: a.txt, loss: kdd}", "did you mean 'kd'"),
    ("evaluate: {window: 64}", "data is missing"),
    ("evaluate: {data: a.txt, fail_above: {klll: 1}}", "did you mean"),
    ("control: {toknes: 1}\nuptrain: {data: a.txt}\nevaluate: {data: a.txt}", "did you mean 'tokens'"),
    ("new: {data: a.txt}", "either model or new"),
    ("sweep: {convert.method: []}", "list of values"),
    ("sweep: {convert.method: [mean], start: {a: {convert.method: svd}}}", "both set convert.method"),
    ("sweep: {convert.method: [mean, mean]}", "two cells are called 'mean'"),
    ("control: {loss: kd}\nuptrain: {data: a.txt}\nevaluate: {data: a.txt}", "would teach the original by itself"),
    ("sweep: {uptrain.data: [[a.txt], [b.txt]]}\nuptrain: 5", "dictionary"),
    ("evaluate: {data: built-in:held-out}", "did you mean 'built-in:heldout'"),
    ("model: x", "appears twice"),
    ("convert: {method: [", "no YAML in line"),
    ("1: 2", "not text"),
    ("convert: {num_key_value_heads: yes}", "is not a whole number"),
    ("convert: {num_key_value_heads: true}", "not a number"),
    ("evaluate: {data: a.txt, fail_above: {kl: true}}", "number"),
    ("convert: {seed: 2024-99-99}", "seed"),
    ("launch: {processes: 2024-13-45}", "launch.processes"),
    ("convert: {seed: " + "9" * 5000 + "}", "a number of 5000 characters"),
    ("sweep: &m [*m]", "refers to itself"),
    (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i}: &a{i} [{f'*a{i - 1 if i else str()},' * 9}]\n" for i in range(20)),
        "aliases",
    ),
    ("convert: " + "[" * 3000, "nested"),
]


def recipe(folder: Path, more: str = "", convert: str = "convert: {num_key_value_heads: 2}") -> Path:
    path = folder / "r.yaml"
    convert = "" if "convert:" in more else convert
    path.write_text(f"name: r\nmodel: some/model\n{convert}\n{more}\n")
    return path


@pytest.mark.parametrize(("more", "says"), BAD, ids=[b[0].splitlines()[0][:40] for b in BAD])
def test_mistakes_are_one_line(run, tmp_path, more, says) -> None:
    code, _, err = run("recipes", "validate", recipe(tmp_path, more))
    assert code == 2, err
    assert says in err, err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_a_recipe_without_work_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="nothing to do"):
        plan_recipe(str(recipe(tmp_path, convert="")))


def test_unknown_recipes_suggest(run) -> None:
    code, _, err = run("run", "smollm2-mqq")
    assert code == 2
    assert "did you mean 'smollm2-mqa'" in err
    code, _, err = run("recipes", "validate", "nowhere/x.yaml")
    assert code == 2
    assert "no such file" in err


@pytest.mark.parametrize("name", library_names())
def test_shipped_recipes_are_valid_and_planned(name, tmp_path, tiny_model) -> None:
    loaded = load_recipe(name)
    assert loaded.raw["name"] == name
    assert 20 < len(loaded.raw.get("description", "")) <= 120
    if "new" in loaded.raw:
        plan_recipe(name, out=tmp_path)
        return
    # What is planned is planned on a model that can be converted that far.
    settings = [f"model={tiny_model}"]
    raw = load_recipe(name, settings).raw
    if (raw.get("convert") or {}).get("num_key_value_heads", 1) > 4:
        settings.append("convert.num_key_value_heads=2")
    if "convert.num_key_value_heads" in (raw.get("sweep") or {}):
        settings.append(f"sweep={json.dumps({**raw['sweep'], 'convert.num_key_value_heads': [2, 1]})}")
    planned = plan_recipe(name, settings, out=tmp_path)
    kinds = {stage.kind for plan in planned.cells for stage in plan.stages.values()}
    assert {"convert", "evaluate"} <= kinds
    rows = preview(planned)
    assert {row["action"] for row in rows} == {"run"}
    changes = [row["change"] for row in rows if row["kind"] == "convert"]
    assert all("KV heads" in change or "chosen by running the model" in change for change in changes)


def test_recipes_are_listed_shown_and_copied(run, tmp_path) -> None:
    code, out, _ = run("recipes", "ls")
    assert code == 0
    assert all(name in out for name in library_names())
    code, out, _ = run("recipes", "show", "demo")
    assert yaml.safe_load(out)["name"] == "demo"
    code, _, _ = run("recipes", "copy", "demo", tmp_path / "mine.yaml")
    assert code == 0
    assert (tmp_path / "mine.yaml").read_text() == recipe_text("demo")[0]
    code, _, err = run("recipes", "copy", "demo", tmp_path / "mine.yaml")
    assert code == 2
    assert "exists already" in err


def test_paths_start_from_the_recipe_and_settings_from_the_working_folder(tmp_path, monkeypatch) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (there / "model").mkdir()
    path = there / "r.yaml"
    path.write_text(
        "name: r\nmodel: model\nconvert: {num_key_value_heads: 1}\n"
        "uptrain: {data: ['a.txt.gz#lines,chars=:-5', 'owner/name#config=en']}\nevaluate: {data: built-in:heldout}\n"
    )
    monkeypatch.chdir(here)
    raw = load_recipe(str(path), ["evaluate.data=[b.txt]"]).raw
    assert raw["model"] == str(there / "model")
    assert raw["uptrain"]["data"] == [f"{there / 'a.txt.gz'}#lines,chars=:-5", "owner/name#config=en"]
    assert raw["evaluate"]["data"] == [str(here / "b.txt")]
    assert plan_recipe(str(path)).out == there / "r-out"
    assert plan_recipe(f"../{there.name}/r.yaml").out == there / "r-out"
    assert plan_recipe(str(path), out="o").out == here / "o"
    assert plan_recipe("demo", [f"model={there}"]).out == here / "demo-out"


def test_settings(tmp_path) -> None:
    path = str(recipe(tmp_path, "sweep: {convert.method: [mean, svd]}", "convert: {num_key_value_heads: 2}"))
    assert load_recipe(path, ["convert.num_key_value_heads=1", "uptrain=null"]).raw["convert"] == {
        "num_key_value_heads": 1
    }
    assert parse_setting("a.b=[1, x]") == ("a.b", [1, "x"])
    for setting, says in (
        ("convert.method=svd", "sweep varies it"),
        ("nothing", "has no key and value"),
        ("a..b=1", "has no key and value"),
        ("model.x=1", "not a section"),
        ("a={", "no YAML"),
    ):
        with pytest.raises(UsageError, match=says):
            load_recipe(path, [setting])


def test_sweeps_are_products_of_their_axes(tmp_path) -> None:
    raw = {
        "name": "s",
        "model": "x",
        "convert": {"method": "mean"},
        "sweep": {
            "convert.num_key_value_heads": [4, 1],
            "start": {"plain": {}, "best": {"convert.method": "svd", "convert.refit": True}},
        },
    }
    found = cells(raw, "s")
    assert [cell.label for cell in found] == [
        "4 KV heads, plain", "4 KV heads, best", "1 KV head, plain", "1 KV head, best",
    ]  # fmt: skip
    assert [cell.series for cell in found] == ["plain", "best", "plain", "best"]
    assert found[3].raw["convert"] == {"method": "svd", "num_key_value_heads": 1, "refit": True}
    assert raw["convert"] == {"method": "mean"}
    assert "sweep" not in found[0].raw


def test_cells_share_the_stages_they_have_in_common(tiny_model) -> None:
    planned = plan_recipe("demo", [f"model={tiny_model}"], out="o")
    assert len(planned.cells) == 4
    control = [name for name in planned.shared() if name.startswith("control")]
    assert planned.shared() == control
    assert len(control) == 1
    conversions = {name for plan in planned.cells for name in plan.stages if name.startswith("convert")}
    assert len(conversions) == 4


def test_what_a_stage_is_asked_for_names_it(tiny_model, tmp_path) -> None:
    path = str(recipe(tmp_path, "uptrain: {data: a.txt}\nevaluate: {data: a.txt}"))

    def names(*settings: str) -> set[str]:
        return set(plan_recipe(path, [f"model={tiny_model}", *settings]).cells[0].stages)

    plain = names()
    assert names("uptrain.checkpoint_every=7", "device=cpu") == plain
    changed = names("uptrain.learning_rate=0.5")
    assert {name.split("-")[0] for name in plain - changed} == {"uptrain", "control", "evaluate"}
    assert {name.split("-")[0] for name in names("convert.seed=1") & plain} == {"control"}


def test_control_is_the_original_by_cross_entropy(tiny_model, tmp_path) -> None:
    path = str(recipe(tmp_path, "uptrain: {data: a.txt, loss: kd+0.1*ce}\nevaluate: {data: a.txt}"))
    plan = plan_recipe(path, [f"model={tiny_model}", "control.learning_rate=0.5"]).cells[0]
    control = next(stage for stage in plan.stages.values() if stage.kind == "control")
    uptrain = next(stage for stage in plan.stages.values() if stage.kind == "uptrain")
    assert control.options["loss"] == "ce"
    assert control.options["learning_rate"] == 0.5
    assert control.options["tokens"] == uptrain.options["tokens"]
    assert set(control.models) == {"student"}
    assert control.models["student"].model == uptrain.models["teacher"].model == str(tiny_model)
    without = plan_recipe(path, [f"model={tiny_model}", "control=false"]).cells[0]
    assert not any(stage.kind == "control" for stage in without.stages.values())


def test_a_model_does_not_teach_itself(tmp_path) -> None:
    path = str(recipe(tmp_path, "uptrain: {data: a.txt}", convert=""))
    with pytest.raises(UsageError, match="teach the model by itself"):
        plan_recipe(path)
    raw = {"name": "r", "model": "m", "uptrain": {"data": "a.txt", "loss": "ce"}}
    assert [stage.kind for stage in plan_cell(cells(raw, "r")[0], "r").stages.values()] == ["uptrain"]


@pytest.mark.parametrize(
    ("tokens", "of", "found"),
    [("5%", "2T", 100_000_000_000), ("0.5%", 1000, 5), ("8M", None, "8M"), ("1%", "30B", 3 * 10**8)],
)
def test_shares_of_the_pretraining(tokens, of, found) -> None:
    assert share_of(tokens, of, "r") == found


def test_no_gpu_where_the_recipe_wants_one(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    code, _, err = run("run", "gqa8-7b-fsdp2", "--out", tmp_path / "o")
    assert code == 3
    assert "wants 8 GPUs and this machine has 1" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("given", "meant"), [("8k", 8000), ("8Ki", 8192), (8192, 8192)])
def test_calibration_tokens_are_written_as_those_of_training(given, meant) -> None:
    options = convert_options({"num_key_value_heads": 1, "method": "svd", "calibration_tokens": given}, "convert")
    assert options["calibration_tokens"] == meant
    with pytest.raises(UsageError, match="calibration_tokens"):
        convert_options({"num_key_value_heads": 1, "calibration_tokens": "some"}, "convert")
