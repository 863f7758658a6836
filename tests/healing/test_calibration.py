"""Calibration on tiny models: the layer-by-layer run is the model's own, and each stage of recovery recovers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from rehead.checkpoints.stream import ResourceError
from rehead.convert import convert, open_model
from rehead.convert.prove_layout import prove_layout
from rehead.data.calibration import load_calibration
from rehead.errors import UnsupportedError, UsageError
from rehead.healing import moments as moments_module
from rehead.healing import run as calibration_run
from rehead.healing import sight
from rehead.healing.finished import FinishedLayers
from rehead.healing.layerwise import LayerwiseModel
from rehead.healing.logits import LogitModel, LogitTargets, logit_error, refit_logits
from rehead.healing.moments import Moments
from rehead.healing.rotation import Rotation
from rehead.models.heads import Heads, rotary_pairs
from rehead.models.linalg import eigen

CPU = torch.device("cpu")
SMALL = {"calibration": ["random"], "calibration_tokens": 4096, "calibration_length": 32}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny.save_tiny("llama", folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "gpt_bigcode", "falcon", "qwen3", "cohere2", "gpt_oss"])
def test_layer_by_layer_is_the_model_itself(name: str, tmp_path: Path) -> None:
    if not tiny.available(name):
        pytest.skip(f"this transformers has no {name}")
    tiny.save_tiny(name, tmp_path / "model")
    model = open_model(tmp_path / "model")
    ids = torch.arange(60).view(3, 20) * 7 % tiny.VOCAB
    seen: list[torch.Tensor] = []
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    layers = plain.get_submodule(model.module_layer.split("{i}")[0].rstrip("."))
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        plain.base_model(input_ids=ids, use_cache=False)
        runner = LayerwiseModel(model, model.config, CPU)
        assert all(parameter.is_meta for parameter in runner.module.parameters())
        hidden = runner.embed([ids], 40)[0]
        for layer in range(model.config.num_hidden_layers):
            runner.load_layer(layer)
            hidden = torch.cat([runner.run_layer(layer, rows) for rows in hidden.split(2)])
            assert torch.allclose(hidden, seen[layer], atol=1e-5), layer
            runner.unload_layer(layer)
        assert all(parameter.is_meta for parameter in runner.module.parameters())


def distance(folder: Path, source: Path) -> float:
    """Mean KL to the source on random tokens."""
    ids = torch.randint(0, tiny.VOCAB, (8, 32), generator=torch.Generator().manual_seed(11))
    logs = []
    for path in (source, folder):
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            logs.append(model.eval()(input_ids=ids).logits.log_softmax(-1))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_bigcode"])
def test_each_stage_heals(name: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny.save_tiny(name, source)
    kinds = {
        "mean": {"method": "mean"},
        "svd": {"method": "svd", **SMALL},
        "refit": {"method": "svd", "refit": True, **SMALL},
        "fit": {"method": "svd", "refit": True, "fit": 30, **SMALL},
    }
    kl, facts = {}, {}
    for kind, options in kinds.items():
        done = convert(source, tmp_path / kind, num_key_value_heads=1, **options)
        kl[kind], facts[kind] = distance(tmp_path / kind, source), done.layers
    if name != "gpt_bigcode":  # its tiny model has one KV head already
        assert kl["svd"] < kl["mean"]
        assert kl["refit"] < kl["svd"]
        assert kl["fit"] < kl["refit"]
        assert "logit_error" in facts["refit"][0]
        before, after = facts["refit"][0]["logit_error"]
        assert after < before


def test_a_mean_start_can_be_refitted_and_similar_groups_calibrated(llama: Path, tmp_path: Path) -> None:
    plain = convert(llama, tmp_path / "a", num_key_value_heads=2, method="mean")
    assert plain.layers[0]["groups"] == [[0, 1, 2, 3], [4, 5, 6, 7]] or plain.layers[0]["groups"] == [[0, 1], [2, 3]]
    done = convert(llama, tmp_path / "b", num_key_value_heads=2, method="mean", refit=True, **SMALL)
    assert [facts["groups"] for facts in done.layers.values()] == [facts["groups"] for facts in plain.layers.values()]
    assert distance(tmp_path / "b", llama) < distance(tmp_path / "a", llama)
    done = convert(llama, tmp_path / "c", num_key_value_heads=2, method="svd", grouping="similar", refit=True, **SMALL)
    assert distance(tmp_path / "c", llama) < distance(tmp_path / "a", llama)
    heads = open_model(llama).num_kv_heads
    assert sorted(head for group in done.layers[0]["groups"] for head in group) == list(range(heads))


def test_sequences_longer_than_a_batch_of_tokens_go_one_by_one(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(calibration_run._BATCH_TOKENS, "cpu", 64)
    options = {"calibration": ["random"], "calibration_tokens": 2048, "calibration_length": 64}
    convert(llama, tmp_path / "out", num_key_value_heads=1, method="svd", refit=True, fit=2, **options)
    convert(llama, tmp_path / "mean", num_key_value_heads=1, method="mean")
    assert distance(tmp_path / "out", llama) < distance(tmp_path / "mean", llama)


def test_what_cannot_be_saved_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    weight = {"weight": torch.zeros(2)}
    (tmp_path / "gone").write_text("a file where the folder was")
    with pytest.raises(ResourceError, match=r"layer-00003.safetensors: cannot be written: .*(exists|[Nn]ot a dir)"):
        FinishedLayers(tmp_path / "gone").save(3, weight, {})

    def full(*arguments: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ResourceError, match=r"layer-00003.safetensors: cannot be written: the disk is full"):
        FinishedLayers(tmp_path).save(3, weight, {})


def test_a_killed_calibration_resumes_to_the_same_bytes(llama: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"num_key_value_heads": 1, "method": "svd", "refit": True, **SMALL}
    convert(llama, tmp_path / "whole", **options)
    save = FinishedLayers.save

    def stop_after_first(finished, layer, tensors, facts):
        save(finished, layer, tensors, facts)
        raise KeyboardInterrupt

    monkeypatch.setattr(FinishedLayers, "save", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "out", resume=True, **options)
    assert not (tmp_path / "out").exists()
    made = []
    monkeypatch.setattr(
        FinishedLayers, "save", lambda finished, layer, *rest: (made.append(layer), save(finished, layer, *rest))
    )
    convert(llama, tmp_path / "out", resume=True, **options)
    assert 0 not in made
    whole, out = (json.loads((tmp_path / name / "rehead.json").read_text())["files"] for name in ("whole", "out"))
    assert whole["model.safetensors"] == out["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(("kv", "bias"), [(1, False), (2, False), (2, True)])
def test_refit_finds_queries_and_keys_that_give_the_logits(kv: int, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    heads, size, width, length = 4, 8, 12, 24
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    true = Heads(draw(heads, size, width), draw(kv, size, width), draw(kv, size, width), draw(width, heads, size))
    true.pairs = rotary_pairs("half", 4)
    if bias:
        true.q_bias, true.k_bias = draw(heads, size), draw(kv, size)
    turn = torch.exp(1j * torch.arange(length)[:, None] * torch.tensor([1.0, 0.01])).to(torch.complex64)
    model = LogitModel(Rotation(turn, true.pairs), size**-0.5)
    q, k = model.weights(true)
    targets = []
    for _ in range(6):
        x = torch.cat([draw(4, length, width), torch.ones(4, length, 1)], -1)
        x[..., 0] = 0  # a direction that the text does not show
        scores = model.scores(model.states(x, q), model.states(x, k))
        p = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf")).softmax(-1)
        rows = torch.arange(length)
        targets.append(LogitTargets.of(x, rows, p, scores))
    inputs = sum(t.x.flatten(0, 1).T @ t.x.flatten(0, 1) for t in targets)
    start = Heads(
        true.q + 0.3 * draw(*true.q.shape), true.k + 0.3 * draw(*true.k.shape), true.v, true.o, pairs=true.pairs
    )
    if bias:
        start.q_bias, start.k_bias = torch.zeros(heads, size), torch.zeros(kv, size)
    assert logit_error(model, targets, true) < 1e-5
    refitted = refit_logits(start, model, targets, Moments({"inputs": inputs}))
    assert logit_error(model, targets, refitted) < 0.2 * logit_error(model, targets, start)
    torch.testing.assert_close(refitted.q[..., 0], start.q[..., 0])
    torch.testing.assert_close(refitted.k[..., 0], start.k[..., 0])
    if not bias:
        assert refitted.q_bias is None
        return
    unbiased = replace(refitted, q_bias=start.q_bias, k_bias=start.k_bias)
    assert logit_error(model, targets, refitted) < 0.5 * logit_error(model, targets, unbiased)


def test_a_tokenizer_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("word " * 4000)
    raw = json.loads((llama / "config.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        more = lambda source: lambda text, **_: type("Ids", (), {"input_ids": [raw["vocab_size"]] * len(text)})  # noqa: E731
        patch.setattr("rehead.data.calibration._tokenizer", more)
        with pytest.raises(UsageError, match="its tokenizer has more tokens than its vocabulary"):
            convert(
                llama, tmp_path / "out", num_key_value_heads=1, method="svd", calibration=[str(tmp_path / "t.txt")],
                calibration_tokens=2048, calibration_length=32,
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_drift_is_how_far_the_last_hidden_states_have_moved(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "out", num_key_value_heads=1, method="svd", **SMALL)
    noted = json.loads((tmp_path / "out" / "rehead.json").read_text())["calibration"]["drift"]
    (ids,) = load_calibration(["random"], None, tiny.VOCAB, 4096, [32]).tokens
    states = []
    for folder in (llama, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.norm = torch.nn.Identity()
        with torch.no_grad():
            states.append(model.model(input_ids=ids).last_hidden_state)
    assert noted == pytest.approx(float((states[1] - states[0]).norm() / states[0].norm()), rel=1e-3)


def test_a_guessed_layout_is_proved_on_numbers(llama: Path) -> None:
    model = open_model(llama)
    assert prove_layout(model) < 1e-4
    wrong = type(model.family)(**{**vars(model.family), "pairing": "interleaved"})
    model.family = wrong
    with pytest.raises(UnsupportedError, match="not laid out as"):
        prove_layout(model)


def test_a_norm_that_no_module_shows_is_found_out(llama: Path, monkeypatch) -> None:
    """Rotations of pairs pass through a norm over the head, scales of pairs do not, and svd would use those."""
    rotate = modeling_llama.apply_rotary_pos_emb
    normed = lambda *args, **kwargs: tuple(4 * F.normalize(x, dim=-1) for x in rotate(*args, **kwargs))  # noqa: E731
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", normed)
    with pytest.raises(UnsupportedError, match="not laid out as"):
        prove_layout(open_model(llama))


@pytest.mark.parametrize("layer", [0, -1])
def test_a_layout_that_gives_no_number_is_not_proved(llama: Path, monkeypatch, layer: int) -> None:
    model = open_model(llama)
    real, runs = LayerwiseModel.run_layer, []

    def broken(runner, index, hidden):
        runs.append(index)
        moved = index == model.layers[layer] and runs.count(index) == 2
        return real(runner, index, hidden) * (float("nan") if moved else 1.0)

    monkeypatch.setattr(LayerwiseModel, "run_layer", broken)
    with pytest.raises(UnsupportedError, match="not laid out as"):
        prove_layout(model)


def test_inputs_are_decomposed_once_for_a_layer(monkeypatch) -> None:
    """The pooling, the error figure and the refit share one eigendecomposition of the inputs' moment."""
    calls: list[int] = []
    monkeypatch.setattr(moments_module, "eigen", lambda matrix: (calls.append(1), eigen(matrix))[1])
    x = torch.randn(64, 9)
    moments = Moments({"inputs": x.T @ x / 64, "key_inputs": torch.stack([x.T @ x] * 2)}, groups=2)
    root, inverse = moments.input_roots
    torch.testing.assert_close(root @ inverse, torch.eye(9, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close((root @ root).float(), moments.inputs, atol=1e-4, rtol=1e-4)
    values, vectors = moments.input_eigen
    torch.testing.assert_close(((vectors * values) @ vectors.T).float(), moments.inputs, atol=1e-4, rtol=1e-4)
    assert moments.input_roots[0] is root
    assert moments.merged([[0, 1]]).input_roots[0] is root
    assert calls == [1]


def test_mixed_lengths_are_healed_for_both(llama: Path, tmp_path: Path) -> None:
    """Short and long sequences go through every stage; a length beyond the positions of the model is cut to them."""
    options = {"calibration": ["random"], "calibration_tokens": 4096, "calibration_length": (16, 4096)}
    done = convert(llama, tmp_path / "mixed", num_key_value_heads=1, method="svd", refit=True, fit=20, **options)
    convert(llama, tmp_path / "svd", num_key_value_heads=1, method="svd", **options)
    assert distance(tmp_path / "mixed", llama) < distance(tmp_path / "svd", llama)
    manifest = json.loads((tmp_path / "mixed" / "rehead.json").read_text())
    positions = json.loads((llama / "config.json").read_text())["max_position_embeddings"]
    assert manifest["calibration"]["length"] == [positions, 16]
    assert manifest["options"]["calibration_length"] == [16, positions]
    assert done.layers[0]["logit_error"][1] < done.layers[0]["logit_error"][0]


@pytest.mark.parametrize(("tokens", "device"), [(8192, "cpu"), (131072, "cpu"), (131072, "cuda"), (1 << 20, "cuda")])
def test_logits_are_matched_far_back_as_often_as_near(tokens: int, device: str) -> None:
    """Of two lengths with equal tokens, each gets the same number of queries, within the budget."""
    counts = {}
    for length in (512, 2048):
        part = torch.empty(tokens // 2 // length, length, 4, device="meta")
        sequences, queries = sight.logit_share(*part.shape[:2], 9, 2, device)
        assert sequences <= len(part)
        assert queries <= length // 8
        counts[length] = sequences * queries
    assert counts[512] == counts[2048]
    budget = sight.LOGIT_QUERIES[device]
    assert sum(counts.values()) <= budget
    assert tokens < 32768 or sum(counts.values()) == budget
    assert sight.logit_share(4, 1 << 16, 512, 1, device)[1] * 8 * 512 << 16 <= 1 << 32
