"""The command ``fastattn``, or ``python -m fastattn``. Needs typer: ``pip install 'fastattn[cli]'``."""

# No annotations from __future__: typer evaluates them, and its name is local to the function below.
import sys
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

import fastattn

if TYPE_CHECKING:
    import typer

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        run = app()
    except ImportError as error:
        sys.exit(f"the command line of fastattn needs typer ({error}): pip install 'fastattn[cli]'")
    run()


def app() -> "typer.Typer":
    """Build the application; typer is imported here and nowhere else."""
    import typer

    cli = typer.Typer(no_args_is_help=True, add_completion=False, help=fastattn.__doc__)

    @cli.command()
    def config() -> None:
        """Print the build, the CPU, the instruction set chosen, the OpenMP runtime and the threads."""
        fastattn.show_config()

    @cli.command()
    def version() -> None:
        """Print the version."""
        typer.echo(fastattn.__version__)

    @cli.command()
    def explain(
        shape: Annotated[str, typer.Option(help="Query: batch, heads, length, head dimension.")],
        kv_shape: Annotated[str, typer.Option(help="Key and value; like the query by default.")] = "",
        value_dim: Annotated[int, typer.Option(help="Head dimension of the value; 0: the key's.")] = 0,
        dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
        causal: Annotated[bool, typer.Option(help="Queries see no later keys.")] = False,
        backend: Annotated[str, typer.Option(help="The backend to ask; all by default.")] = "",
    ) -> None:
        """Print which backend and path would compute attention of these shapes, and why no other."""
        try:
            query = _empty("--shape", shape, dtype)
            key = _empty("--kv-shape", kv_shape, dtype) if kv_shape else query
            value = _widened(key, value_dim) if value_dim else key
            found = fastattn.explain(query, key, value, causal=causal, backend=backend or None)
        except (TypeError, ValueError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        typer.echo(str(found))

    return cli


def _empty(option: str, shape: str, dtype: str) -> Any:
    """Return an array of `shape`, such as "1,8,512,64", that takes the memory of one element."""
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 0:
        raise ValueError(f"{option}: expected four sizes, such as 1,8,512,64, got {shape!r}")
    return np.broadcast_to(np.zeros(1, _dtype(dtype)), sizes)


def _widened(key: Any, value_dim: int) -> Any:
    """Return an array like `key` with another head dimension."""
    if value_dim < 0:
        raise ValueError(f"--value-dim: expected a size, got {value_dim}")
    return np.broadcast_to(np.zeros(1, key.dtype), (*key.shape[:3], value_dim))


def _dtype(name: str) -> Any:
    """Return the NumPy dtype called `name`."""
    if name in ("float64", "float32", "float16"):
        return np.dtype(name)
    if name != "bfloat16":
        raise ValueError(f"--dtype: expected float64, float32, bfloat16 or float16, got {name!r}")
    try:
        import ml_dtypes
    except ImportError as error:
        raise ValueError("--dtype bfloat16 needs the package ml_dtypes") from error
    return ml_dtypes.bfloat16
