"""Arguments refused before anything is launched; every message names the argument, its value and the remedy.

Nothing here reads a CUDA tensor: that would stop the host until the device is done. What only its values can show is checked
for CPU tensors, outside of torch.compile, and on CUDA kept from reading outside of memory (a target out of range gives NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)


def check_floats(name: str, tensor: Tensor, shape: tuple[int | None, ...], *, allow_float64: bool = False) -> None:
    """Raises ValueError unless `tensor` is floating point and of this shape; None stands for any length."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: a {type(tensor).__name__}; pass a tensor")
    if tensor.dtype not in FLOATS and not (allow_float64 and tensor.dtype == torch.float64):
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(f"{name}: dtype {tensor.dtype}; convert it to one of {known}")
    check_shape(name, tensor, shape)


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError unless `tensor` has this shape; None stands for any length."""
    fits = tensor.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        remedy = "; flatten the dimensions in front" if tensor.ndim > len(shape) else ""
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; must be [{wanted}]{remedy}")


def check_integers(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError unless `tensor` holds int64 or int32 of this shape."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: a {type(tensor).__name__}; pass an int64 tensor")
    if tensor.dtype not in _INTEGERS:
        raise ValueError(f"{name}: dtype {tensor.dtype}; convert it with .long()")
    check_shape(name, tensor, shape)


def _shows_values(tensor: Tensor) -> bool:
    """Whether values can be looked at: on the CPU, where there are any, and without breaking a graph that is being traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def check_same_device(reference: tuple[str, Tensor], **others: Tensor | None) -> None:
    """Raises ValueError for the first of `others` that lies elsewhere; None passes."""
    home, tensor = reference
    for name, other in others.items():
        if isinstance(other, Tensor) and other.device != tensor.device:
            raise ValueError(f"{name}: on {other.device}, {home} on {tensor.device}; move it with .to({home}.device)")


def check_rows_contiguous(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless neighbours in the last dimension are neighbours in memory."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: stride {tensor.stride(-1)} in its last dimension; pass {name}.contiguous()")


def check_targets(targets: Tensor, num_tokens: int, vocabulary: int, mask: Tensor | None = None) -> None:
    """Raises ValueError for a wrong dtype or length, and on the CPU for an unmasked target outside the vocabulary."""
    check_integers("targets", targets, (num_tokens,))
    if mask is not None:
        check_mask(mask, num_tokens)
    if _shows_values(targets):
        outside = (targets < 0) | (targets >= vocabulary)
        if mask is not None:
            outside = outside & mask.bool()
        if outside.any():
            place = int(outside.nonzero()[0, 0])
            raise ValueError(
                f"targets: {int(targets[place])} at {place} lies outside the vocabulary of {vocabulary}; mask such slots out"
            )


def check_mask(mask: Tensor, num_tokens: int) -> None:
    """Raises ValueError unless `mask` holds booleans, or integers for them; additive masks of 0 and -inf mean the opposite."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask: a {type(mask).__name__}; pass a bool tensor")
    if mask.is_floating_point():
        raise ValueError(f"mask: dtype {mask.dtype}; pass bool, True where a token counts")
    check_shape("mask", mask, (num_tokens,))


def kept_tokens(targets: Tensor, mask: Tensor | None, ignore_index: int | None) -> Tensor | None:
    """[T] bool, the tokens that count; None where all of them do.

    Raises:
        ValueError: a mask of the wrong dtype or shape.
    """
    if mask is not None:
        check_mask(mask, len(targets))
        mask = mask.bool()
    if ignore_index is None:
        return mask
    counts = targets != ignore_index
    return counts if mask is None else counts & mask


def check_softcap(softcap: float | None) -> None:
    """Raises ValueError unless `softcap` is None or a number above 0."""
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: {softcap!r}; must be a number above 0, or None for logits as they are")


def check_z_coef(z_coef: float) -> None:
    """Raises ValueError unless `z_coef` is a finite number, at least 0."""
    if not 0 <= z_coef < float("inf"):
        raise ValueError(f"z_coef: {z_coef!r}; must be a finite number, at least 0")


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless `temperature` is a number above 0."""
    if not isinstance(temperature, float | int):
        # Not read here: on CUDA the host would wait for it.
        raise ValueError(f"temperature: a {type(temperature).__name__}; pass the number, float(temperature)")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: {temperature!r}; must be a number above 0")


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raises ValueError for a wrong dtype or shape, and on the CPU for boundaries that do not rise from 0 to `num_tokens`."""
    check_integers("cu_seqlens", cu_seqlens, (None,))
    if len(cu_seqlens) < 1:
        raise ValueError("cu_seqlens: empty; it holds the start of every sequence and, last, the number of tokens")
    if _shows_values(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != num_tokens or values != sorted(values):
            raise ValueError(f"cu_seqlens: {values}; must rise from 0 to the number of tokens, {num_tokens}")


def check_pairs(pairs: Tensor, num_sequences: int) -> None:
    """Raises ValueError for a wrong dtype or shape, and on the CPU for a sequence number out of range."""
    check_integers("pairs", pairs, (None, 2))
    if _shows_values(pairs) and pairs.numel() and not (int(pairs.min()) >= 0 and int(pairs.max()) < num_sequences):
        raise ValueError(f"pairs: holds numbers outside 0 ... {num_sequences - 1}; number the sequences of cu_seqlens from 0")


def check_weights(weights: Tensor | None, num_layers: int) -> None:
    """Raises ValueError unless `weights` is None or one floating point number for each layer."""
    if weights is not None:
        check_floats("weights", weights, (num_layers,), allow_float64=True)


def check_centre(centre: Tensor | None, pooled: Tensor) -> None:
    """Raises ValueError unless `centre` is None, [L, D] or [2, L, D] for pooled [L, N, D]."""
    if centre is not None:
        num_layers, _, width = pooled.shape
        sides = (2,) if isinstance(centre, Tensor) and centre.ndim == 3 else ()
        check_floats("centre", centre, (*sides, num_layers, width), allow_float64=True)


def choose_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """The chosen layers as numbers from 0; negative ones count from the end.

    Raises:
        ValueError: a layer that does not exist.
    """
    if isinstance(layers, int) or (layers is not None and not len(layers)):
        raise ValueError(f"layers: {layers}; pass a list of at least one layer")
    chosen = list(range(num_layers)) if layers is None else list(layers)
    for layer in chosen:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"layers: {layer} does not exist; there are {num_layers}, numbered from 0")
    return [layer % num_layers for layer in chosen]


def check_pooling(pooling: str) -> None:
    """Raises ValueError for anything but mean or last."""
    if pooling not in ("mean", "last"):
        raise ValueError(f"pooling: {pooling!r}; must be 'mean' or 'last'")


def head_parameters(weight: Tensor | nn.Module, bias: Tensor | None, name: str = "weight") -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an output head, given as its weight or as the module itself; `name` is the argument's.

    Raises:
        ValueError: the module carries an adapter, whose output its weight alone does not give, or is no linear layer; or the
            weight is in parts.
    """
    if isinstance(weight, Tensor):
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                f"weight: a {type(weight).__name__}, of which this process holds a part; call from the forward of the module "
                "that gathers it, or pass weight.full_tensor()"
            )
        return weight, bias
    if hasattr(weight, "lora_A") or hasattr(weight, "base_layer"):
        raise ValueError(
            f"{name}: {type(weight).__name__} with an adapter, which its weight leaves out; merge the adapter, leave the "
            "head out of its target modules, or pass logits to policy_loss"
        )
    # peft wraps modules that it trains whole in one that hands on the trained copy's parameters.
    if not isinstance(weight, nn.Linear) and not hasattr(weight, "modules_to_save"):
        raise ValueError(f"{name}: {type(weight).__name__}; pass the head's weight [V, D] or the nn.Linear itself")
    head: Any = weight
    return head_parameters(head.weight, getattr(head, "bias", None) if bias is None else bias)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, allow_float64: bool, prefix: str = "") -> None:
    """Raises ValueError unless hidden [T, D], weight [V, D] and bias [V] fit together; `prefix` begins the arguments' names.

    `hidden` may be of a narrower type than `weight`, to whose it is to be converted.
    """
    check_floats(f"{prefix}hidden", hidden, (None, None), allow_float64=allow_float64)
    check_floats(f"{prefix}weight", weight, (None, hidden.shape[1]), allow_float64=allow_float64)
    # A head kept in fp32 over states of an autocast: products are taken in fp32.
    if torch.promote_types(weight.dtype, hidden.dtype) != weight.dtype:
        raise ValueError(f"{prefix}weight: dtype {weight.dtype}, {prefix}hidden {hidden.dtype}; convert one of them")
    check_same_device((f"{prefix}hidden", hidden), **{f"{prefix}weight": weight, f"{prefix}bias": bias})
    check_bias(bias, weight.shape[0], f"{prefix}bias")


def check_bias(bias: Tensor | None, vocabulary: int, name: str = "bias") -> None:
    """Raises ValueError unless `bias` is None or one floating point number for each token of the vocabulary."""
    if bias is not None:
        check_floats(name, bias, (vocabulary,), allow_float64=True)


def check_packing(states: Tensor, cu_seqlens: Tensor, positions: Tensor | None) -> None:
    """Raises ValueError unless boundaries, and positions where given, fit `states` [T or M, D]."""
    check_same_device(("states", states), cu_seqlens=cu_seqlens, positions=positions)
    if positions is not None:
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            raise ValueError("positions: dtype torch.bool; pass the places themselves, positions.nonzero()[:, 0]")
        check_integers("positions", positions, (None,))
        if positions.dtype != torch.int64:
            raise ValueError(f"positions: dtype {positions.dtype}; convert it with .long()")
        if _shows_values(positions) and len(positions.unique()) < len(positions):
            raise ValueError("positions: holds a row twice; every packed token has a place of its own")
        if _shows_values(positions) and len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(states):
            raise ValueError(f"positions: holds numbers outside 0 ... {len(states) - 1}; they are rows of the states")
    check_cu_seqlens(cu_seqlens, len(states) if positions is None else len(positions))


def check_layer_states(name: str, states: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The layers [T, D] of a stack or a sequence.

    Raises:
        ValueError: no layers, or layers that differ in shape, dtype or device.
    """
    if isinstance(states, Tensor):
        check_floats(name, states, (None, None, None), allow_float64=True)
    layers = list(states)
    if not layers:
        raise ValueError(f"{name}: no layers; pass at least one")
    for number, layer in enumerate(layers):
        check_floats(f"{name}[{number}]", layer, (None, None), allow_float64=True)
        first = layers[0]
        if layer.shape != first.shape or layer.dtype != first.dtype or layer.device != first.device:
            have, want = (f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (layer, first))
            raise ValueError(f"{name}[{number}]: {have}; must be like {name}[0], {want}")
    return layers


def check_versions(
    x_layers: Tensor | Sequence[Tensor], y_layers: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers of both versions.

    Raises:
        ValueError: they differ in number, shape or device.
    """
    x, y = check_layer_states("x_layers", x_layers), check_layer_states("y_layers", y_layers)
    check_same_device(("x_layers", x[0]), y_layers=y[0])
    if len(x) != len(y) or x[0].shape != y[0].shape:
        raise ValueError(
            f"y_layers: {len(y)} layers {tuple(y[0].shape)}; must be like x_layers, {len(x)} layers {tuple(x[0].shape)}"
        )
    return x, y


def check_aligned(
    x_layers: Tensor | Sequence[Tensor], y_layers: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers of both sides.

    Raises:
        ValueError: they differ in number of tokens or device.
    """
    x, y = check_layer_states("x_layers", x_layers), check_layer_states("y_layers", y_layers)
    check_same_device(("x_layers", x[0]), y_layers=y[0])
    if len(x[0]) != len(y[0]):
        raise ValueError(f"y_layers: {len(y[0])} tokens, x_layers {len(x[0])}; align the tokens first")
    return x, y
