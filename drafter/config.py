"""Shape and provenance of a drafter (what its ``config.json`` holds), and how trees are grown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

KINDS = {
    "specblock": "LlamaForCausalLMSpecBlock",
    "eagle3": "LlamaForCausalLMEagle3",
    "parallel": "SpecblockParallelHeads",
}
"""Kind of drafter -> name under ``architectures`` in its ``config.json`` (the published one where there is one)."""

# Our field -> key used by the published checkpoints, where they differ.
_PUBLISHED_KEYS = {"num_slots": "diffspec_draft_token_num"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """Architecture of the drafter and the target it belongs to.

    Attributes:
        kind: key of :data:`KINDS`.
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
    kind: str = "specblock"
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
        if self.kind not in KINDS:
            raise ValueError(f"drafter config: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.num_slots < 1:
            raise ValueError("drafter config: diffspec_draft_token_num must be at least 1")
        if self.kind == "eagle3" and (self.num_slots, self.num_hidden_layers) != (1, 1):
            raise ValueError("drafter config: an EAGLE-3 drafter has one layer and predicts one token per forward")
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
        fields = {_PUBLISHED_KEYS.get(name, name): value for name, value in asdict(self).items() if name != "kind"}
        fields["feature_layers"] = list(self.feature_layers)
        return {"architectures": [KINDS[self.kind]], "model_type": "llama", "specblock_format": 1, **fields}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DrafterConfig:
        """Reads ``config.json``; keys that this project does not use are ignored.

        Raises:
            ValueError: of no known kind, or a needed key is missing.
        """
        kinds = {architecture: kind for kind, architecture in KINDS.items()}
        named = data.get("architectures", [KINDS["specblock"]])
        if len(named) != 1 or named[0] not in kinds:
            raise ValueError(f"not a drafter: architectures is {named}, want one of {', '.join(kinds)}")
        fields = {
            name: data[_PUBLISHED_KEYS.get(name, name)]
            for name in cls.__dataclass_fields__
            if _PUBLISHED_KEYS.get(name, name) in data
        }
        fields["kind"] = kinds[named[0]]
        if fields["kind"] == "eagle3":
            fields.setdefault("num_slots", 1)
            own_layers = (data.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
            fields.setdefault("feature_layers", own_layers or ())
        fields.setdefault("num_key_value_heads", fields.get("num_attention_heads", 1))
        fields.setdefault("draft_vocab_size", fields.get("vocab_size", 1))
        fields.setdefault("head_dim", fields.get("hidden_size", 0) // max(1, fields.get("num_attention_heads", 1)))
        fields["feature_layers"] = tuple(fields.get("feature_layers", ()))
        # Transformers 5 keeps the base under rope_parameters.
        fields.setdefault("rope_theta", float((data.get("rope_parameters") or {}).get("rope_theta", 10000.0)))
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
        beam: ceiling of the fan-out of block 1's first slot; fan-out of every slot where no rank head decides.
        fan_out: fan-out per rank class (greedy token included); 0 stops there; method reference section 3.
        rank_head: let the rank head choose fan-outs; False takes ``beam`` at every slot.
        first_caps: (greedy probability, fan-out) pairs that narrow block 1's first slot, highest probability first.
        other_caps: the same for every other slot.
        merge: nodes with the same token path are one node (method reference 4.3).
        shared_noise: rank proposals of sampled requests by ``log q + Gumbel`` with the target's own noise.
        noise_scale: spread of the target's choice around the perturbed draft score, in nats; smaller trusts the
            drafter more.
        pair_weight: how much it counts which token follows which within a block, in parts of what was counted; 0: not.
        published_refresh: pair features and tokens as the published code does (method reference 9.1-9.3), for
            comparisons and for checkpoints that were tuned with it.
    """

    blocks: int = 2
    leaf_cap: int = 8
    node_budget: int = 31
    beam: int = 10
    fan_out: tuple[int, ...] = (2, 4, 6, 4)
    rank_head: bool = True
    first_caps: tuple[tuple[float, int], ...] = ((0.9, 3), (0.8, 5), (0.6, 8))
    other_caps: tuple[tuple[float, int], ...] = ((0.95, 2), (0.85, 3))
    merge: bool = True
    shared_noise: bool = True
    noise_scale: float = 1.0
    pair_weight: float = 0.5
    published_refresh: bool = False

    def __post_init__(self) -> None:
        for name in ("blocks", "leaf_cap", "node_budget", "beam"):
            if getattr(self, name) < 1:
                raise ValueError(f"drafter.{name}: must be at least 1")
        if self.noise_scale <= 0:
            raise ValueError("drafter.noise_scale: must be above 0")
        if not 0 <= self.pair_weight <= 1:
            raise ValueError("drafter.pair_weight: must be between 0 and 1")
        if not self.fan_out or min(self.fan_out) < 0 or max(self.fan_out) > self.beam:
            raise ValueError("drafter.fan_out: entries must be between 0 and drafter.beam")
        for name in ("first_caps", "other_caps"):
            if any(cap < 1 for _, cap in getattr(self, name)):
                raise ValueError(f"drafter.{name}: fan-outs must be at least 1")


def published_settings(kind: str) -> DraftSettings:
    """The published tree of a kind: SpecBlock ``1,2,10,90`` (method reference 2.3), EAGLE-3 ``1,7,10,60`` (section 8).

    EAGLE-3's depth 7 is one forward over the new positions and seven more: eight blocks here.
    """
    if kind == "eagle3":
        return DraftSettings(blocks=8, leaf_cap=10, node_budget=60, beam=10, shared_noise=False, pair_weight=0.0)
    if kind == "parallel":
        return DraftSettings(blocks=1, leaf_cap=10, node_budget=60, beam=10, shared_noise=False, pair_weight=0.0)
    # Every node of block 1 is a leaf: at most 10 + 3 * 6.
    return DraftSettings(
        blocks=2, leaf_cap=28, node_budget=90, beam=10, shared_noise=False, pair_weight=0.0, published_refresh=True
    )
