"""A machine in NumPy that runs the source of the Hopper kernels: their protocol and arithmetic without a GPU.

`load_kernels` executes a module on stand-ins for triton and Gluon, so what is checked is the kernel itself,
not a copy of it. The warps of every program are threads of which one runs at a time; before each operation
that another warp could notice, a seeded generator picks who goes on. Copies by TMA land, and leave, at any
later moment. The machine raises `Fault` for

- a deadlock, and more arrivals than a barrier counts (barriers know the parity of a phase, as in hardware);
- a tile that is read before it has landed, or written while a product or a copy reads it;
- a result of the tensor cores used before it was waited for; a program that ends before its copies;
- memory written by threads and read by TMA or the tensor cores without a fence in between;
- other bytes than a barrier expects; accesses outside of a tensor; results written twice.

What it computes is float32, to be compared with a reference. It models no layouts, no swizzles and no
registers.
"""

from __future__ import annotations

import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

GPU = Path(__file__).parents[2] / "python" / "fastattn" / "gpu"


class Fault(AssertionError):  # noqa: N818
    """What a GPU would have done wrong."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise Fault(message)


class _Stop(BaseException):
    """Ends the threads of a machine that has failed."""


class Party:
    """A warp, or a group of warps that act as one: a thread that runs when the machine says so."""

    def __init__(self, machine: Machine, program: int, work: Callable[[], None]):
        self.machine, self.program = machine, program
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[tuple[Product, list[Buffer]]] = []  # in flight, oldest first, and what each reads
        self.stores = 0  # copies to global memory that still read shared memory
        self.unfenced: set[Buffer] = set()  # written by this party's threads since its last fence
        self.turn, self.done = threading.Semaphore(0), False
        self.weight = 10 ** machine.random.uniform(-1.5, 0)  # how often it is picked: some are slow
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        self.turn.acquire()
        try:
            if not self.machine.failure:
                work()
                expect(not self.products, "the program ended with a product in flight")
                expect(self.stores == 0, "the program ended before its copies had left shared memory")
        except _Stop:
            pass
        except BaseException as error:
            self.machine.failure = error
        self.done = True
        self.machine.scheduler.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on, at least until `ready`."""
        self.ready = ready
        self.machine.scheduler.release()
        self.turn.acquire()
        if self.machine.failure:
            raise _Stop


class Machine:
    """Programs, the copies in flight, and the order in which things happen."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.scheduler = threading.Semaphore(0)
        self.parties: list[Party] = []
        self.copies: list[Callable[[], None]] = []
        self.failure: BaseException | None = None
        self.current: Party | None = None
        self.programs = 0
        self.copy_weight = 10 ** self.random.uniform(-1.5, 0.5)

    def start(self, program: int, work: Callable[[], None]) -> None:
        self.parties.append(Party(self, program, work))

    def run(self) -> None:
        """Run all parties to their ends."""
        while self.parties and not self.failure:
            waiting = [party for party in self.parties if party.ready()]
            choices: list[Any] = waiting + ([None] if self.copies else [])
            if not choices:
                self.failure = Fault(f"deadlock: {len(self.parties)} parties wait for each other")
                break
            weights = [self.copy_weight if choice is None else choice.weight for choice in choices]
            party = self.random.choices(choices, weights)[0]
            try:
                if party is None:
                    self.copies.pop(self.random.randrange(len(self.copies)))()
                else:
                    self._resume(party)
            except Fault as fault:
                self.failure = fault
            self.parties = [party for party in self.parties if not party.done]
        self._stop()
        if self.failure:
            raise self.failure
        expect(not self.copies, "a copy was in flight when all programs had ended")

    def _resume(self, party: Party) -> None:
        self.current = party
        party.turn.release()
        self.scheduler.acquire()

    def _stop(self) -> None:
        for party in self.parties:
            while not party.done:
                self._resume(party)
            party.thread.join()


_machine: Machine | None = None


def machine() -> Machine:
    assert _machine is not None
    return _machine


def party() -> Party:
    current = machine().current
    assert current is not None
    return current


class Buffer:
    """One tile of shared memory: what it holds, who reads it, and whether a copy is on its way into it."""

    def __init__(self, shape: tuple[int, ...]):
        self.data = np.full(shape, np.nan, np.float32)
        self.readers, self.landing = 0, False

    def begin_read(self) -> None:
        expect(not self.landing, "a tile was read before it had landed")
        expect(
            not any(self in other.unfenced for other in machine().parties),
            "a tile was read without a fence after threads wrote it",
        )
        self.readers += 1

    def begin_copy(self) -> None:
        expect(self.readers == 0, "a copy was issued into a tile that is being read")
        expect(not self.landing, "two copies into one tile")
        self.landing = True

    def land(self, data: np.ndarray) -> None:
        expect(self.readers == 0, "a copy landed in a tile that is being read")
        self.data[...] = data.reshape(self.data.shape)
        self.landing = False

    def write(self, data: np.ndarray) -> None:
        expect(self.readers == 0, "a tile was overwritten while it is read")
        expect(not self.landing, "a tile was overwritten while a copy lands in it")
        self.data[...] = np.asarray(data).reshape(self.data.shape)
        party().unfenced.add(self)


class Barrier:
    """An mbarrier: arrivals and bytes that its phase still lacks, and the parity of that phase."""

    def __init__(self) -> None:
        self.count = self.arrivals = self.bytes = self.parity = 0

    def arrive(self, count: int) -> None:
        expect(count <= self.arrivals, "more arrivals than a phase has")
        self.arrivals -= count
        self._turn()

    def add_bytes(self, number: int) -> None:
        self.bytes += number
        self._turn()

    def _turn(self) -> None:
        if self.arrivals == 0 and self.bytes == 0:
            self.parity ^= 1
            self.arrivals = self.count


class Shared:
    """A descriptor of shared memory: some buffers or barriers, or a view of one."""

    def __init__(
        self, items: list[Any], shape: tuple[int, ...], view: Callable[[np.ndarray], np.ndarray] = lambda x: x
    ):
        self.items, self.shape, self.view = items, tuple(shape), view
        self.dtype, self.type = np.float32, types.SimpleNamespace(layout=None)

    def index(self, number: int) -> Shared:
        expect(0 <= number < len(self.items), "an index outside of shared memory")
        return Shared([self.items[number]], self.shape[1:], self.view)

    @property
    def item(self) -> Any:
        (only,) = self.items
        return only

    def value(self) -> np.ndarray:
        return self.view(self.item.data)

    def _viewed(self, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Shared:
        return Shared(self.items, shape, lambda x: change(self.view(x)))

    def reshape(self, shape: list[int]) -> Shared:
        return self._viewed(lambda x: x.reshape(shape), tuple(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._viewed(lambda x: x.transpose(order), tuple(self.shape[i] for i in order))

    def load(self, layout: Any = None) -> Tensor:
        party().pause()
        expect(not self.item.landing, "a tile was read before it had landed")
        expect(not np.isnan(self.value()).any(), "shared memory was read before it was written")
        return tensor(self.value().copy())

    def store(self, value: np.ndarray) -> None:
        party().pause()
        self.item.write(value)


class Tensor(np.ndarray):
    """A tensor in registers."""

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> Tensor:
        return self.astype(dtype)


def tensor(value: Any) -> Any:
    return np.asarray(value).view(Tensor)


class Number(int):
    """A scalar argument of a kernel."""

    def to(self, dtype: Any) -> Number:
        return self


class Product:
    """What the tensor cores are still computing: of no use before it is waited for."""

    def __init__(self, value: np.ndarray):
        self.value, self.type, self.dtype = value, types.SimpleNamespace(layout=None), np.float32
        self.done = False


class Pointer:
    """An address, or a tensor of them, in an array."""

    def __init__(self, array: np.ndarray, offset: Any = 0):
        self.array, self.offset = array.reshape(-1), offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + offset)

    def places(self, mask: Any) -> Any:
        places = np.broadcast_to(self.offset, np.shape(mask))[mask]
        expect(bool(np.all((places >= 0) & (places < self.array.size))), "an access outside of a tensor")
        return places


class Descriptor:
    """A tensor that TMA reads and writes by blocks; what lies outside reads as zeros and is not written."""

    def __init__(self, array: np.ndarray, block: list[int]):
        self.array, self.dtype, self.layout = array, np.float32, None
        self.block_type = types.SimpleNamespace(shape=list(block), nbytes=4 * int(np.prod(block)))

    def _slices(self, coordinates: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        here, there = [], []
        for start, size, length in zip(coordinates, self.block_type.shape, self.array.shape, strict=True):
            low, high = max(start, 0), max(min(start + size, length), max(start, 0))
            here.append(slice(low, high))
            there.append(slice(low - start, high - start))
        return tuple(here), tuple(there)

    def read(self, coordinates: list[int]) -> np.ndarray:
        block = np.zeros(self.block_type.shape, np.float32)
        here, there = self._slices(coordinates)
        block[there] = self.array[here]
        return block

    def write(self, coordinates: list[int], block: np.ndarray) -> None:
        here, there = self._slices(coordinates)
        expect(bool(np.isnan(self.array[here]).all()), "a part of a tensor was written twice")
        self.array[here] = block.reshape(self.block_type.shape)[there]


# The operations of `mbarrier`, `tma` and the tensor cores.


def wait(barrier: Shared, phase: int, pred: bool = True) -> None:
    if pred:
        party().pause(lambda: barrier.item.parity != phase)


def arrive(barrier: Shared, *, count: int = 1) -> None:
    party().pause()
    barrier.item.arrive(count)


def expect_bytes(barrier: Shared, number: int) -> None:
    party().pause()
    barrier.item.bytes += number
    barrier.item.arrive(1)


def init(barrier: Shared, count: int) -> None:
    barrier.item.count = barrier.item.arrivals = count
    party().unfenced.add(barrier.item)


def load_tile(source: Descriptor, coordinates: list[int], barrier: Shared, result: Shared) -> None:
    party().pause()
    result.item.begin_copy()
    data = source.read(coordinates)

    def land() -> None:
        result.item.land(data)
        barrier.item.add_bytes(-source.block_type.nbytes)

    machine().copies.append(land)


def store_tile(target: Descriptor, coordinates: list[int], source: Shared) -> None:
    me = party()
    me.pause()
    source.item.begin_read()
    me.stores += 1

    def leave() -> None:
        target.write(coordinates, source.value())
        source.item.readers -= 1
        me.stores -= 1

    machine().copies.append(leave)


def store_wait(pending: int) -> None:
    me = party()
    me.pause(lambda: me.stores <= pending)


def fence() -> None:
    party().unfenced.clear()


def product(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
    expect(is_async, "a product that is not asynchronous")
    me = party()
    me.pause()
    reads = [x.item for x in (a, b) if isinstance(x, Shared)]
    for buffer in reads:
        buffer.begin_read()
    left = a.value() if isinstance(a, Shared) else a
    expect(not isinstance(left, Product), "a product's operand was not waited for")
    acc = acc.value if isinstance(acc, Product) else acc
    result = Product(left @ b.value() + (acc if use_acc else 0))
    me.products.append((result, reads))
    return result


def product_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    me = party()
    me.pause()
    while len(me.products) > outstanding:
        finished, reads = me.products.pop(0)
        finished.done = True
        for buffer in reads:
            buffer.readers -= 1
    expect(all(x.done for x in deps if isinstance(x, Product)), "a product is used that was not waited for")
    values = tuple(tensor(x.value) if isinstance(x, Product) else x for x in deps)
    return values[0] if len(values) == 1 else values


def atomic_add(pointer: Pointer, value: int, sem: str) -> int:
    party().pause()
    old = int(pointer.array[pointer.offset])
    pointer.array[pointer.offset] += value
    return old


def store(pointer: Pointer, value: np.ndarray, mask: np.ndarray) -> None:
    pointer.array[pointer.places(mask)] = value[mask]


def load(pointer: Pointer, mask: np.ndarray, other: float) -> Any:
    result = np.full(np.shape(mask), other, np.float32)
    result[mask] = pointer.array[pointer.places(mask)]
    return tensor(result)


def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    item = Barrier if layout == "barrier" else lambda: Buffer(tuple(shape[1:]))
    return Shared([item() for _ in range(shape[0])], tuple(shape))


def warp_specialize(
    parts: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> None:
    me = party()
    expect(not me.unfenced, "barriers are used without a fence after they were made")
    for work, arguments in parts:
        machine().start(me.program, lambda work=work, arguments=arguments: work(*arguments))


def _function(function: Callable[..., Any]) -> Callable[..., Any]:
    def quiet(*arguments: Any) -> Any:
        with np.errstate(all="ignore"):
            return tensor(function(*arguments))

    return quiet


def _gluon() -> dict[str, Any]:
    """Build the stand-ins, by the names under which kernels import them."""
    layout = lambda *_, **__: None  # noqa: E731
    names: dict[str, Any] = {
        name: layout
        for name in (
            "BlockedLayout",
            "SwizzledSharedLayout",
            "SliceLayout",
            "DotOperandLayout",
            "NVMMADistributedLayout",
        )
    }
    names |= {
        "constexpr": lambda value: value,
        "tensor": Tensor,
        "shared_memory_descriptor": Shared,
        "float32": np.float32,
        "int32": np.int64,
        "int64": np.int64,
        "static_range": range,
        "cdiv": lambda a, b: -(-a // b),
        "minimum": lambda a, b: min(a, b) if isinstance(a, int) else tensor(np.minimum(a, b)),
        "maximum": lambda a, b: max(a, b) if isinstance(a, int) else tensor(np.maximum(a, b)),
        "where": _function(np.where),
        "exp2": _function(np.exp2),
        "log2": _function(np.log2),
        "sum": _function(np.sum),
        "max": lambda a, axis: int(a.max()) if a.size == 1 else tensor(a.max(axis)),
        "arange": lambda start, end, layout: tensor(np.arange(start, end)),
        "zeros": lambda shape, dtype, layout: tensor(np.zeros(shape, np.float32)),
        "full": lambda shape, value, dtype, layout: tensor(np.full(shape, value, np.float32)),
        "convert_layout": lambda value, layout, assert_trivial=False: value,
        "program_id": lambda axis: party().program,
        "num_programs": lambda axis: machine().programs,
        "inline_asm_elementwise": lambda assembly, constraints, values, **_: 0,
        "atomic_add": atomic_add,
        "store": store,
        "load": load,
        "allocate_shared_memory": allocate,
        "warp_specialize": warp_specialize,
    }  # fmt: skip
    language = types.SimpleNamespace(**names)
    jit = lambda function=None, **_: function or (lambda inner: inner)  # noqa: E731
    gluon = types.SimpleNamespace(jit=jit, constexpr_function=lambda function: function, language=language)
    barriers = types.SimpleNamespace(
        wait=wait, arrive=arrive, expect=expect_bytes, init=init, MBarrierLayout=lambda: "barrier"
    )
    tma = types.SimpleNamespace(async_load=load_tile, async_store=store_tile, store_wait=store_wait)
    hopper = types.SimpleNamespace(
        mbarrier=barriers,
        tma=tma,
        fence_async_shared=fence,
        warpgroup_mma=product,
        warpgroup_mma_wait=product_wait,
    )
    root = "triton.experimental"
    return {
        "triton": types.SimpleNamespace(aggregate=lambda cls: cls),
        root: types.SimpleNamespace(gluon=gluon),
        f"{root}.gluon": gluon,
        f"{root}.gluon.language": language,
        f"{root}.gluon.language.nvidia.hopper": hopper,
    }


@contextmanager
def _modules(stand_ins: dict[str, Any]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_kernels(name: str, *changes: tuple[str, str]) -> types.ModuleType:
    """Execute `fastattn.gpu.<name>` on the stand-ins, with every (old, new) of `changes` made to its source.

    What the kernels share is changed likewise.
    """
    made: set[str] = set()
    with _modules(_gluon()):
        tiles = _execute("hopper_tiles", changes, made)
        with _modules({"fastattn.gpu.hopper_tiles": tiles}):
            module = _execute(name, changes, made)
    assert made == {old for old, _ in changes}, f"nothing to change for {changes}"
    return module


def _execute(name: str, changes: tuple[tuple[str, str], ...], made: set[str]) -> types.ModuleType:
    path = GPU / f"{name}.py"
    source = path.read_text()
    for old, new in changes:
        if old in source:
            source = source.replace(old, new)
            made.add(old)
    module = types.ModuleType(f"model_of_{name}")
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def launch(kernel: Callable[..., None], programs: int, seed: int, *arguments: Any, **constants: Any) -> None:
    """Run `programs` programs of a kernel under the schedule that `seed` stands for."""
    global _machine
    _machine = Machine(seed)
    _machine.programs = programs
    for program in range(programs):
        _machine.start(program, lambda: kernel(*arguments, **constants))
    _machine.run()
