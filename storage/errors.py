"""What can go wrong on disk, as one message a user can act on. All survive pickling between processes."""


class StorageError(Exception):
    """Base: built from one finished message, which names the fact, what was expected, and the way out."""


class InvalidName(StorageError):
    """A run id, key or file name that is not usable."""


class WorkspaceNotUsable(StorageError):
    """The folder cannot be a workspace: a file, not writable, or its marker is damaged."""


class WorkspaceTooNew(StorageError):
    """The workspace, or a table in it, was written by a newer schema than this program knows."""


class NotCommitted(StorageError):
    """Nothing complete lies at a reference."""


class CorruptArtifact(StorageError):
    """A file differs from what its manifest says, or cannot be read."""


class RemovedArtifact(StorageError):
    """A file was removed on purpose, by `popalign gc`."""


class ConflictingArtifact(StorageError):
    """The same reference was committed before with other content."""


class SchemaMismatch(StorageError):
    """Rows do not fit the table's schema."""


class RunInUse(StorageError):
    """Another process works on the same run."""


class StorageFull(StorageError):
    """The disk is full; what was committed is safe."""


class NothingToRollBack(StorageError):
    """There is no earlier model to go back to, or none of that name."""


class FolderInUse(StorageError):
    """A folder for an export is there already."""


class QueryFailed(StorageError):
    """A query was refused by DuckDB, or would write."""
