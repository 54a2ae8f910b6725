"""What can run a validated call: one module a backend."""
