"""Classes with multi-head latent attention that a conversion writes and an inspection reads; none is converted."""

from __future__ import annotations

from rehead.models.families.spec import Config, Family, Names


def _one(config: Config) -> int:
    """All heads share one latent."""
    return 1


_NAMES = Names(query="q_proj", key="kv_a_proj_with_mqa", value="kv_b_proj", output="o_proj")

LATENT: dict[str, Family] = {
    name: Family(
        name,
        names=_NAMES,
        num_kv_heads=_one,
        head_dim=lambda config: int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim),
        rotary_dims=lambda config, layer: int(config.qk_rope_head_dim),
        pairing="interleaved",
        notes="latent attention",
    )
    for name in ("deepseek_v3", "youtu")
}
"""By model type."""
