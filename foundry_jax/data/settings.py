"""What is wrong with the texts of a DataConfig, as far as that shows without the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foundry_jax.data import conversation, curriculum, filtering, mixture, pack, pair_files, split

if TYPE_CHECKING:  # it checks itself with this
    from foundry_jax.config import DataConfig


def check(config: DataConfig) -> None:
    """Raises UserError for a name, an option or a number that is none."""
    mixture.parse(config.source)
    split.parse(config.validation)
    filtering.parse(config.filters)
    conversation.parse(config.format)
    pack.parse(config.packing)
    curriculum.parse(config.curriculum)
    if config.preferences:
        pair_files.parse(config.preferences)
