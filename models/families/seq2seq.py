"""Encoder-decoders: each of a decoder block's two attentions counts as a layer here; encoders keep their heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rehead.models.families.spec import Config, Family, Names, rotary_none

T5_FILE = "modeling_rehead_t5"


@dataclass(frozen=True)
class T5Family(Family):
    """T5's decoder: layer ``2 i`` is block ``i``'s self-attention, ``2 i + 1`` its attention to the encoder."""

    def prefix(self, layer: int) -> str:
        block, cross = divmod(layer, 2)
        return self.layer.format(i=block) + ("layer.1.EncDecAttention." if cross else "layer.0.SelfAttention.")

    def attention_layers(self, config: Config) -> list[int]:
        return list(range(2 * int(config.num_decoder_layers)))


def t5_kv_heads(config: Config) -> int:
    """``num_key_value_heads`` of Rehead's class; one for each query head in transformers' T5."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_heads)


def set_t5_kv(raw: dict[str, Any], kv: int) -> None:
    """Set the count and Rehead's own class, since transformers' T5 has no number of KV heads."""
    raw.update(
        model_type="rehead_t5",
        architectures=["ReheadT5ForConditionalGeneration"],
        num_key_value_heads=kv,
        auto_map={
            "AutoConfig": f"{T5_FILE}.ReheadT5Config",
            "AutoModelForSeq2SeqLM": f"{T5_FILE}.ReheadT5ForConditionalGeneration",
        },
    )


_T5 = T5Family(
    "t5",
    layer="decoder.block.{i}.",
    attention="layer.0.SelfAttention.",
    names=Names(query="q", key="k", value="v", output="o"),
    pairing="none",
    rotary_dims=rotary_none,
    num_kv_heads=t5_kv_heads,
    set_kv=set_t5_kv,
    notes="decoder only: self- and cross-attention; carries a modelling file",
)

SEQ2SEQ: dict[str, Family] = {"t5": _T5, "rehead_t5": _T5}
