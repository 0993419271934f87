"""The extension of the pack antone: the verb `archive`."""
