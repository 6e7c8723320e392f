"""Text to windows of tokens: corpora, local files, data sets of the hub, padding."""
