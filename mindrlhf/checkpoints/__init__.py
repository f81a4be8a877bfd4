"""Files of weights: formats, shards of several cards, strict loading, resharding."""
