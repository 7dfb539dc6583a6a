"""Loss terms made of an explanation and a metric: one paper a file."""

from captum_idexpo.regularizers.insertion_deletion import InsertionDeletion

__all__ = ["InsertionDeletion"]
