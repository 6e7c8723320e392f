"""What a packed cache keeps of each layer, sequence and site."""
