"""Golden-case recorder, run as `python -m tools.record_golden_case`."""
