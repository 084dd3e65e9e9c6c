"""The target model: one transformers forward over a tree (or a chain) of new rows per slot.

Legend: B requests, R new rows per request, M rows whose logits are wanted, T visible tokens, H hidden size, F = 3H
fused feature size, V vocabulary, P prompt tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specblock.cuda_ext.linear import PackedLinear, round_weights
from specblock.cuda_ext.transfer import on_device
from specblock.verifier import loading
from specblock.verifier.fused import FusedLayers, can_fuse
from specblock.verifier.kv_cache import TargetCache, host_list
from specblock.verifier.native import takes_slots, use_native_layers
from specblock.verifier.native_stack import NativeStack, can_stack
from specblock.verifier.slots import MOST_ROWS, SlotForward, use_slot_attention

_CHECK_TOKENS = 4
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What one forward yields.

    Attributes:
        logits: [B, M, V] raw logits of the rows asked for (all R rows by default), in the model's dtype.
        features: [B, R, F] residual stream after the feature layers, concatenated, no final norm.
    """

    logits: Tensor
    features: Tensor


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """The published rule (1, N/2-1, N-4) for N >= 12 decoder layers, (0, N//2-1, N-2) below.

    Source: method reference 1.1; design section 4.
    """
    if num_layers >= 12:
        return 1, num_layers // 2 - 1, num_layers - 4
    return 0, num_layers // 2 - 1, num_layers - 2


class TargetModel:
    """A frozen causal language model that verifies draft trees.

    Build it with ``load`` or ``from_model``. One forward at a time: the object is not thread-safe.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        feature_layers: tuple[int, ...] | None,
        model_name: str,
        native: bool,
        graphs: bool = True,
        by_slot: bool | None = None,
        coarse: bool = False,
    ) -> None:
        loading.check_model(model)
        self._model = model.eval().requires_grad_(False)
        if coarse and native:
            round_weights(model)
        expected = self._own_logits()
        self.native = native and use_native_layers(model, coarse)
        self.coarse = self.native and coarse
        """Whether rows are rounded to bfloat16 before they are multiplied."""
        self._fused = FusedLayers(model) if native and not self.native and can_fuse(model) else None
        self._decoder = model.model
        self._head = model.get_output_embeddings()
        self._cache_argument = loading.cache_argument(self._decoder)
        self._captured: dict[int, Tensor] = {}
        self._capturing = False
        config = model.config
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.num_layers: int = len(self._decoder.layers)
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = self._head.out_features
        self.max_context_tokens: int = config.max_position_embeddings
        self.eos_token_ids: frozenset[int] = loading.eos_token_ids(model, tokenizer)
        self.fingerprint: str = loading.fingerprint(model, tokenizer)
        self.feature_layers = self._checked_layers(feature_layers)
        self._hook_features()
        self.by_slot: SlotForward | None = None
        """The forward of decode cycles, where it is another one than that of prompts."""
        can = takes_slots(model) if self.native else self.device.type == "cuda" or by_slot is True
        wants_slots = can and by_slot is not False
        reason = self._fusing_fails(expected, wants_slots)
        if reason:
            self._unfuse(reason)
        self._check_forward(expected)
        if wants_slots:
            self.by_slot = self._checked_slots(expected, graphs)

    @classmethod
    def load(
        cls,
        path_or_id: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        feature_layers: tuple[int, ...] | None = None,
        local_files_only: bool = False,
        native: bool = True,
        graphs: bool = True,
        coarse: bool = False,
    ) -> TargetModel:
        """Opens a target from a Hugging Face directory or hub id.

        Args:
            path_or_id: directory in Hugging Face layout, or a hub id.
            dtype: precision of weights, cache and forward.
            device: where to put it.
            feature_layers: three decoder layer indices; None uses ``default_feature_layers``.
            local_files_only: never ask the hub.
            native: put native layers in place where there are some (float32 on a CPU; fused ones on CUDA devices);
                False keeps ``transformers_model`` as transformers runs it.
            graphs: record the forwards of decode cycles as CUDA graphs, on a CUDA device.
            coarse: with native layers on a CPU and ``dtype`` float32: weights are rounded to bfloat16 numbers, and rows
                are before they are multiplied; sums and everything else are float32. Faster where
                ``cuda_ext.linear.rounds_rows``; elsewhere rows keep their bits.

        Raises:
            ValueError: directory missing, architecture incompatible, or feature layers invalid.
        """
        model, tokenizer = loading.open_pretrained(
            path_or_id, dtype=dtype, device=device, local_files_only=local_files_only
        )
        target = cls(model, tokenizer, feature_layers, path_or_id, native, graphs, coarse=coarse)
        if len(tokenizer) > target.vocab_size:
            raise ValueError(
                f"target model {path_or_id}: the tokenizer has {len(tokenizer)} tokens, the model {target.vocab_size}"
            )
        return target

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any = None,
        feature_layers: tuple[int, ...] | None = None,
        native: bool = False,
        *,
        graphs: bool = True,
        by_slot: bool | None = None,
        coarse: bool = False,
    ) -> TargetModel:
        """Wraps a transformers causal language model that is already in memory.

        Args:
            model: the model; it is changed as the other arguments say.
            tokenizer: its tokenizer, if there is any.
            feature_layers: see ``load``.
            native: see ``load``.
            graphs: see ``load``.
            by_slot: run decode cycles through ``SlotForward``; None does so on CUDA devices and with native layers.
            coarse: see ``load``.
        """
        name = model.config.name_or_path or type(model).__name__
        return cls(model, tokenizer, feature_layers, name, native, graphs, by_slot, coarse)

    @property
    def fused(self) -> bool:
        """Whether the decoder layers are ours, for CUDA devices; see ``fused.py``."""
        return self._fused is not None

    @property
    def feature_size(self) -> int:
        """F: size of one fused feature."""
        return len(self.feature_layers) * self.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and features."""
        return self.embedding.dtype

    @property
    def _half(self) -> bool:
        """Whether it computes in half precision."""
        return self.coarse or self.dtype.itemsize < 4

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def embedding(self) -> Tensor:
        """[V, H] input embedding, frozen."""
        weight: Tensor = self._model.get_input_embeddings().weight
        return weight

    @property
    def output_head(self) -> Tensor:
        """Output head weight [V, H]."""
        if isinstance(self._head, PackedLinear):
            return self._head.packed.unpacked()
        weight: Tensor = self._head.weight
        return weight.detach()

    @property
    def final_norm(self) -> Tensor:
        """Weight [H] of the final norm."""
        weight: Tensor = self._model.model.norm.weight
        return weight.detach()

    @property
    def transformers_model(self) -> Any:
        """The transformers model itself, for comparisons with its own generation modes."""
        return self._model

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self._model.config

    def new_cache(self, num_slots: int, capacity_tokens: int) -> TargetCache:
        """Storage for ``num_slots`` requests; the capacity must cover the longest prefix plus the rows of one tree."""
        config = self._model.config
        heads: int = config.num_attention_heads
        return TargetCache(
            num_layers=self.num_layers,
            num_slots=num_slots,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            capacity_tokens=capacity_tokens,
            head_dim=getattr(config, "head_dim", None) or self.hidden_size // heads,
            dtype=self.dtype,
            device=self.device,
            padding_rows=MOST_ROWS if self.by_slot is not None and not self.native else 0,
        )

    @torch.no_grad()
    def forward(
        self,
        cache: TargetCache,
        slots: Sequence[int] | Tensor,
        tokens: Tensor,
        *,
        tree_mask: Tensor | None = None,
        depth: Tensor | None = None,
        logits_rows: Tensor | None = None,
    ) -> TargetOutput:
        """Runs R new rows per slot on top of each committed prefix; their keys and values are staged, not committed.

        Where it runs as a CUDA graph, the next forward over the same cache overwrites what this one returned.

        Args:
            cache: where the prefixes are.
            slots: [B] distinct slots (host values preferred: a device tensor is waited for).
            tokens: int64 [B, R].
            tree_mask: bool [B, R, R], which new rows each row sees; None is a causal chain. A row always sees itself;
                padding rows should be seen by no other.
            depth: int64 [B, R], distance from the prefix's end, which gives the position; None counts up.
            logits_rows: int64 [B, M], rows whose logits to compute; None is all of them, M = 0 is none.

        Raises:
            ValueError: a slot has no room for R rows.
        """
        batch, rows = tokens.shape
        slot_list = host_list(slots)
        holds = self.native or cache.padding_rows  # a cache for slots
        by_slot = self.by_slot if holds and logits_rows is None and rows <= MOST_ROWS else None
        if by_slot is not None and self.native and tree_mask is not None and depth is not None:
            # Native layers let every row see itself.
            depth, tree_mask = depth.expand(batch, -1), tree_mask.expand(batch, -1, -1)
            return TargetOutput(*by_slot(cache, slot_list, tokens, depth, tree_mask))
        order_R = torch.arange(rows, device=self.device)
        visible_BRR = order_R <= order_R[:, None] if tree_mask is None else tree_mask
        # Every row sees itself, so a padding row is never a softmax over nothing.
        visible_BRR = (visible_BRR | torch.eye(rows, dtype=torch.bool, device=self.device)).expand(batch, -1, -1)
        depth_BR = (order_R if depth is None else depth).expand(batch, -1)
        if by_slot is not None:
            return TargetOutput(*by_slot(cache, slot_list, tokens, depth_BR, visible_BRR))
        length_B = on_device(cache.stage(slot_list, rows), self.device)
        assert cache.staging is not None
        hidden_BRH, features = self._run(
            tokens,
            _visibility(visible_BRR, length_B, cache.staging.visible_tokens),
            length_B[:, None] + depth_BR,
            cache.as_transformers,
        )
        if logits_rows is not None:
            hidden_BRH = hidden_BRH[torch.arange(batch, device=self.device)[:, None], logits_rows.to(self.device)]
        return TargetOutput(self._head(hidden_BRH), features)

    @property
    def num_graphs(self) -> int:
        """Recorded forwards."""
        return 0 if self.by_slot is None else self.by_slot.num_graphs

    @property
    def num_graph_failures(self) -> int:
        """Forwards that could not be recorded and run without."""
        return 0 if self.by_slot is None else self.by_slot.num_failures

    def use_graphs(self, cache: TargetCache) -> None:
        """Records forwards over a cache that will serve for long, where there are graphs: each when first needed."""
        if self.by_slot is not None:
            self.by_slot.use_graphs(cache)

    def record_graphs(self, cache: TargetCache, most_rows: int) -> None:
        """Records them now: those over an empty cache with up to so many rows per slot."""
        self.use_graphs(cache)
        graphs = None if self.by_slot is None else self.by_slot.graphs_over(cache)
        for batch, rows in [] if graphs is None else graphs.sizes_up_to(most_rows):
            fitting = min(rows, cache.capacity_tokens)  # one that is filled up to ``rows``
            tokens = torch.zeros(batch, fitting, dtype=torch.int64, device=self.device)
            self.forward(cache, list(range(batch)), tokens)

    @torch.no_grad()
    def prefill(
        self, cache: TargetCache, slot: int, tokens: Sequence[int] | Tensor, chunk_tokens: int = 256
    ) -> tuple[Tensor, Tensor]:
        """Feeds a run of known tokens in chunks and commits them.

        Args:
            cache: where to append them, behind what the slot already holds.
            slot: the slot.
            tokens: P >= 1 token ids.
            chunk_tokens: largest number of rows per forward.

        Returns:
            Features [P, F] and the raw logits [V] after the last token.
        """
        features: list[Tensor] = []
        logits = torch.empty(0)
        token_P = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        chunks = torch.split(token_P, chunk_tokens)
        for index, chunk in enumerate(chunks):
            wanted = [[len(chunk) - 1]] if index == len(chunks) - 1 else [[]]
            rows_1M = torch.tensor(wanted, dtype=torch.int64, device=self.device)
            output = self.forward(cache, [slot], chunk[None], logits_rows=rows_1M)
            cache.advance([slot], [len(chunk)])
            features.append(output.features[0])
            logits = output.logits[0]
        return torch.cat(features), logits[0]

    def _run(
        self, tokens_BR: Tensor, mask_B1RT: Tensor, position_BR: Tensor, past: Any, **others: Any
    ) -> tuple[Tensor, Tensor]:
        self._capturing = True
        try:
            hidden_BRH: Tensor = self._decoder(
                input_ids=tokens_BR,
                attention_mask=mask_B1RT,
                position_ids=position_BR,
                use_cache=True,
                **{self._cache_argument: past},
                **others,
            ).last_hidden_state
            return hidden_BRH, torch.cat([self._captured[index] for index in self.feature_layers], dim=-1)
        finally:
            self._capturing = False
            self._captured.clear()

    def _hook_features(self) -> None:
        for index in self.feature_layers:
            self._decoder.layers[index].register_forward_hook(self._capture(index))

    def _capture(self, index: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if self._capturing:
                self._captured[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def _checked_layers(self, layers: tuple[int, ...] | None) -> tuple[int, ...]:
        chosen = default_feature_layers(self.num_layers) if layers is None else tuple(layers)
        if len(chosen) != 3 or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= self.num_layers:
            raise ValueError(
                f"feature layers must be three distinct ascending indices below {self.num_layers}, got {chosen}"
            )
        return chosen

    def _check_tokens(self) -> Tensor:
        tokens: Tensor = torch.arange(_CHECK_TOKENS, device=self.device)[None] % self._model.config.vocab_size
        return tokens

    @torch.no_grad()
    def _own_logits(self) -> Tensor:
        logits: Tensor = self._model(input_ids=self._check_tokens(), use_cache=False).logits.float()
        return logits

    @torch.no_grad()
    def _check_forward(self, expected: Tensor) -> None:
        """Holds our forward to the model's own, so a family that scales logits or masks differently is refused."""
        logits = self.forward(self.new_cache(1, _CHECK_TOKENS), [0], self._check_tokens()).logits.float()
        if not _agree(logits, expected, self._half):
            name = type(self._model).__name__
            raise ValueError(f"incompatible architecture: {name} computes its logits in a way the verifier does not")

    def _fusing_fails(self, expected: Tensor, wants_slots: bool) -> str:
        """Why fused layers cannot stay; empty if they can, or if there are none."""
        if self._fused is None:
            return ""
        try:
            self._check_forward(expected)
        except (ValueError, TypeError, RuntimeError) as error:
            return str(error).splitlines()[0]
        return self._slots_fail(expected) if wants_slots else ""

    def _unfuse(self, reason: str) -> None:
        assert self._fused is not None
        log.warning("%s keeps its own layers, the fused ones fail: %s", type(self._model).__name__, reason)
        self._fused.put_back()
        self._fused = None
        self._hook_features()

    def _checked_slots(self, expected: Tensor, graphs: bool) -> SlotForward | None:
        """The forward over slots, if this model's attention is one that it can do."""
        reason = self._slots_fail(expected)
        if reason:
            log.warning(
                "%s does not attend by slot (%s): masks instead, without graphs", type(self._model).__name__, reason
            )
            return None
        self._attend_by_slot()
        return self._slot_forward(graphs)

    def _slot_forward(self, graphs: bool) -> SlotForward:
        stacks = self.native and can_stack(self._model)
        stack = NativeStack(self._decoder, self.feature_layers) if stacks else None
        return SlotForward(self._run, self._head, self.device, graphs, stack)

    def _attend_by_slot(self) -> None:
        if not self.native:  # native layers do so by themselves
            use_slot_attention(self._model)

    @torch.no_grad()
    def _slots_fail(self, expected: Tensor) -> str:
        """Why this model cannot attend by slot; empty if it can. Leaves everything as it was."""
        before = self._model.config._attn_implementation
        self._attend_by_slot()
        self.by_slot = self._slot_forward(False)
        try:
            tokens, prefix = self._check_tokens(), _CHECK_TOKENS // 2
            cache = self.new_cache(2, _CHECK_TOKENS)
            self.prefill(cache, 1, tokens[0, :prefix])
            logits = self.forward(cache, [1], tokens[:, prefix:]).logits.float()
            return "" if _agree(logits, expected[:, prefix:], self._half) else "its logits differ"
        except (ValueError, TypeError, RuntimeError) as error:
            return str(error).splitlines()[0]
        finally:
            self.by_slot = None
            self._model.config._attn_implementation = before


def _agree(logits: Tensor, expected: Tensor, half: bool) -> bool:
    """Two attention kernels round differently, more so in half precision; a wrong scale or mask is far outside this."""
    bound = 0.04 if half else 0.02
    return torch.allclose(logits, expected, rtol=bound, atol=bound * float(expected.abs().max()))


def _visibility(visible_BRR: Tensor, length_B: Tensor, visible_tokens: int) -> Tensor:
    """bool [B, 1, R, T]: the whole committed prefix, then the staged rows each row may see."""
    rows = visible_BRR.shape[1]
    column_BT = torch.arange(visible_tokens, device=length_B.device) - length_B[:, None]
    staged_BRT = visible_BRR.gather(2, column_BT.clamp(0, rows - 1)[:, None, :].expand(-1, rows, -1))
    staged_BRT &= (column_BT < rows)[:, None, :]
    return (staged_BRT | (column_BT < 0)[:, None, :])[:, None]
