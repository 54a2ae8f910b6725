"""How fast fastattn is, beside its peers and the machine's own limits: ``python -m bench prefill``."""
