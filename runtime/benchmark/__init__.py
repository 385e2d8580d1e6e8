"""Benchmark of step loops: models side by side, for several numbers of streams, beside what the machine could do."""
