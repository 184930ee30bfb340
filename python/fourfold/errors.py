"""What fourfold raises. Messages name the thing, what was expected, what was found and the remedy."""

__all__ = [
    "BadFileError",
    "DeviceError",
    "Error",
    "InputOutputError",
    "InvalidArgumentError",
    "NotFoundError",
    "UnsupportedError",
]


class Error(Exception):
    """Base of all of them."""


class InvalidArgumentError(Error, ValueError):
    """A shape, an element type, an option or a combination that the caller got wrong."""


class BadFileError(Error):
    """A file's content is damaged, hostile, or not what its names promise."""


class NotFoundError(Error, LookupError):
    """A file, a tensor or a layer that is not there."""


class UnsupportedError(Error):
    """Valid, but this build, backend or version does not implement it."""


class InputOutputError(Error, OSError):
    """The system refused to read or write."""


class DeviceError(Error, RuntimeError):
    """A GPU or its driver refused or failed."""
