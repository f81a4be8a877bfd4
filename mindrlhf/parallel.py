"""The parallel plan of a run: how its cards share the work."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """How the cards share the work. In parallel mode 0 every card holds the whole model.

    Attributes:
        data: data_parallel, groups of cards that each take their own rows.
        model: model_parallel, cards of a group, which share every matrix.
        is_sharded: parallel_mode 1: MindSpore shards one graph over all cards.
        keeps_vocabulary: vocab_emb_dp: embedding and output layer are not sharded.
        shards_optimizer: enable_parallel_optimizer: the groups share the optimizer's state.
    """
    data: int = 1
    model: int = 1
    is_sharded: bool = False
    keeps_vocabulary: bool = True
    shards_optimizer: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any], cards: int = 1) -> Plan:
        """The plan of a YAML.

        Args:
            settings: as config.load() returns them, or a MindFormerConfig.
            cards: how many cards run in parallel mode 0, where the YAML does not say.
        """
        if settings["parallel"]["parallel_mode"] != 1:
            return cls(data=cards)
        sizes = settings.get("parallel_config") or {}
        return cls(sizes.get("data_parallel", 1), sizes.get("model_parallel", 1), True, sizes.get("vocab_emb_dp", False),
                   settings["parallel"].get("enable_parallel_optimizer", False))

    @property
    def cards(self) -> int:
        """Number of cards."""
        return self.data * self.model

    @property
    def vocabulary_shards(self) -> int:
        """Over how many cards the output layer's vocabulary is sharded."""
        return 1 if self.keeps_vocabulary else self.cards
