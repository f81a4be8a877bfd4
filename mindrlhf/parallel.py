"""The parallel plan of a run: how data and model are sharded over its cards."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]  # a YAML's section -> key -> value, as config.load_settings returns them
# most chunks of log-probs in a sharded graph, which holds the operators of every chunk
MOST_CHUNKS = 64
# parallel_mode of a sharded plan: in a YAML, and once MindFormers has set its context from it
SEMI_AUTO_PARALLEL = (1, "semi_auto_parallel")


@dataclass(frozen=True)
class Plan:
    """How data and model are sharded. In parallel mode 0 every card holds the entire model.

    Attributes:
        data: data_parallel, number of groups of cards; each group processes its own rows.
        model: model_parallel, number of cards in a group; every matrix is split over them.
        is_sharded: parallel_mode 1: MindSpore shards one graph over all cards.
        keeps_vocabulary: vocab_emb_dp: embedding and output layer are not sharded.
        shards_optimizer: enable_parallel_optimizer: optimizer state is sharded over the groups.
    """
    data: int = 1
    model: int = 1
    is_sharded: bool = False
    keeps_vocabulary: bool = True
    shards_optimizer: bool = False

    @classmethod
    def of(cls, settings: Settings, cards: int = 1) -> Plan:
        """The plan of a YAML.

        Args:
            settings: as config.load_settings returns them, or a MindFormerConfig.
            cards: number of cards in parallel mode 0, which the YAML does not contain.
        """
        if settings["parallel"]["parallel_mode"] not in SEMI_AUTO_PARALLEL:
            return cls(data=cards)
        sizes = settings.get("parallel_config") or {}
        return cls(
            data=sizes.get("data_parallel", 1),
            model=sizes.get("model_parallel", 1),
            is_sharded=True,
            keeps_vocabulary=sizes.get("vocab_emb_dp", False),
            shards_optimizer=settings["parallel"].get("enable_parallel_optimizer", False))

    @property
    def cards(self) -> int:
        """Number of cards."""
        return self.data * self.model

    @property
    def vocabulary_shards(self) -> int:
        """Number of cards that the vocabulary of the output layer is sharded over."""
        return 1 if self.keeps_vocabulary else self.cards
