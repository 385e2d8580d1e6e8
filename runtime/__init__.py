"""Runtime: the step loop, its back ends, engine building, streams and media. Imports neither torch nor triton."""
