"""Real models through fastattn, beside PyTorch's own attention: the command ``fastattn demo``."""
