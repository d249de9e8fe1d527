"""The error tree: who, what, why and the remedy, in one line each.

Holds: every exception the library raises on purpose, the one line of others. Elsewhere: any decision to raise one.
"""


def one_line(error: BaseException) -> str:
    r"""Return the type of an error and the first line of its text: that of a user's code may have many.

    Example:
        >>> one_line(ValueError("no such width\nin the table"))
        'ValueError: no such width'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class ApoptosisError(Exception):
    """Base of all errors raised on purpose. The user's model and optimizer are as they were before the call."""


class ArgumentError(ApoptosisError, ValueError):
    """An argument is outside what the function takes."""


class ShapeError(ApoptosisError, ValueError):
    """Tensors whose shapes do not fit together."""


class _ForwardError(ApoptosisError):
    """About a forward pass of the user's model, with what is known of the place.

    module: qualified name of the module that was running. places: lines of the user's code, "net.py:7". group: the
    group concerned. brief: the text without what it says of the example input. remedy: what to do where an edit brought
    it about.
    """

    def __init__(
        self,
        text: str = "",
        *,
        module: str = "",
        places: tuple[str, ...] = (),
        group: str = "",
        brief: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(text)
        self.module, self.places, self.group, self.brief, self.remedy = module, places, group, brief, remedy


class WidthsError(ShapeError):
    """These widths do not go together, because one number of the model would have to be two; others may."""


class CaptureError(_ForwardError):
    """The model's forward pass could not be captured on the example input."""


class OutOfMemoryError(ApoptosisError, MemoryError):
    """Memory ran out in a forward pass of the library's own; says nothing about the model's structure."""


class StructureChangedError(_ForwardError):
    """After an edit, a consumer column meets another channel than the one it was folded for."""


class PinnedGroupError(ApoptosisError):
    """A group that was asked to shrink is pinned."""


class UnsupportedOptimizerError(ApoptosisError):
    """The optimizer's state has no rule for being sliced; raised before anything changes."""


class NonFiniteError(ApoptosisError, ValueError):
    """Statistics, weights or losses hold NaN or infinity."""


class BudgetError(ApoptosisError, ValueError):
    """The budget cannot be kept: no classes to read, or a probe that is too small."""


class CheckpointError(ApoptosisError):
    """A checkpoint is damaged, foreign, newer than this library, or of another network."""


class RankError(ApoptosisError):
    """Another process of the run is gone, does not answer in time, or came to another result."""

    reported = False  # by the other rank, in an exchange that this rank made for something else


class DataError(ApoptosisError):
    """A data file is missing, cut off or not of the format it should be."""
