"""Methods that elastic weight consolidation is compared with."""
