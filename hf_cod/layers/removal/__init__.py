"""Other layers in a stack, with all that depends on their number or an index: removed (`skip`, `drop`), or repeated."""
