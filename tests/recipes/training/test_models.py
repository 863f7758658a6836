"""Other architectures, adapters, and checkpoints that keep weights in another form than memory does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
)

from rehead.benchmarks.tiny import tiny_model
from rehead.checkpoints.manifest import verify_files
from rehead.data.tokens import load_tokenizer
from rehead.errors import UnsupportedError, UsageError
from rehead.recipes import uptrain
from rehead.recipes.training.models import load, open_checkpoint
from rehead.recipes.training.optimizer import choose
from rehead.recipes.training.output import changed_tensors, plan_output, sketched, trained_tensors

_SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}


def _models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "mixtral": MixtralForCausalLM(MixtralConfig(**_SIZES, **_HEADS, num_local_experts=4)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**_SIZES, **_HEADS, final_logit_softcapping=30.0)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    }


@pytest.mark.parametrize("kind", ["mixtral", "gemma2", "gpt2"])
def test_other_architectures_train_and_load_again(tiny, tmp_path: Path, kind: str) -> None:
    _models()[kind].to(torch.bfloat16).save_pretrained(tmp_path / "model")
    load_tokenizer(tiny.teacher).save_pretrained(tmp_path / "model")
    events: list[dict] = []
    uptrain(tmp_path / "model", tmp_path / "out", **tiny.options(loss="ce"), on_event=events.append)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < 0.8 * losses[0]
    verify_files(tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    # The same tensors under the same names in the same dtype, though memory may hold them merged.
    assert {name: (w.shape, w.dtype) for name, w in before.items()} == {
        name: (w.shape, w.dtype) for name, w in after.items()
    }
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def test_adapters_are_merged(tiny, tmp_path: Path) -> None:
    events: list[dict] = []
    options = tiny.options(lora_rank=4, train="attention", eval_data=[tiny.held], tokens=8192, learning_rate=2e-2)
    uptrain(tiny.student, tmp_path / "out", **options, on_event=events.append)
    figures = [event for event in events if event["event"] == "evaluation"]
    assert figures[-1]["kl"] < 0.8 * figures[0]["kl"]
    assert events[0]["trained_parameters"] == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 8))
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny.student, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        change = weight - before[name]
        if "self_attn" in name:
            assert torch.linalg.matrix_rank(change, atol=1e-5) == 4, name
        else:
            assert not change.any(), name
    # Merged, it computes what the last evaluation saw.
    from rehead.recipes.training.losses import StudentWithLoss
    from rehead.recipes.training.options import UptrainOptions
    from rehead.recipes.training.processes import join_processes
    from rehead.recipes.training.texts import evaluate_held_out, held_out_windows

    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", tiny.teacher))
    text = held_out_windows(
        tiny.held,
        open_checkpoint(str(tmp_path / "out")),
        load_tokenizer(tmp_path / "out"),
        UptrainOptions.parse(options),
    )
    found = evaluate_held_out(StudentWithLoss(student, teacher), text, join_processes("cpu"), 8)
    assert found["kl"] == pytest.approx(figures[-1]["kl"], rel=1e-4)


def test_adapters_need_a_linear_layer(tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--train norms chooses no linear layer"):
        uptrain(tiny.student, tmp_path / "out", **tiny.options(lora_rank=4, train="norms"))


def test_another_vocabulary_is_refused(tiny, tmp_path: Path) -> None:
    from rehead.recipes.scratch import NewModel, new_model

    words = [f"other words altogether, {i} of them, and {i * i} more" for i in range(200)]
    shape = NewModel(vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=4)  # fmt: skip
    new_model(tmp_path / "other", words, shape)
    with pytest.raises(UsageError, match=r"different vocabularies .300 and 280 tokens, token"):
        uptrain(tiny.student, tmp_path / "out", teacher=str(tmp_path / "other"), **tiny.options())
    assert not (tmp_path / ".out.rehead-training").exists()


def test_models_that_cannot_be_trained(tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        uptrain(tmp_path / "nothing", tmp_path / "out", **tiny.options())
    with pytest.raises(UsageError, match="OUT is the source itself"):
        uptrain(tiny.student, tiny.student, overwrite=True, **tiny.options())
    folder = tmp_path / "quantised"
    folder.mkdir()
    for path in tiny.student.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UnsupportedError, match="is quantised"):
        uptrain(folder, tmp_path / "out", **tiny.options())
    (folder / "config.json").write_text(json.dumps(T5Config().to_dict()))
    with pytest.raises(UnsupportedError, match="is an encoder-decoder"):
        uptrain(folder, tmp_path / "out", **tiny.options())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="tokenizer cannot be loaded"):
        uptrain(folder, tmp_path / "out", teacher=str(tiny.teacher), **tiny.options())


@pytest.mark.slow
def test_compiled_layers_train_alike(tiny, tmp_path: Path) -> None:
    curves = []
    for compiled in (False, True):
        events: list[dict] = []
        uptrain(tiny.student, tmp_path / str(compiled), **tiny.options(compile=compiled), on_event=events.append)
        curves.append([event["loss"] for event in events if event["event"] == "step"])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def _saved(model, tiny, folder: Path) -> Path:
    model.save_pretrained(folder)
    load_tokenizer(tiny.teacher).save_pretrained(folder)
    return folder


def test_a_teacher_that_sees_other_documents_is_refused(tiny, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32}
    opt = OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=32, max_position_embeddings=64))
    teacher = _saved(opt, tiny, tmp_path / "opt")
    with pytest.raises(UnsupportedError, match=r"opt: packed documents see each other.*--packing joined"):
        uptrain(tiny.student, tmp_path / "out", **tiny.options(teacher=str(teacher)))
    joined = tiny.options(teacher=str(teacher), packing="joined", tokens=512)
    assert uptrain(tiny.student, tmp_path / "out", **joined).steps == 1


def test_rows_longer_than_a_model_has_positions_for(tiny, tmp_path: Path) -> None:
    teacher = _saved(_models()["gpt2"], tiny, tmp_path / "gpt2")
    options = tiny.options(seq_length=160, tokens=640, batch_tokens=320)
    with pytest.raises(UsageError, match=r"--seq-length 160: .*gpt2 has positions for 128 tokens; give 128 or less"):
        uptrain(teacher, tmp_path / "out", **options, loss="ce")
    with pytest.raises(UsageError, match=r"--seq-length 160: .*gpt2 has positions for 128"):
        uptrain(tiny.student, tmp_path / "out", **options, teacher=str(teacher))
    rotary = _saved(_models()["gemma2"], tiny, tmp_path / "gemma2")
    events: list[dict] = []
    uptrain(rotary, tmp_path / "out", **options, loss="ce", on_event=events.append)
    notes = [event["note"] for event in events if event["event"] == "warning"]
    assert any("--seq-length 160: more than the 128 positions that this gemma2 was made for" in note for note in notes)


@pytest.mark.parametrize(("key", "kind"), [("router_jitter_noise", "mixtral"), ("layerdrop", "opt")])
def test_what_a_model_adds_in_training_only_is_off(tmp_path: Path, key: str, kind: str) -> None:
    if kind == "opt":
        shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 32}
        OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=32, layerdrop=0.9)).save_pretrained(tmp_path)
    else:
        config = MixtralConfig(**_SIZES, **_HEADS, num_local_experts=4, router_jitter_noise=0.5)
        MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = load(open_checkpoint(str(tmp_path)), torch.float32, torch.device("cpu"))
    assert getattr(model.config, key) == 0
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        still = model.eval()(ids).logits
        assert torch.equal(model.train()(ids).logits, still)


def test_parts_of_models_with_names_of_their_own() -> None:
    from rehead.benchmarks.tiny import tiny_model

    chosen = {kind: choose(tiny_model(kind), "mlp") for kind in ("granitemoeshared", "recurrent_gemma")}
    assert any("shared_mlp.input_linear" in name for name in chosen["granitemoeshared"])
    assert any("mlp_block.up_proj" in name for name in chosen["recurrent_gemma"])
    names = choose(tiny_model("recurrent_gemma"), "attention")
    assert {name.rsplit(".", 2)[1] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_data_that_is_seen_over_and_over_is_warned_of(tiny, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text(" ".join(["peace commerce treaty union"] * 40))

    def warned(tokens: int) -> list[str]:
        events: list[dict] = []
        options = tiny.options(data=[str(tmp_path / "few.txt")], tokens=tokens, batch_tokens=64, loss="ce")
        uptrain(tiny.student, tmp_path / f"out-{tokens}", **options, on_event=events.append)
        return [event["note"] for event in events if event["event"] == "warning" and "is seen" in event["note"]]

    assert not warned(64)
    (line,) = warned(2048)
    assert "give more data or fewer --tokens" in line


RENAMED = {
    # As released: the decoder of a vision-language checkpoint, read by the class for text alone.
    "qwen3_5_text": lambda name: name.replace("model.", "model.language_model.", 1),
    # A base model's names, where memory holds experts merged.
    "mixtral": lambda name: name.removeprefix("model."),
    # The class for images and text, whose head is tied to an embedding that is loaded under another name.
    "gemma3": lambda name: name,
}


@pytest.mark.parametrize("kind", RENAMED)
def test_tied_heads_whose_names_change_on_load_are_written(tiny, tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind, vocab_size=300, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = {RENAMED[kind](name): w for name, w in load_file(file).items() if name != "lm_head.weight"}
    save_file(weights, file, metadata={"format": "pt"})
    opened = open_checkpoint(str(tmp_path / "model"))
    student = load(opened, torch.float32, torch.device("cpu"))
    names = choose(student, "attention,embeddings" if kind == "gemma3" else "all")
    planned, givers = plan_output(student, opened.source, sketched(trained_tensors(student)))
    assert {entry.name for entry in planned} == set(weights)
    for name, give in givers.items():
        assert give().shape == weights[name].shape, name
    trained = {name: p.detach() + 1 for name, p in student.named_parameters() if name in names}
    _, givers = plan_output(student, opened.source, changed_tensors(student, trained))
    for name, give in givers.items():
        torch.testing.assert_close(give(), weights[name].float() + 1, msg=name)
    if kind != "gemma3":
        assert set(givers) == set(weights)


def test_what_could_not_be_written_is_refused_before_the_first_step(tiny, tmp_path: Path, monkeypatch) -> None:
    events: list[dict] = []
    monkeypatch.setattr("rehead.recipes.training.output._places", lambda tensors, source: {})
    model = tiny_model("mixtral", vocab_size=300)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(tiny.teacher).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="the checkpoint has no such tensor"):
        uptrain(tmp_path / "model", tmp_path / "out", **tiny.options(loss="ce"), on_event=events.append)
    assert not [event for event in events if event["event"] in ("start", "step")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
