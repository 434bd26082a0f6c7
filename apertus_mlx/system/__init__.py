"""Files, output and the errors of other libraries."""
