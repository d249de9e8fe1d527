"""The table of operators: one row says all that the library knows of an operator.

Holds: the rows, and adding to them. Elsewhere: what the columns mean (trace/operators.py), the rules. What is not here
pins whatever reaches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch

from apoptosis.errors import ArgumentError, CaptureError
from apoptosis.graph.explain import Code
from apoptosis.graph.rules import (
    contraction,
    convolution,
    elementwise,
    layout,
    lookup,
    movement,
    normalization,
    product,
    reduction,
)
from apoptosis.graph.trace.operators import UNKNOWN, Operator, Result, Rule
from apoptosis.graph.trace.scalars import item, literal, operands, scale_argument
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import Value
from apoptosis.numerics.activations import NEURON_TYPES


def _elementwise(rule: Rule = elementwise.elementwise, **columns: Any) -> Operator:
    """Return the row of an operator that works element by element, on plain numbers too."""
    return Operator(rule, reads=False, numbers=operands, **columns)


def _fills(rule: Rule = elementwise.fill_like, **columns: Any) -> Operator:
    """Return the row of an operator that makes or fills a tensor."""
    return Operator(rule, reads=False, **columns)


def _moves(rule: Rule, **columns: Any) -> Operator:
    """Return the row of an operator that moves elements, plain numbers along with them."""
    return Operator(rule, **{"reads": False, "picks": False, "role": "moves", **columns})


def _multiplies(rule: Rule, **columns: Any) -> Operator:
    """Return the row of a product of matrices: what it sums is checked by itself, column by column."""
    return Operator(rule, picks=False, **columns)


# Names of operators (without namespace and trailing underscore) -> their row.
_ROWS: tuple[tuple[str, Operator], ...] = (
    # element by element
    ("abs acos acosh addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor "
     "ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma eq erf erfc erfinv exp exp2 expm1 floor "
     "floor_divide fmax fmin fmod frac ge gt heaviside hypot i0 isfinite isinf isnan isneginf isposinf ldexp le lerp "
     "lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt "
     "masked_fill maximum minimum nan_to_num ne nextafter polygamma rad2deg remainder round rrelu rsub sgn sign "
     "signbit sin sinc sinh special_entr special_log_ndtr tan trunc where xlogy __and__ __iand__ __ilshift__ __ior__ "
     "__irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__ bitwise_left_shift bitwise_right_shift complex "
     "conj_physical float_power frexp gcd igamma igammac lcm mvlgamma polar special_bessel_j0 special_bessel_j1 "
     "special_erfcx special_i0e special_i1 special_i1e special_ndtr special_ndtri special_xlog1py special_zeta "
     "true_divide fake_quantize_per_tensor_affine_cachemask "
     "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _add_relu _masked_scale _standard_gamma poisson",
     _elementwise()),
    ("mul", _elementwise(role="multiplies")),
    ("div", _elementwise(role="divides")),
    ("add sub", _elementwise(role="adds")),
    ("neg", _elementwise(role="moves")),
    ("pow", _elementwise(role="powers")),
    ("sqrt", _elementwise(role="powers", power=0.5)),
    ("rsqrt", _elementwise(role="powers", power=-0.5)),
    ("reciprocal", _elementwise(role="powers", power=-1.0)),
    ("square", _elementwise(role="powers", power=2.0)),
    *((name, _elementwise(elementwise.neurons(elementwise.activation(kind))))
      for kind in NEURON_TYPES.values() for name in kind.operators),
    ("gelu", _elementwise(elementwise.neurons(elementwise.gelu))),
    ("prelu _prelu_kernel", _elementwise(elementwise.neurons(elementwise.prelu))),
    ("rrelu_with_noise", _elementwise(elementwise.neurons(elementwise.rrelu), writes_beside=True)),
    ("rrelu_with_noise_functional", _elementwise(elementwise.neurons(elementwise.rrelu))),
    ("native_dropout", Operator(elementwise.native_dropout)),
    # tensors of numbers
    ("empty zeros ones rand randn empty_strided", _fills(elementwise.fill)),
    ("full scalar_tensor", _fills(elementwise.fill, numbers=operands, fills=True)),
    ("empty_like zeros_like ones_like rand_like randn_like randint_like new_empty new_zeros new_ones new_empty_strided "
     "zero exponential geometric log_normal cauchy random", _fills()),
    ("full_like new_full fill", _fills(numbers=operands, fills=True)),
    ("normal uniform", _fills(numbers=operands)),
    ("bernoulli", _fills(elementwise.bernoulli)),
    ("arange linspace tril_indices triu_indices", Operator(lookup.checked, reads=False, picks=False, literal=True)),
    ("_local_scalar_dense", Operator(picks=False, numbers=item)),
    # movements
    ("clone _to_copy alias detach contiguous positive to lift lift_fresh_copy", _moves(movement.copy)),
    ("detach_copy _conj resolve_conj resolve_neg _neg_view _pin_memory", _moves(movement.copy, role="")),
    ("lift_fresh", _moves(movement.copy, numbers=literal, fills=True)),
    ("view", _moves(movement.view_or_cast)),
    ("_unsafe_view reshape _reshape_alias flatten", _moves(movement.moving(movement.view))),
    ("squeeze unsqueeze", _moves(movement.moving(movement.resize), reshapes=True)),
    ("permute", _moves(movement.moving(movement.permute))),
    ("t", _moves(movement.moving(movement.transpose_all), reshapes=True)),
    ("transpose swapaxes swapdims", _moves(movement.moving(movement.transpose), reshapes=True)),
    ("expand", _moves(movement.moving(movement.expand_))),
    ("select", _moves(movement.moving(movement.select))),
    ("slice", _moves(movement.moving(movement.slice_))),
    ("split split_with_sizes unsafe_split unsafe_split_with_sizes", _moves(movement.split)),
    ("unbind", _moves(movement.unbind)),
    ("cat", _moves(movement.cat, role="adds")),
    ("stack", _moves(movement.stack, role="adds")),
    ("flip", _moves(movement.moving(movement.flip))),
    ("roll", _moves(movement.moving(movement.roll))),
    ("rot90", _moves(movement.moving(movement.rot90), role="")),
    ("repeat", _moves(movement.moving(movement.repeat))),
    ("constant_pad_nd", _moves(movement.padding("constant"), role="", numbers=operands)),
    ("reflection_pad1d reflection_pad2d reflection_pad3d", _moves(movement.padding("reflect"), role="")),
    ("replication_pad1d replication_pad2d replication_pad3d", _moves(movement.padding("replicate"), role="")),
    ("pixel_shuffle", _moves(movement.pixel_shuffle, role="")),
    ("pixel_unshuffle", _moves(movement.pixel_unshuffle, role="")),
    ("channel_shuffle native_channel_shuffle", _moves(movement.moving(movement.channel_shuffle), role="")),
    ("copy", _moves(movement.copy_into, role="")),
    ("unfold", _moves(movement.unfold, role="")),
    ("_pack_padded_sequence", _moves(movement.pack, role="")),
    ("view_as_complex", Operator(layout.pairs_as_complex, reads=False)),
    ("view_as_real", Operator(movement.moving(layout.as_real), reads=False)),
    ("diagonal", Operator(movement.moving(layout.diagonal), reads=False)),
    ("as_strided", Operator(layout.as_strided, reads=False, reshapes=True)),
    ("tril triu", Operator(layout.triangle)),
    ("im2col", Operator(layout.im2col)),
    ("col2im", Operator(layout.col2im)),
    # positions
    ("embedding", Operator(lookup.embedding)),
    ("_embedding_bag _embedding_bag_forward_only", Operator(lookup.embedding_bag)),
    ("gather", Operator(lookup.gather)),
    ("scatter", Operator(lookup.scatter, numbers=operands)),
    ("scatter_add scatter_reduce", Operator(lookup.scatter)),
    ("index_add", Operator(lookup.index_add, numbers=operands)),
    ("index_copy index_reduce", Operator(lookup.index_add)),
    ("index_fill", Operator(lookup.index_fill, numbers=operands)),
    ("index_put _index_put_impl _unsafe_index_put", Operator(lookup.index_put)),
    ("masked_scatter", Operator(lookup.masked_scatter)),
    ("index_select", Operator(lookup.index_select, reads=False)),
    ("index _unsafe_index", Operator(lookup.index, reads=False)),
    ("bucketize isin", Operator(lookup.bucketize)),
    ("_assert_tensor_metadata _assert_scalar _functional_assert_async sym_size sym_numel sym_stride "
     "sym_constrain_range", Operator(lookup.checked, reads=False)),
    # several channels at once
    ("_cdist_forward _euclidean_dist _pdist_forward pdist dist", Operator(lookup.mixes(Code.DISTANCES))),
    ("cosine_similarity renorm", Operator(lookup.mixes(Code.NORMALISES))),
    ("_trilinear", Operator(lookup.mixes(Code.MULTIPLIES_ALL))),
    ("linalg_cross linalg_householder_product linalg_qr linalg_matrix_exp linalg_inv_ex linalg_lu_factor_ex "
     "_linalg_svd _linalg_eigh _linalg_solve_ex linalg_cholesky_ex", Operator(lookup.mixes(Code.MULTIPLIES))),
    ("masked_select unique_consecutive", Operator(lookup.mixes(Code.DROPS_BY_VALUE))),
    ("nonzero affine_grid_generator repeat_interleave", Operator(lookup.mixes(Code.MAKES_POSITIONS))),
    ("unique_dim _unique2", Operator(lookup.mixes(Code.ORDERS_BY_VALUE))),
    ("searchsorted equal", Operator(lookup.mixes(Code.COMPARES))),
    ("take", Operator(lookup.mixes(Code.ELEMENTS_READ))),
    ("put", Operator(lookup.mixes(Code.ELEMENTS_WRITTEN))),
    # reductions
    ("sum", Operator(reduction.reduces(sums=True, scales=True), role="sums")),
    ("mean", Operator(reduction.reduces(averages=True, scales=True, pools="average"))),
    ("var std var_mean std_mean", Operator(reduction.reduces(averages=True))),
    ("amax", Operator(reduction.reduces(chooses=True, scales=True, pools="largest"))),
    ("amin", Operator(reduction.reduces(chooses=True, scales=True))),
    ("max", Operator(elementwise.extremum(reduction.reduces(chooses=True, scales=True, pools="largest")))),
    ("min", Operator(elementwise.extremum(reduction.reduces(chooses=True, scales=True)))),
    ("nansum logsumexp special_logsumexp", Operator(reduction.reduces(sums=True))),
    ("norm linalg_vector_norm", Operator(reduction.reduces(2, sums=True))),
    ("prod all any argmax argmin median nanmedian count_nonzero aminmax", Operator(reduction.reduces())),
    ("kthvalue", Operator(reduction.reduces(2, -1))),
    ("mode", Operator(reduction.reduces(1, -1))),
    ("_assert_async trace histc bincount is_nonzero", Operator(reduction.reduces(9))),  # over all axes
    ("_softmax _log_softmax _safe_softmax softmax log_softmax", Operator(reduction.works_along(softmax=True))),
    ("cumsum cumprod logcumsumexp cummax cummin", Operator(reduction.works_along())),
    ("_cummax_helper _cummin_helper", Operator(reduction.works_along(3))),
    ("sort", Operator(reduction.works_along(1, -1, why=Code.ORDERS))),
    ("topk", Operator(reduction.works_along(2, -1, why=Code.ORDERS))),
    ("_fft_c2c _fft_r2c _fft_c2r", Operator(reduction.works_along(why=Code.TRANSFORMS, linear=True))),
    ("glu", Operator(reduction.glu)),
    ("max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d "
     "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d",
     Operator(reduction.pools("largest"))),
    ("avg_pool1d avg_pool2d avg_pool3d", Operator(reduction.pools("average", windows=True))),
    ("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
     "mkldnn_adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
     "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
     "_upsample_bilinear2d_aa", Operator(reduction.pools("average"))),
    ("upsample_bicubic2d _upsample_bicubic2d_aa _upsample_lanczos2d_aa", Operator(reduction.pools())),
    ("max_unpool2d max_unpool3d", Operator(reduction.pools(unpools=True))),
    ("grid_sampler_2d grid_sampler_3d", Operator(reduction.pools(samples=True))),
    # norms
    ("native_group_norm", Operator(normalization.group_norm)),
    ("native_layer_norm _fused_rms_norm rms_norm layer_norm", Operator(normalization.layer_norm)),
    ("_weight_norm_interface", Operator(normalization.weight_norm, reads=False)),
    ("native_batch_norm _native_batch_norm_legit_no_training _batch_norm_no_update cudnn_batch_norm miopen_batch_norm "
     "batch_norm", Operator(normalization.batch_norm, reads=False)),
    ("_native_batch_norm_legit _batch_norm_with_update",
     Operator(normalization.batch_norm, reads=False, writes_beside=True)),
    # matrix products
    ("mm bmm mv matmul", _multiplies(contraction.mm, role="contracts", folds=True)),
    ("addmm baddbmm addmv", _multiplies(contraction.addmm, numbers=operands, folds=True)),
    ("linear", _multiplies(contraction.linear, folds=True)),
    ("convolution", _multiplies(convolution.convolution, folds=True)),
    ("_grouped_mm", Operator(contraction.grouped_mm)),
    ("scaled_dot_product_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
     "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math",
     _multiplies(product.attention(), role="attends", numbers=scale_argument)),
    ("_scaled_dot_product_flash_attention_for_cpu",
     _multiplies(product.attention("attn_mask"), role="attends", numbers=scale_argument)),
    ("_scaled_dot_product_flash_attention",
     _multiplies(product.attention(has_mask=False), role="attends", numbers=scale_argument)),
)  # fmt: skip


def _table(rows: tuple[tuple[str, Operator], ...]) -> dict[str, Operator]:
    """Return the row of every operator. Raises: ValueError: an operator has two."""
    named = [(name, row) for names, row in rows for name in names.split()]
    table = dict(named)
    if len(table) < len(named):
        twice = sorted(name for name, times in Counter(name for name, _ in named).items() if times > 1)
        raise ValueError(
            f"named more than once in the table of operators: {', '.join(twice)}. Leave one; the operators of a neuron "
            "type (numerics/activations.py) have a row already and stand in no other."
        )
    return table


OPERATORS: dict[str, Operator] = _table(_ROWS)
"""Operator name without namespace and trailing underscore -> its row."""


def register_rule(operator: str, rule: Rule) -> None:
    """Give an operator a rule: which channels its outputs carry.

    A rule is called once for every call of the operator in a captured pass, after it has run. It may use

    - `call.args`, `call.kwargs`, `call.arg(index, name, default)`: what the operator was called with. Defaults are left
      out by the dispatcher, so give them again; `call.outs`: the tensors that came out, in order;
    - `call.tensors()`: all tensors among the arguments, those in lists included;
    - `call.value(tensor)`: the Value of an operand. `.ids` is an integer array with as many axes as the tensor
      has, 0 for no channel; an axis along which the ids are constant has size 1. `.has_channels`: any channel at all;
    - `call.view(tensor)`: the parameter or buffer that an operand is (a view of), else None;
    - `call.pin(ids, text, remedy)`: these channels are never removed. `text` goes on "operator aten.name in 'module'";
    - `call.tie(ids, ids)`: the channels at the same places, after broadcasting, are removed together.

    It returns the Value of the output, a list of Values for several outputs, or None for outputs without channels. The
    in-place form of an operator is served by the same rule, whose answer is then written to the operand. A rule that
    raises LookupError, TypeError or ValueError pins all operands; an answer of another kind, or ids that do not fit the
    output, end the capture with a CaptureError.

    Hand on ids only along axes whose elements the operator keeps apart (what it mixes, it pins), and as a new
    `Value(ids)`: one that is handed on whole still says how its numbers were made.

    Args:
        operator: its name without namespace, overload and trailing underscore, e.g. "topk".
        rule: takes a Call (apoptosis.graph.trace.tracer) and returns Values (apoptosis.graph.trace.values).

    Raises:
        ArgumentError: the operator has a rule already, or torch knows no such operator.

    Example:
        >>> import torch
        >>> from apoptosis.graph import analyse
        >>> from torch import nn
        >>> class Airy(nn.Module):
        ...     def forward(self, x):
        ...         return torch.special.airy_ai(x)
        >>> net, x = nn.Sequential(nn.Linear(4, 6), Airy(), nn.Linear(6, 2)), torch.zeros(3, 4)
        >>> analyse(net, (x,)).groups[0].pin.reason
        "operator aten.special_airy_ai in '1' has no rule"
        >>> from apoptosis.graph.trace.values import Value
        >>> register_rule("special_airy_ai", lambda call: Value(call.value(call.args[0]).ids))
        >>> analyse(net, (x,)).groups[0].pin is None
        True
        >>> del OPERATORS["special_airy_ai"]
    """
    if not isinstance(operator, str):
        raise ArgumentError(f"operator is a {type(operator).__name__}, not the name of an operator.")
    if operator in OPERATORS and OPERATORS[operator].rule is not None:
        raise ArgumentError(f"operator '{operator}' has a rule already; there are {len(OPERATORS)} in all.")
    if not callable(rule):
        raise ArgumentError(f"the rule of '{operator}' is a {type(rule).__name__}, not a function of a Call.")
    if not _is_known(operator):
        near = ", ".join(get_close_matches(operator, dir(torch.ops.aten), 3)) or "none"
        raise ArgumentError(
            f"torch has no operator 'aten::{operator}' (similar names: {near}). Give the name in a pin's reason."
        )
    OPERATORS[operator] = replace(OPERATORS.get(operator, UNKNOWN), rule=_checked(operator, rule), picks=True)


def _checked(operator: str, rule: Rule) -> Rule:
    """Return a rule whose answers are checked: what does not fit would be noticed elsewhere, or not at all."""

    def checked(call: Call) -> Result:
        result = rule(call)
        for value, out in zip(result if isinstance(result, Sequence) else (result,), call.outs, strict=False):
            if value is not None and not isinstance(value, Value):
                raise CaptureError(
                    f"the rule of operator '{operator}' returned a {type(value).__name__}. Return a Value for the "
                    "output, a list of them for several outputs, or None."
                )
            shape, ids = tuple(out.shape), () if value is None else value.ids.shape
            if value is not None and (
                len(ids) != len(shape) or any(n not in (1, size) for n, size in zip(ids, shape, strict=True))
            ):
                raise CaptureError(
                    f"the rule of operator '{operator}' returned ids of shape {ids} for an output of shape {shape}. "
                    "They have as many axes as the output, each of its size or of size 1."
                )
        return result

    return checked


def _is_known(operator: str) -> bool:
    """Whether torch has the operator, or its in-place form."""
    return any(hasattr(torch.ops.aten, name) for name in (operator, f"{operator}_"))
