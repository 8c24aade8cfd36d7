"""What can go wrong on disk, as one message a user can act on. All survive pickling between processes."""


class StorageError(Exception):
    """Base: built from one finished message."""


class InvalidName(StorageError):
    """A run id or key that is no safe file name."""


class WorkspaceTooNew(StorageError):
    """The workspace was written by a newer schema than this program knows."""


class NotCommitted(StorageError):
    """Nothing complete lies at a reference."""


class CorruptArtifact(StorageError):
    """A file differs from what its manifest says."""


class ConflictingArtifact(StorageError):
    """The same reference was committed before with other content."""


class SchemaMismatch(StorageError):
    """Rows do not fit the table's schema."""


class RunInUse(StorageError):
    """Another process works on the same run."""


class StorageFull(StorageError):
    """The disk is full; what was committed is safe."""


class QueryFailed(StorageError):
    """A query was refused by DuckDB, or would write."""
