"""The report of a verification as a page and as plots."""
