"""The numeric tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer (gcc).

python tests/run_sanitized.py [arguments of pytest; files among them are run in place of all]
"""

from __future__ import annotations

import subprocess
import sys

from build_tree import ROOT, build_tree, check_imports, environment

# What reads and writes through the kernels. The rest looks at processes, documents and builds.
NUMERIC = [
    "exactness",
    "rules",
    "poison",
    "extremes",
    "views",
    "bitwise",
    "backward",
    "backward_extremes",
    "philox",
    "plain",
    "properties",
    "merge",
    "fences",
    "kvcache",
    "kvcache_safety",
    "kvcache_errors",
    "float8",
    "fuzz",
    "functional",
    "errors",
    "problem",
]
# Minutes each under a sanitizer, and not about memory; processes that are to crash, or count their memory.
LEFT_OUT = "not (long or Stated or Past31 or ends_the_process or busy or memory_is_flat)"


def library(name: str) -> str:
    done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> int:
    print("==> building with sanitizers (minutes the first time)", flush=True)
    tree = build_tree(ROOT, ROOT / "build" / "asan", "-DFASTATTN_SANITIZE=ON")
    variables = environment(tree) | {
        # libstdc++ with them: a sanitizer that comes first looks for its way to throw at once.
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so.6"))),
        # The interpreter leaks on purpose. Small objects come from malloc, where ASan sees their ends.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    }
    check_imports(tree, variables)
    print("==> testing", flush=True)
    given = sys.argv[1:]
    named = any(argument.endswith(".py") for argument in given)
    files = [] if named else [str(ROOT / "tests" / f"test_{name}.py") for name in NUMERIC]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *files, *given]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
