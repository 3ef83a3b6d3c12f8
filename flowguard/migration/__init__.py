r"""The migration: an existing flow in, a robust flow out that starts where the old one was."""

from flowguard.migration.report import Migration, Replacement, SampleError
from flowguard.migration.run import migrate
from flowguard.migration.surgeon import Site, Surgeon, holder, surgeon

__all__ = [
    "Migration",
    "Replacement",
    "SampleError",
    "Site",
    "Surgeon",
    "holder",
    "migrate",
    "surgeon",
]
