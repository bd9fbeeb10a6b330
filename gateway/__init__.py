"""The HTTP door: check, admit, enqueue, wait, answer."""
