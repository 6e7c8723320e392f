"""Tasks made from a seed: needles, passkeys, common words."""
