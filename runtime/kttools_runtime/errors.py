"""The closed list of exceptions. The command line turns each into one line and its exit code."""


class KTError(Exception):
    """Base of every error this project raises on purpose; exit_code is the command line's exit status."""

    exit_code = 1


class EngineError(KTError):
    """The CPU expert engine failed while computing."""


class UsageError(KTError):
    """An option or argument makes no sense; nothing was read or written."""

    exit_code = 2


class InvalidInputError(KTError):
    """A file, configuration or prompt is not what it must be."""

    exit_code = 3


class CorruptFileError(InvalidInputError):
    """A file is truncated, damaged, or lies about its own content."""


class PackFormatError(CorruptFileError):
    """An expert pack breaks a rule of PACK.md."""


class UnsupportedModelError(InvalidInputError):
    """A well-formed model that this version cannot run; the message says which part."""


class ResourceError(KTError):
    """Not enough RAM, VRAM or disk, found before the work where possible."""

    exit_code = 4


class HardwareError(KTError):
    """The CPU, GPU or driver lacks what was asked for."""

    exit_code = 5


class QualityGateError(KTError):
    """A quality floor the user set does not hold."""

    exit_code = 6


class DownloadError(KTError):
    """A download or its authentication failed."""

    exit_code = 7
