"""One process that works through a list and says on standard output, line by line, what it finds."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import replace
from typing import Any

MARK = "@gpu-check "  # before a line that the parent reads
DEVICE_LOST = 3  # how a process ends that can no longer use the device


def say(**message: Any) -> None:
    print(MARK + json.dumps(message), flush=True)


def main(arguments: list[str]) -> int:
    """Run the items of `--items`; ends with DEVICE_LOST where this process can no longer use the device."""
    parser = argparse.ArgumentParser()
    parser.add_argument("list", help="a name that lists.items_of knows")
    parser.add_argument("--items", required=True, help="indices into it, with commas between")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend")
    parser.add_argument("--without", default="", help="contestants that start so are left out of rows")
    options = parser.parse_args(arguments)
    from gpu_check.checkers import INSTRUMENTED, prepare_instrumented
    from gpu_check.checks import WrongError
    from gpu_check.lists import items_of
    from gpu_check.routes import SkippedError

    if os.environ.get(INSTRUMENTED):
        prepare_instrumented(options.device)
    items = items_of(options.list)
    for index in map(int, options.items.split(",")):
        item = _without(items[index], options.without)
        say(start=index, label=item.label)
        try:
            found: dict[str, Any] = {
                "status": "right", **item.run(options.device, options.seed + index, options.backend)
            }  # fmt: skip
        except SkippedError as reason:
            found = {"status": "skipped", "why": str(reason)}
        except WrongError as reason:
            found = {"status": "wrong", "why": str(reason)}
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            found = {"status": "failed", "why": f"{type(error).__name__}: {first[:300]}"}
            traceback.print_exc()
        say(done=index, **found)
        if found["status"] == "failed" and _device_is_lost(options.device):
            return DEVICE_LOST
    say(end=True)
    return 0


def _without(item: Any, start: str) -> Any:
    if not start or not hasattr(item, "contestants"):
        return item
    return replace(item, contestants=tuple(name for name in item.contestants if not name.startswith(start)))


def _device_is_lost(device: str) -> bool:
    """After an illegal access every later call of the process fails."""
    import torch

    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
