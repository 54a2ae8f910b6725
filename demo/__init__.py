"""Real models through fastattn: ``python -m demo`` from the root of the repository."""
