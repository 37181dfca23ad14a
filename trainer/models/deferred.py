"""Models whose large tensors are computed later, one at a time, so that no process ever has to hold all of them."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# In-place operations that do not read what they write
_SETTING = ("zero_", "fill_", "normal_", "uniform_", "copy_")
_META = torch.device("meta")
_current: ContextVar["Deferred | None"] = ContextVar("deferred", default=None)


@dataclass(frozen=True, eq=False)
class _Operation:
    """An operation that created or changed deferred tensors."""

    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    result: Any
    written: frozenset[int]  # storages, by key
    read: frozenset[int]
    random: Tensor | None  # the state of the generator before it


class Deferred(TorchDispatchMode):
    """A context in which large floating-point tensors are created on the meta device and their operations are recorded.

    `value` then replays the operations for one tensor, on the CPU and with the same random numbers; torch's generator
    advances as if they had run at once. So a model is bitwise identical to one built without this. The idea is
    torchdistx's `deferred_init`. Unlike with `torch.device("meta")`, small tensors have values, and large ones pretend
    to, because torch and transformers would not initialise them otherwise.

    Args:
        large: Minimum number of elements of a deferred tensor.

    Attributes:
        draws: Whether to draw random numbers; False if all of them will be replaced by stored weights, to save time.
        not_finite: Names of stored weights that were read and are not finite.
    """

    def __init__(self, large: int) -> None:
        super().__init__()
        self.draws, self.not_finite = True, list[str]()
        self._large = large
        self._operations: list[_Operation] = []
        self._readers: dict[int, Callable[[], Tensor]] = {}  # by key
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that keys stay unique
        self._disguise = _Disguise()
        self._token: Token[Deferred | None] | None = None

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        super().__enter__()
        self._disguise.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._disguise.__exit__(*error)
        super().__exit__(*error)
        assert self._token is not None
        _current.reset(self._token)

    def defers(self, tensor: Tensor) -> bool:
        """Whether a tensor is deferred."""
        with torch._C.DisableTorchFunction():
            return tensor.is_meta

    def read(self, tensor: Tensor, reader: Callable[[], Tensor]) -> None:
        """From now on, let `reader` return the value of a deferred tensor."""
        self._readers[self._key(tensor)] = reader

    def value(self, tensor: Tensor) -> Tensor:
        """Compute the content of a deferred tensor, as a new tensor on the CPU."""
        if reader := self._readers.get(self._key(tensor)):
            return reader()
        real: dict[int, torch.UntypedStorage] = {}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for one in self._history(self._key(tensor)):
                if one.random is not None:
                    torch.set_rng_state(one.random)
                arguments, named = tree_map_only(Tensor, lambda one: self._real(one, real), one.arguments)
                result = one.function(*arguments, **named)
                for made, noted in zip(_tensors(result), _tensors(one.result), strict=True):
                    if self._key(noted) in real:
                        continue
                    if made.stride() == noted.stride() and made.storage_offset() == noted.storage_offset():
                        real[self._key(noted)] = made.untyped_storage()
                    else:  # some functions of linear algebra
                        self._real(noted, real).copy_(made)
            return self._real(tensor.detach(), real)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, dict(kwargs or {}))

    def _dispatch(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        given = _tensors((args, named))
        if func == torch.ops.aten._local_scalar_dense.default and given[0].is_meta:
            self.draws = True  # otherwise sampling until a condition holds would never end
            return self.value(given[0]).item()
        if not given and "device" in named and named["device"] != _META:  # it creates a tensor
            result = func(*args, **{**named, "device": _META})
            if not (isinstance(result, Tensor) and result.is_floating_point() and result.numel() >= self._large):
                return func(*args, **named)
        else:
            result = func(*args, **named)
        if any(one.is_meta for one in [*given, *_tensors(result)]):
            self._note(func, args, named, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        if "device" in named:
            named = {**named, "device": torch.device("cpu")}
        given = self._keys((args, named))
        made = self._keys(result) - given
        changed = {self._key(one) for one in _changed(func, args, named)}
        if not made | changed or func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like):
            return  # a view, or nothing yet
        random = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            if any(isinstance(one, torch.Generator) for one in tree_leaves((args, named))):
                raise NotImplementedError("the model has its own random number generator")
            random = torch.get_rng_state()
            if self.draws:
                func(*tree_map_only(Tensor, _like, args), **tree_map_only(Tensor, _like, named))
        # Copy tensors that have values, because they may change before the replay
        kept = tree_map_only(Tensor, lambda one: one.detach() if one.is_meta else one.detach().clone(), (args, named))
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is not None and func.overloadpacket.__name__ in _SETTING and _is_all(target):
            given = self._keys((args[1:], named))
        self._operations.append(_Operation(func, kept, result, frozenset(made | changed), frozenset(given), random))

    def _history(self, key: int) -> list[_Operation]:
        """The operations on which a storage's content depends, in order."""
        needed, found = {key}, []
        for one in reversed(self._operations):
            if needed & one.written:
                found.append(one)
                needed = (needed - one.written) | one.read
        return found[::-1]

    def _keys(self, values: Any) -> set[int]:
        return {self._key(one) for one in _tensors(values) if one.is_meta}

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        return int(self._storages.setdefault(storage._cdata, storage)._cdata)

    def _real(self, tensor: Tensor, real: dict[int, torch.UntypedStorage]) -> Tensor:
        """A CPU view of the real storage that corresponds to the tensor's."""
        if not tensor.is_meta:
            return tensor
        key = self._key(tensor)
        if key not in real:  # nothing was written yet
            real[key] = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8).untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(real[key], tensor.storage_offset(), tensor.size(), tensor.stride())


class _Disguise(TorchFunctionMode):
    """A context in which tensors on the meta device pretend to be on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        if func == torch.Tensor.device.__get__ and result == _META:
            return torch.device("cpu")
        return result


def current() -> Deferred | None:
    """The active context, if any."""
    return _current.get()


def _tensors(values: Any) -> list[Tensor]:
    """All tensors among an operation's arguments or results."""
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def _changed(func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes in place."""
    declared = func._schema.arguments
    given = {**{one.name: value for one, value in zip(declared, args, strict=False)}, **named}
    written = [given.get(one.name) for one in declared if one.alias_info is not None and one.alias_info.is_write]
    return _tensors(written)


def _is_all(tensor: Tensor) -> bool:
    """Whether a tensor covers its whole storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _like(tensor: Tensor) -> Tensor:
    """An uninitialised real tensor with the same layout."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype) if tensor.is_meta else tensor
