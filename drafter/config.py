"""Shape and provenance of a SpecBlock drafter: what its ``config.json`` holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_ARCHITECTURE = "LlamaForCausalLMSpecBlock"
# Our field -> key used by the published checkpoints, where they differ.
_PUBLISHED_KEYS = {"num_slots": "diffspec_draft_token_num"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """Architecture of the drafter and the target it belongs to.

    Attributes:
        num_slots: K, tokens predicted by one forward from one position.
        feature_layers: 0-based target decoder layers whose outputs are fused; distinct and ascending.
        target_fingerprint: fingerprint of the target it was trained on; empty for published checkpoints.
        published_mask: train later blocks with the published mask (method reference 9.4) instead of the
            position-local one, which is what decoding sees.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    num_slots: int = 4
    rank_classes: int = 4
    rank_hidden_size: int = 256
    num_ttt_blocks: int = 3
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    feature_layers: tuple[int, ...] = ()
    target_fingerprint: str = ""
    published_mask: bool = False

    def __post_init__(self) -> None:
        if self.num_slots < 1:
            raise ValueError("drafter config: diffspec_draft_token_num must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("drafter config: num_attention_heads must be a multiple of num_key_value_heads")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError("drafter config: draft_vocab_size is larger than the target's vocab_size")
        if list(self.feature_layers) != sorted(set(self.feature_layers)):
            raise ValueError(
                f"drafter config: feature_layers must be distinct and ascending, got {self.feature_layers}"
            )

    def to_json(self) -> dict[str, Any]:
        """The dictionary written to ``config.json``, with the published key names."""
        fields = {_PUBLISHED_KEYS.get(name, name): value for name, value in asdict(self).items()}
        fields["feature_layers"] = list(self.feature_layers)
        return {"architectures": [_ARCHITECTURE], "model_type": "llama", "specblock_format": 1, **fields}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DrafterConfig:
        """Reads ``config.json``; keys that this project does not use are ignored.

        Raises:
            ValueError: not a SpecBlock drafter, or a needed key is missing.
        """
        if data.get("architectures", [_ARCHITECTURE]) != [_ARCHITECTURE]:
            raise ValueError(
                f"not a SpecBlock drafter: architectures is {data['architectures']}, want [{_ARCHITECTURE!r}]"
            )
        fields = {
            name: data[_PUBLISHED_KEYS.get(name, name)]
            for name in cls.__dataclass_fields__
            if _PUBLISHED_KEYS.get(name, name) in data
        }
        fields.setdefault("head_dim", fields.get("hidden_size", 0) // max(1, fields.get("num_attention_heads", 1)))
        fields["feature_layers"] = tuple(fields.get("feature_layers", ()))
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"drafter config.json is incomplete: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSettings:
    """How trees are grown; none of it changes the emitted text.

    Attributes:
        blocks: drafter forwards per cycle (refresh and block 1 are one forward).
        leaf_cap: leaves with the best cumulative score that the next block extends.
        node_budget: draft nodes per tree, root excluded.
        beam: ceiling of the fan-out of block 1's first slot.
        fan_out: fan-out per rank class (greedy token included); method reference section 3.
        shared_noise: rank proposals of sampled requests by ``log q + Gumbel`` with the target's own noise.
        noise_scale: spread of the target's choice around the perturbed draft score, in nats; smaller trusts the
            drafter more.
    """

    blocks: int = 2
    leaf_cap: int = 8
    node_budget: int = 31
    beam: int = 10
    fan_out: tuple[int, ...] = (2, 4, 6, 4)
    shared_noise: bool = True
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("blocks", "leaf_cap", "node_budget", "beam"):
            if getattr(self, name) < 1:
                raise ValueError(f"drafter.{name}: must be at least 1")
        if self.noise_scale <= 0:
            raise ValueError("drafter.noise_scale: must be above 0")
        if not self.fan_out or min(self.fan_out) < 0 or max(self.fan_out) > self.beam:
            raise ValueError("drafter.fan_out: entries must be between 0 and drafter.beam")
