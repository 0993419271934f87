"""The pure floor: nouns and decisions. Nothing here waits, logs, reads a clock or touches a wire."""
