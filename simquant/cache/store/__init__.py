"""Storage of a packed cache: tokens of a site, of a sequence, of a layer."""
