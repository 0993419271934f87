"""The pure core: values and decisions. Nothing here waits, logs, reads a clock or does I/O."""
