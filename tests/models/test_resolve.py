"""How a checkpoint finds its family: by the table, by a careful guess, or not at all and told why."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rehead.convert import convert
from rehead.errors import UnsupportedError
from rehead.models.config import resolve_config
from rehead.models.families import FAMILIES, REFUSALS, resolve_family
from rehead.models.families.guess import guess_family, probe_pairing
from rehead.models.families.layouts import split
from rehead.models.families.resolve import with_checkpoint_prefix
from rehead.models.freedom import key_freedom

NAMES = [*FAMILIES, *tiny.VARIANTS]
GUESSED = ("llama", "qwen2", "qwen3", "cohere", "glm", "olmo2", "gpt_oss", "starcoder2", "stablelm-plain", "phi")


# fmt: off
ISSUE = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi",
    "phi3", "stablelm", "starcoder2", "olmo", "olmo2", "olmo3", "cohere", "cohere2", "granite", "granitemoe", "helium",
    "glm", "glm4", "smollm3", "arcee", "ernie4_5", "nemotron", "seed_oss", "exaone4", "falcon", "gpt_bigcode", "gpt2",
    "dbrx",
)
# fmt: on


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).state_dict()


def refusal(config, tensors=None) -> str:
    with pytest.raises(UnsupportedError) as error:
        resolve_family(config, tensors or {})
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(config.model_type)
    assert ";" in line, "says what to do"
    return line


def declined(config, tensors) -> str | None:
    try:
        guess_family(config, tensors)
    except UnsupportedError as error:
        return str(error)
    return None


def test_issue_list_is_in_the_table() -> None:
    assert set(ISSUE) <= set(FAMILIES)
    assert len(FAMILIES) >= 40
    assert not set(FAMILIES) & set(REFUSALS)


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_causal_type_is_converted_or_refused_with_a_reason(model_type: str) -> None:
    """Whatever transformers knows: no crash, no silence."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:
        pytest.skip("its config has no defaults")
    if config.model_type in FAMILIES:
        assert resolve_family(config, {}) is FAMILIES[config.model_type]
    else:
        refusal(config)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("deepseek_v3", "latent"),
        ("ctrl", "one KV head for each query head"),
        ("mamba2", "no attention"),
        ("bert", "encoder"),
        ("bart", "encoder-decoder"),
        ("vit", "no text generator"),
        ("gemma3", "convert its language model (gemma3_text) alone"),
        ("llava", "convert its language model (llama) alone"),
        ("qwen2_5_vl", "(qwen2_5_vl_text) cannot be converted alone: transformers has no class"),
        ("fuyu", "(persimmon) cannot be converted alone: its class holds one KV head"),
        ("idefics", "multimodal"),
        ("mllama", "in its own layers"),
        ("diffllama", "neighbouring KV heads"),
        ("persimmon", "one KV head for each query head"),
    ],
)
def test_reasons(model_type: str, says: str) -> None:
    assert says in refusal(CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "intermediate_size", "sliding_window"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "of_nobody"])
def test_layers_that_differ_by_config_are_refused(model_type: str, key: str, monkeypatch) -> None:
    """Any config may hold values for single layers, which transformers then refuses to read as if they were one."""
    cls = CONFIG_MAPPING["qwen3" if model_type == "of_nobody" else model_type]
    monkeypatch.setattr(cls, "model_type", model_type)
    config = cls(num_hidden_layers=2, per_layer_config={i: {key: 4 + i} for i in range(2)})
    assert f"its layers differ in {key}" in refusal(config)


def test_the_language_model_of_a_multimodal_checkpoint_converts_as_its_refusal_says(tmp_path: Path) -> None:
    text = tiny.tiny_config("llama").to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = CONFIG_MAPPING["llava"](text_config=text, vision_config={"model_type": "clip_vision_model", **vision})
    whole = AutoModelForImageTextToText.from_config(config)
    assert "load its language_model and lm_head into" in refusal(config)
    alone = AutoModelForCausalLM.from_config(config.text_config)
    alone.base_model.load_state_dict(whole.base_model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    alone.save_pretrained(tmp_path / "text")
    kv = config.text_config.num_key_value_heads
    convert(tmp_path / "text", tmp_path / "out", num_key_value_heads=kv)
    assert torch.allclose(tiny.logits(tiny.loaded(tmp_path / "out")), tiny.logits(whole.eval()), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_guess_never_claims_more_than_the_table_knows(name: str) -> None:
    """Every table entry as if the table lacked it: refused, or guessed with the same heads and no freedom beyond."""
    if not tiny.available(name):
        pytest.skip("not in the installed transformers")
    model_type = tiny.model_type_of(name)
    family, model = FAMILIES[model_type], tiny.tiny_model(name)
    config, state = model.config, model.state_dict()
    if name not in GUESSED and (reason := declined(config, state)):
        assert "not in Rehead's table" in reason
        return
    guess = guess_family(config, state)
    assert guess.guessed
    assert guess.attention_layers(config) == family.attention_layers(config)
    for layer in family.attention_layers(config):
        inferred, known = (split(each, config, layer, state) for each in (guess, family))
        assert known.fixed_values <= inferred.fixed_values
        a, b = inferred.tensors() | inferred.extras, known.tensors() | known.extras
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
        mine, true = key_freedom(inferred), key_freedom(known)
        if len(known.pairs):
            assert torch.equal(inferred.pairs, known.pairs)
            assert not (mine.pair_rotates & ~true.pair_rotates).any()
            assert not (mine.pair_scales & ~true.pair_scales).any()
        order = ("none", "orthogonal", "any")
        if len(inferred.free_dims()):
            assert order.index(mine.rest) <= order.index(true.rest)


@pytest.mark.parametrize(
    ("name", "pairing"), [("llama", "half"), ("cohere", "interleaved"), ("glm", "interleaved"), ("gpt2", None)]
)
def test_pairing_is_probed(name: str, pairing: str | None) -> None:
    assert probe_pairing(tiny.tiny_config(name)) == pairing


@pytest.mark.parametrize("name", ["afmoe", "qwen3_next", "nanochat", "bitnet", "falcon", "mpt-like"])
def test_guess_refuses_what_it_does_not_understand(name: str) -> None:
    config = tiny.tiny_config("llama" if name == "mpt-like" else name)
    tensors = {"transformer.blocks.0.attn.Wqkv.weight": torch.zeros(1)} if name == "mpt-like" else on_meta(config)
    with pytest.raises(UnsupportedError, match="not in Rehead's table"):
        guess_family(config, tensors)


def test_guess_refuses_lying_shapes() -> None:
    config = tiny.tiny_config("llama")
    tensors = on_meta(config)
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.k_proj\.weight 3x64"):
        guess_family(config, tensors | {name: torch.empty(3, 64)})
    wide = {key: torch.empty(info.shape[0], 128) for key, info in tensors.items() if key.endswith("q_proj.weight")}
    with pytest.raises(UnsupportedError, match="128 wide, not 64 as its hidden states"):
        guess_family(config, tensors | wide)
    vars(config)["hidden_size"] = None
    with pytest.raises(UnsupportedError, match="no hidden_size"):
        guess_family(config, tensors)
    config = tiny.tiny_config("llama")
    with pytest.raises(UnsupportedError, match="secret"):
        guess_family(config, tensors | {"model.layers.0.self_attn.secret": torch.empty(8)})


@pytest.mark.parametrize("name", ["llama", "cohere", "olmo2"])
def test_guessed_models_convert_and_wrong_guesses_do_not(name: str, tmp_path: Path, monkeypatch) -> None:
    """A guess is proved on numbers before it is used: a wrong pairing is result out there."""
    tiny.save_tiny(name, tmp_path / "source")
    known = convert(tmp_path / "source", tmp_path / "known", num_key_value_heads=2, method="procrustes").out
    monkeypatch.delitem(FAMILIES, name)
    guessed = convert(tmp_path / "source", tmp_path / "guessed", num_key_value_heads=2, method="procrustes").out
    wanted, result = load_file(known / "model.safetensors"), load_file(guessed / "model.safetensors")
    assert all(torch.equal(wanted[key], result[key]) for key in wanted)
    if name == "llama":
        monkeypatch.setattr("rehead.models.families.guess.probe_pairing", lambda config: "interleaved")
        with pytest.raises(UnsupportedError, match="llama"):
            convert(tmp_path / "source", tmp_path / "wrong", num_key_value_heads=2, method="procrustes")
        assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("name", ["llama", "nemotron_h"])
def test_guessed_models_are_found_in_their_class_however_checkpoints_spell_them(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    """A base model saved alone has no first part; Nemotron-H is saved with another than its class has."""
    model = tiny.tiny_model(name)
    (model.base_model if name == "llama" else model).save_pretrained(tmp_path / "source")
    known = convert(tmp_path / "source", tmp_path / "known", num_key_value_heads=2).out
    monkeypatch.delitem(FAMILIES, name)
    guess = guess_family(model.config, load_file(tmp_path / "source" / "model.safetensors"))
    assert guess.layer == "model.layers.{i}."
    guessed = convert(tmp_path / "source", tmp_path / "guessed", num_key_value_heads=2).out
    wanted, result = load_file(known / "model.safetensors"), load_file(guessed / "model.safetensors")
    assert all(torch.equal(wanted[key], result[key]) for key in wanted)


def test_prefixes_as_checkpoints_spell_them() -> None:
    llama, hybrid = FAMILIES["llama"], FAMILIES["nemotron_h"]
    assert with_checkpoint_prefix(llama, {"model.layers.0.x": 0}).prefix(3) == "model.layers.3.self_attn."
    assert with_checkpoint_prefix(llama, {"layers.0.x": 0}).prefix(3) == "layers.3.self_attn."
    assert with_checkpoint_prefix(hybrid, {"backbone.layers.0.x": 0}).prefix(1) == "backbone.layers.1.mixer."
    assert with_checkpoint_prefix(llama, {"other.0.x": 0}) is llama


def test_falcon_counts() -> None:
    """Old decoders by their switch, new ones by their count, and serial blocks not between one and all."""
    family = FAMILIES["falcon"]
    old = tiny.tiny_config("falcon-rw")
    assert family.num_kv_heads(old) == tiny.HEADS
    assert "serial" in family.refusal(old, 2)
    assert family.refusal(old, 1) is None
    raw = old.to_dict()
    family.set_kv(raw, 1)
    assert family.num_kv_heads(AutoConfig.for_model(**raw)) == 1
    parallel = tiny.tiny_config("falcon-mha")
    raw = parallel.to_dict()
    family.set_kv(raw, 2)
    changed = AutoConfig.for_model(**raw)
    assert (family.num_kv_heads(changed), changed.num_ln_in_parallel_attn) == (2, 1)


@pytest.mark.parametrize("deep", [{"num_hidden_layers": 10**12}, {"text_config": {"num_hidden_layers": 10**12}}])
def test_layers_without_end_are_refused_before_they_are_built(deep) -> None:
    with pytest.raises(UnsupportedError, match="num_hidden_layers is more than 10,000, which no model has"):
        resolve_config({"model_type": "llama", **deep}, "here")


def test_what_is_counted_for_each_layer_is_no_number_of_layers() -> None:
    raw = {"model_type": "gemma3n_text", "vocab_size_per_layer_input": 262_144, "num_hidden_layers": 2}
    assert resolve_config(raw, "here").vocab_size_per_layer_input == 262_144
