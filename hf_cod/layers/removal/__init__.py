"""Removal of layers: `skip` for a while and `drop` for good, with all that depends on their number or their index."""
