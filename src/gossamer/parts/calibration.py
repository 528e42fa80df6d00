"""Calibration: inputs and Hessians of chosen linear layers, from a few batches of real data.

For a linear layer with weight ``W [out, in]`` and inputs ``x_1 ... x_n`` (rows of ``[in]``, padding left out)

    H = 2/n sum_i x_i x_i^T     [in, in] in float64, kept as a running mean     m_j = 1/n sum_i x_ij^2 = H_jj / 2

``H`` is the second derivative of the mean squared output error ``1/n sum_i |(W - W') x_i|^2`` with respect to each row
of ``W'``, so ``trace(D H D^T) / 2`` with ``D = W - W'`` is that error. It serves the whole family of the optimal brain
surgeon (ZipLM, SparseGPT, GPTQ); ``sqrt(m_j)`` is what Wanda multiplies weights by.

Two ways through the model:

- :func:`collect`: all layers on the model as it is. Matrices are held for as many layers at once as ``memory`` allows;
  for the rest the model is run again.
- :func:`block_by_block`: one block after another; whoever iterates changes the block in between, and the inputs of
  block ``l + 1`` are computed through the changed block ``l``. Held are the hidden states between two blocks.

Batches are what the model takes, with ``attention_mask`` where rows are padded.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.injection import widths

Batch = Mapping[str, Any]
SHORT = 8  # fewer tokens than an eighth of a layer's inputs are too few for a matrix
_ILL = 1e-12  # smallest over largest pivot of a matrix that counts as singular
_TRIES = 8


class InputStatistics:
    """What is kept of the inputs of one layer with ``width`` inputs: ``H``, or where ``full`` is off only ``m``."""

    def __init__(self, width: int, *, full: bool = True, device: torch.device | str = "cpu") -> None:
        self.width, self.full, self.count = width, full, 0
        self._mean = torch.zeros((width, width) if full else (width,), dtype=torch.float64, device=device)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in ``x [..., in]``; ``mask [...]`` is 0 where a place is padding. InputError for NaN or Inf."""
        rows = x.detach().reshape(-1, self.width)
        if mask is not None:
            rows = rows[mask.reshape(-1).bool()]
        if not len(rows):
            return
        rows = rows.to(torch.float64)
        total = self.count + len(rows)
        new = rows.T @ rows if self.full else rows.square().sum(0)
        if not torch.isfinite(new).all():
            raise InputError("calibration", must="give finite inputs to every layer", got="NaN or Inf", do=_MEND)
        self._mean *= self.count / total
        self._mean += new / total
        self.count = total

    @property
    def hessian(self) -> Tensor:
        """``H [in, in]`` in float64."""
        assert self.full, "collected without the full matrix"
        return 2 * self._mean

    @property
    def mean_square(self) -> Tensor:
        """``m [in]`` in float64; ``sqrt(m * count)`` is the norm of each input over all tokens."""
        return self._mean.diagonal() if self.full else self._mean


def check_batches(batches: Any, where: str, *, width: int = 1) -> list[Batch]:
    """``batches`` as a list; InputError where there is none, or where the tokens are too few for ``width`` inputs."""
    if isinstance(batches, Mapping):
        batches = [batches]
    found = list(batches) if isinstance(batches, Iterable) and not isinstance(batches, str | Tensor) else []
    if not found or not all(isinstance(batch, Mapping) and "input_ids" in batch for batch in found):
        got = "none" if not found else f"{type(found[0]).__name__} without input_ids"
        do = "give a list of dicts with input_ids and attention_mask; in a recipe, `data:`"
        raise InputError(f"{where}: calibration data", must="hold batches of tokens", got=got, do=do)
    tokens = sum(token_count(batch) for batch in found)
    least = max(1, -(-width // SHORT))
    if tokens < least:
        raise InputError(
            f"{where}: calibration data",
            must=f"hold at least {least} tokens, an eighth of the inputs of the widest layer",
            got=tokens,
            do="give more or longer texts",
        )
    return found


def token_count(batch: Batch) -> int:
    """Tokens of a batch without its padding."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(batch["input_ids"].numel())


def collect(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str],
    *,
    full: bool = True,
    memory: int = 2**30,
) -> Iterator[tuple[str, InputStatistics]]:
    """(name, statistics) for each of ``names``, dotted names of linear layers of ``model``, which stays as it is.

    At most ``memory`` bytes of matrices are held at once (at least one layer's); each further lot runs the model over
    all batches again. InputError for no or too few tokens, NaN inputs, or a layer that the batches do not reach.
    """
    layers = {name: _width(model, name) for name in names}
    checked = check_batches(batches, "collect", width=max(layers.values(), default=1) if full else 1)
    waiting = list(layers)
    while waiting:
        lot: dict[str, InputStatistics] = {}
        room = memory
        while waiting and (not lot or room >= _bytes(layers[waiting[0]], full)):
            name = waiting.pop(0)
            room -= _bytes(layers[name], full)
            lot[name] = InputStatistics(layers[name], full=full, device=device_of(model))
        with _recording(model, lot) as recording, at_rest(model):
            for batch in checked:
                recording.mask = _mask(batch, model)
                model(**moved(batch, model), **without_cache(model))
        _all_reached(lot)
        while lot:
            first = next(iter(lot))
            yield first, lot.pop(first)


@dataclasses.dataclass
class BlockInputs:
    """One block on its way through :func:`block_by_block`; ``statistics`` go by names inside of the block."""

    index: int
    block: nn.Module
    statistics: dict[str, InputStatistics]


def block_by_block(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Sequence[nn.Module],
    names: Sequence[Sequence[str]],
    *,
    full: bool = True,
) -> Iterator[BlockInputs]:
    """Statistics of the layers ``names[l]`` of each block, on inputs that passed the blocks before as they are then.

    ``blocks`` are consecutive and follow from one another; each is yielded once, and what is done to it before the
    next one is asked for counts for all that follow. ``names[l]`` are dotted names inside of block ``l``.
    """
    assert len(blocks) == len(names), (len(blocks), len(names))
    widest = max(
        (_width(block, name) for block, inside in zip(blocks, names, strict=True) for name in inside), default=1
    )
    checked = check_batches(batches, "block_by_block", width=widest if full else 1)
    calls = [block_calls(model, blocks, batch) for batch in checked]
    hidden = [per_block[0].hidden for per_block in calls]
    for index, (block, inside) in enumerate(zip(blocks, names, strict=True)):
        lot = {name: InputStatistics(_width(block, name), full=full, device=device_of(model)) for name in inside}
        with _recording(block, lot) as recording, at_rest(model):
            for batch, per_block, state in zip(checked, calls, hidden, strict=True):
                recording.mask = _mask(batch, model)
                per_block[index].run(block, state)
        _all_reached(lot)
        yield BlockInputs(index, block, lot)
        if index + 1 < len(blocks):
            with at_rest(model):
                for place, per_block in enumerate(calls):
                    hidden[place] = per_block[index].run(block, hidden[place])
                    per_block[index] = _DONE


@dataclasses.dataclass(frozen=True)
class Inverse:
    """``H^-1`` of a Hessian whose dead inputs count as 1 and which ``added`` was added to the diagonal of."""

    matrix: Tensor  # [in, in] float64
    dead: Tensor  # [in] bool: inputs that are always 0
    added: float


def invert(hessian: Tensor, *, damp: float = 0.01, always: bool = False) -> Inverse:
    """Inverse by Cholesky. Where that fails (or ``always``), ``damp`` of the mean diagonal is added first, and ten
    times as much for as long as it fails. InputError for NaN or an all-zero Hessian."""
    if not torch.isfinite(hessian).all():
        raise InputError("Hessian", must="be finite", got="NaN or Inf", do=_MEND)
    matrix = hessian.to(torch.float64).clone()
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        raise InputError("Hessian", must="have inputs that are not always 0", got="none", do=_MEND)
    mean = float(diagonal[~dead].mean())
    diagonal[dead] = 1.0
    added = damp * mean if always else 0.0
    for _ in range(_TRIES):
        factor, failed = torch.linalg.cholesky_ex(matrix + added * torch.eye(len(matrix), dtype=matrix.dtype))
        pivots = factor.diagonal()[~dead].square()
        if not int(failed) and float(pivots.min()) > _ILL * float(pivots.max()):
            return Inverse(torch.cholesky_inverse(factor), dead, added)
        added = 10 * added if added else max(damp, 1e-8) * mean
    raise InputError("Hessian", must="be invertible with damping", got=f"singular with {added:.3g} added", do=_MEND)


def squared_error(difference: Tensor, hessian: Tensor) -> float:
    """Mean squared output error ``1/n sum_i |D x_i|^2 = trace(D H D^T) / 2`` of ``D [out, in]``."""
    wide = difference.to(torch.float64)
    return float(((wide @ hessian) * wide).sum()) / 2


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def moved(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """The batch on the device of the model."""
    device = device_of(model)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def without_cache(model: Any) -> dict[str, Any]:
    """The argument that turns the cache off, where the model has one."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


_MEND = "look for NaN in the weights, or for data that the model never saw; compute in float32"


class _Recording:
    mask: Tensor | None = None


@contextlib.contextmanager
def _recording(root: nn.Module, lot: dict[str, InputStatistics]) -> Iterator[_Recording]:
    """Inside, forward passes of ``root`` add the inputs of the named layers to their statistics."""
    recording = _Recording()

    def hook(name: str) -> Any:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, mask = args[0], recording.mask
            if mask is not None and x.shape[:-1] != mask.shape:
                if not bool(mask.all()):
                    got = f"{list(x.shape)} for rows {list(mask.shape)}"
                    do = "give batches without padding"
                    raise InputError(f"{name}: inputs", must="come as [rows, tokens, width]", got=got, do=do)
                mask = None
            lot[name].add(x, mask)

        return take

    handles = [root.get_submodule(name).register_forward_pre_hook(hook(name)) for name in lot]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; modes as before after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclasses.dataclass
class BlockCall:
    """How a block is called for one batch: its hidden states (kept for the first block only) and all else."""

    hidden: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    named: bool = False

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        first = () if self.named else (hidden,)
        kwargs = self.kwargs | ({"hidden_states": hidden} if self.named else {})
        out = block(*first, *self.args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


_DONE = BlockCall(None)


def block_calls(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> list[BlockCall]:
    """One pass of ``batch``: how each block was called. Masks and rotary tables are shared, so they are held once."""
    found: dict[int, BlockCall] = {}

    def hook(index: int) -> Any:
        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            hidden = args[0] if args else kwargs["hidden_states"]
            found[index] = BlockCall(hidden if index == 0 else None, args[1:], rest, not args)

        return take

    handles = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        with at_rest(model):
            model(**moved(batch, model), **without_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    if sorted(found) != list(range(len(blocks))):
        raise InputError("block_by_block", must="reach every block", got=f"{sorted(found)} of {len(blocks)}")
    return [found[index] for index in range(len(blocks))]


def _mask(batch: Batch, model: nn.Module) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask.to(device_of(model)) if mask is not None and mask.ndim == 2 else None


def _width(root: nn.Module, name: str) -> int:
    shape = widths(root.get_submodule(name))
    if shape is None:
        got = type(root.get_submodule(name)).__name__
        raise InputError(f"calibration: {name}", must="be a linear layer", got=got)
    return shape[0]


def _bytes(width: int, full: bool) -> int:
    return 8 * width * (width if full else 1)


def _all_reached(lot: dict[str, InputStatistics]) -> None:
    missed = [name for name, statistics in lot.items() if not statistics.count]
    if missed:
        do = "leave it out, or give data that reaches it"
        raise InputError(f"calibration: {missed[0]}", must="be reached by the calibration data", got="no token", do=do)
