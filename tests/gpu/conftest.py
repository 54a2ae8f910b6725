"""Where tests of kernels for GPUs run: those in `interpreted` only in a process that interprets."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
