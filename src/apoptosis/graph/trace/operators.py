"""Operators that the tracer treats apart, by name.

Holds: names. Elsewhere: rules (graph.rules).
"""

# Operators that write to a buffer of the module or to noise beside their result.
SIDE_WRITES = frozenset(("_native_batch_norm_legit", "_batch_norm_with_update", "rrelu_with_noise"))
# Operators that change a tensor object's shape and not its memory.
IN_PLACE_SHAPES = frozenset(("t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "as_strided_"))

# Operators whose reading of a parameter may be folded into; "@module" stands for them among the readers.
READERS = frozenset(("mm", "bmm", "mv", "matmul", "addmm", "baddbmm", "addmv", "linear", "convolution"))
