"""Models whose large tensors get their values later, one at a time: no process ever has to hold all of them."""

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
    """One that has made, or changed, deferred tensors."""

    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    result: Any
    written: frozenset[int]  # storages, by key
    read: frozenset[int]
    random: Tensor | None  # the state of the generator before it


class Deferred(TorchDispatchMode):
    """In its context, large floating-point tensors are made on the meta device, and what is done to them is noted.

    `value` then does it for one tensor, on the CPU, and with the same random numbers: torch's generator goes on as if
    all had been done at once. So a model has the same bits as without this. The idea is torchdistx's `deferred_init`.
    Unlike with `torch.device("meta")`, small tensors have values, and large ones look as if they had some: torch and
    transformers would not initialise them otherwise.

    Args:
        large: Number of elements from which on a tensor is deferred.

    Attributes:
        draws: Whether random numbers count; False: all of them will be replaced by what is read, which saves time.
        not_finite: Names of weights that were read and are not finite.
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
        """Whether a tensor's values come later."""
        with torch._C.DisableTorchFunction():
            return tensor.is_meta

    def read(self, tensor: Tensor, reader: Callable[[], Tensor]) -> None:
        """From now on, `value` of a deferred tensor is what `reader` returns."""
        self._readers[self._key(tensor)] = reader

    def value(self, tensor: Tensor) -> Tensor:
        """What a deferred tensor would contain, on the CPU: a new tensor."""
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
            self.draws = True  # else what is drawn until a condition holds would be the same every time
            return self.value(given[0]).item()
        if not given and "device" in named and named["device"] != _META:  # it makes a tensor
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
                raise NotImplementedError("the model has a random number generator of its own")
            random = torch.get_rng_state()
            if self.draws:
                func(*tree_map_only(Tensor, _like, args), **tree_map_only(Tensor, _like, named))
        # What has values now may be changed before they are needed
        kept = tree_map_only(Tensor, lambda one: one.detach() if one.is_meta else one.detach().clone(), (args, named))
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is not None and func.overloadpacket.__name__ in _SETTING and _is_all(target):
            given = self._keys((args[1:], named))
        self._operations.append(_Operation(func, kept, result, frozenset(made | changed), frozenset(given), random))

    def _history(self, key: int) -> list[_Operation]:
        """The operations on which the content of a storage depends, in their order."""
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
        """On the CPU: a view of what is there of the tensor's storage."""
        if not tensor.is_meta:
            return tensor
        key = self._key(tensor)
        if key not in real:  # nothing was written yet
            real[key] = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8).untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(real[key], tensor.storage_offset(), tensor.size(), tensor.stride())


class _Disguise(TorchFunctionMode):
    """In its context, tensors on the meta device seem to be on the CPU."""

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
    """The context in which the caller is, if any."""
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
    """Whether a tensor is all of its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _like(tensor: Tensor) -> Tensor:
    """A real tensor of the same layout, with arbitrary numbers."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype) if tensor.is_meta else tensor
