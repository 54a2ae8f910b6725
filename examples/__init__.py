"""Small programs to learn from: each trains or computes something with fastattn, and draws it."""
