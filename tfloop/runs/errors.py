"""What ends a run before it trains, told in one line."""


class Refused(RuntimeError):
    """A run that must not start: flags, resume, lock or folder. A binary exits with `exit_status`."""

    exit_status = 2


class FolderError(Refused):
    """The run folder cannot be used: not writable, not a folder, or holding something else."""


class LockedError(Refused):
    """Another live run uses the folder."""


class ConfigError(Refused):
    """The configuration differs from that of the run to be resumed."""


class NoUsableCheckpoint(Refused):
    """There are checkpoints, and none of them can be read."""


class CheckpointMismatch(Refused):
    """A checkpoint is whole, and not of this model."""


class CheckpointError(RuntimeError):
    """Checkpoints cannot be written."""
