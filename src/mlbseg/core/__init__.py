"""The algorithm as pure functions on tensors: no files, no Lightning, usable in anyone's own loop."""
