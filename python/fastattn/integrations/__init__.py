"""fastattn inside other frameworks: one module a framework, imported only when asked for."""
